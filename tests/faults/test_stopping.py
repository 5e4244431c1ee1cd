"""A daemon that is to end: what runs is finished, what is new is refused, a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from myllm.client import connect, start
from myllm.settings import load

from .conftest import Launch
from .rig import MYLLM, Daemon, gen, numbered, processes, text_of, until

FakeModel = Callable[..., Path]


def nothing_lives() -> bool:
    """the workers are gone"""
    return not processes()


def draining(daemon: Daemon) -> bool:
    """the daemon drains"""
    return bool(daemon.status()["daemon"]["draining"])


def streams(daemon: Daemon, model: Path, stack: ExitStack, count: int = 8) -> list[Iterator[bytes]]:
    """Streams that have begun."""
    found = [stack.enter_context(daemon.client()).stream(gen(model)) for _ in range(count)]
    for lines in found:
        while b'"token"' not in next(lines):
            pass
    return found


def test_streams_are_finished_and_new_work_is_refused(daemon: Daemon, fake_model: FakeModel) -> None:
    model = fake_model(tokens=numbered(200), ms_per_token=10)
    with ExitStack() as stack:
        running = streams(daemon, model, stack)
        early = stack.enter_context(daemon.client())
        daemon.signal(signal.SIGTERM)
        until(lambda: draining(daemon), 1)
        for refused in (daemon.done(gen(model)), orjson.loads(next(early.stream(gen(model))))):
            assert refused["error"]["code"] == "try_again"
        for lines in running:
            *_, last = map(orjson.loads, lines)
            assert last["full_text"] == "".join(numbered(200))
    assert daemon.ended() == 0
    assert not os.path.lexists(daemon.path)
    until(nothing_lives, 2)
    assert [entry["event"] for entry in daemon.log()][-2:] == ["request", "stopped"]


def test_a_command_is_told_to_try_again_while_the_daemon_drains(
    daemon: Daemon, fake_model: FakeModel
) -> None:
    model = fake_model(tokens=numbered(300), ms_per_token=10)
    with ExitStack() as stack:
        (running,) = streams(daemon, model, stack, 1)
        daemon.signal(signal.SIGTERM)
        until(lambda: draining(daemon), 1)
        command = [*MYLLM, "gen", "-n", "-t", "-m", model, "x"]
        ended = subprocess.run(command, capture_output=True, check=False, timeout=30)
        assert (ended.returncode, ended.stdout) == (75, b"")
        assert b"try again" in ended.stderr
        assert orjson.loads(list(running)[-1])["finish_reason"] == "stop"
    assert daemon.ended() == 0


def test_a_stream_that_outlasts_the_grace_ends_with_an_error(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch("import myllm.daemon.daemon; myllm.daemon.daemon.GRACE = 0.5")
    model = fake_model(tokens=numbered(4000), ms_per_token=10)
    with ExitStack() as stack:
        running = streams(daemon, model, stack)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        for lines in running:
            *tokens, last = map(orjson.loads, lines)
            assert last["error"]["code"] == "unavailable"
            assert "stopped" in last["error"]["message"]
            assert text_of(tokens)
        assert 0.4 < time.monotonic() - began < 3
    assert daemon.ended() == 0
    until(nothing_lives, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_leaves_nothing(
    daemon: Daemon, fake_model: FakeModel, number: signal.Signals
) -> None:
    model = fake_model(tokens=numbered(4000), ms_per_token=10)
    with ExitStack() as stack:
        streams(daemon, model, stack)
        daemon.signal(number)
        until(lambda: draining(daemon), 1)
        daemon.signal(number)
        assert daemon.ended(1) == -number
        assert not os.path.lexists(daemon.path)
        until(nothing_lives, 2)


def test_a_daemon_told_to_shut_down_finishes_too(daemon: Daemon, fake_model: FakeModel) -> None:
    model = fake_model(tokens=numbered(100), ms_per_token=10)
    with ExitStack() as stack:
        (running,) = streams(daemon, model, stack, 1)
        with daemon.client() as client:
            assert orjson.loads(next(client.stream({"op": "shutdown"}))) == {"done": True, "pid": daemon.pid}
            assert daemon.done(gen(model))["error"]["code"] == "try_again"
            assert orjson.loads(list(running)[-1])["finish_reason"] == "stop"
            assert daemon.ended() == 0


# ── idle ────────────────────────────────────────────────────────────────────────────────────

SIMULATED = """
import asyncio, pathlib, selectors, time
class Jumping(selectors.EpollSelector):
    # Where it would sleep on end, its clock jumps instead: as soon as the file says so, and then for ever.
    late = 0.0
    jumps = pathlib.Path({file!r})
    def select(self, timeout=None):
        if timeout is not None and timeout <= 0.02:
            return super().select(timeout)
        began = time.monotonic()
        if not (ready := super().select(0.02)) and timeout and self.jumps.exists():
            Jumping.late += max(0.0, timeout - (time.monotonic() - began))  # to the very moment, never beyond
            self.jumps.write_text(str(self.late))
        return ready
class Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        super().__init__(Jumping())
    def time(self):
        return super().time() + Jumping.late
class Policy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = Loop
asyncio.set_event_loop_policy(Policy())
"""


def test_after_an_idle_hour_the_daemon_is_gone_and_the_next_command_works(
    launch: Launch, fake_model: FakeModel, tmp_path: Path
) -> None:
    clock = tmp_path / "late"
    daemon = launch(SIMULATED.format(file=str(clock)), MYLLM_KEEP_ALIVE="30m")
    model = fake_model(tokens=numbered(3))
    time.sleep(1)  # out of step with the daemon's looks, which begin at its start
    began = time.monotonic()
    assert daemon.done(gen(model))["full_text"] == " 0 1 2"
    assert daemon.models()["model"]["keep_alive_s"] > 29 * 60
    clock.write_text("0")
    assert daemon.ended() == 0
    idle = float(clock.read_text()) + time.monotonic() - began  # on the daemon's clock
    assert 35 * 60 <= idle <= 36 * 60  # 30 min with the model, 5 without
    assert not os.path.lexists(daemon.path)
    until(nothing_lives, 2)
    logged = [(entry["event"], entry.get("reason")) for entry in daemon.log()]
    assert logged[-3:] == [("unloaded", "keep-alive"), ("idle", None), ("stopped", None)]
    with connect(load()) as client:
        assert orjson.loads(list(client.stream(gen(model)))[-1])["full_text"] == " 0 1 2"
    assert launch().done(gen(model))["full_text"] == " 0 1 2"


def test_a_pinned_model_keeps_the_daemon(launch: Launch, fake_model: FakeModel, tmp_path: Path) -> None:
    clock = tmp_path / "late"
    daemon = launch(SIMULATED.format(file=str(clock)), MYLLM_KEEP_ALIVE="30m")
    daemon.done({"op": "load", "model": str(fake_model()), "pin": True})
    clock.write_text("0")

    def an_hour_is_over() -> bool:
        """an hour is over on the daemon's clock"""
        return float(clock.read_text() or 0) > 3600

    until(an_hour_is_over)
    assert daemon.lives
    clock.unlink()
    assert daemon.models()["model"]["pinned"]


def test_the_daemon_that_start_gave_is_the_one_that_is_there(daemon: Daemon) -> None:
    with start.daemon() as client:
        assert client.greeting["pid"] == daemon.pid
