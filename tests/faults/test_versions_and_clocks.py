"""Another version's daemon, and a clock that jumps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from myllm import __version__
from myllm.client import start
from myllm.client.dial import dial
from myllm.errors import UnavailableError
from myllm.protocol import PROTOCOL, encode
from myllm.socket_file import socket_path

from .conftest import Launch
from .rig import MYLLM, children, command_with, gen, numbered, processes, until
from .test_claims import SERVE

FakeModel = Callable[..., Path]
OLD = 'import myllm; myllm.__version__ = "0.0.1"\n'
OTHER_PROTOCOL = (
    OLD
    + """
import myllm.protocol, myllm.runtime.connection
myllm.runtime.connection.PROTOCOL = 0
real = myllm.protocol.hello
myllm.runtime.connection.hello = lambda *a, **k: {"hello": real(*a, **k)["hello"] | {"protocol": 0}}
"""
)


class OldDaemon:
    """Another version's daemon, which `launch` would replace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prelude: str) -> None:
        with monkeypatch.context() as changed:
            changed.setattr(start, "python", lambda module: command_with(prelude, module))
            start._start()
        (self.pid,) = {pid for pid in processes() if os.getsid(pid) == pid}

    def ended(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("prelude", [OLD, OTHER_PROTOCOL])
def test_commands_run_without_another_versions_daemon_and_say_so(
    monkeypatch: pytest.MonkeyPatch, fake_model: FakeModel, prelude: str
) -> None:
    old = OldDaemon(monkeypatch, prelude)
    model = fake_model(tokens=["fine"])
    command = [*MYLLM, "gen", "-n", "-t", "-m", str(model), "x"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "fine")
    assert "the daemon is MyLLM 0.0.1" in ended.stderr
    assert "`myllm load` replaces it" in ended.stderr
    assert not children(old.pid), "it was not asked"
    os.kill(old.pid, signal.SIGTERM)
    assert old.ended() == 0


@pytest.mark.parametrize(("prelude", "protocol"), [(OLD, PROTOCOL), (OTHER_PROTOCOL, 0)])
def test_start_drains_and_replaces_another_versions_daemon(
    monkeypatch: pytest.MonkeyPatch, launch: Launch, fake_model: FakeModel, prelude: str, protocol: int
) -> None:
    old = OldDaemon(monkeypatch, prelude)
    answered = answering(old, fake_model(tokens=numbered(200), ms_per_token=10), protocol)
    began = time.monotonic()
    new = launch()
    assert answered() == "".join(numbered(200)), "what ran was finished"
    assert time.monotonic() - began > 0.5
    assert new.pid != old.pid
    assert new.status()["daemon"]["version"] == __version__
    assert old.ended() == 0


def answering(old: OldDaemon, model: Path, protocol: int) -> Callable[[], str]:
    """A daemon that is in the middle of an answer; what to call for the whole of it."""
    text: list[str] = []
    running = threading.Thread(target=lambda: text.append(_whole_answer(model, protocol)))
    running.start()
    until(lambda: children(old.pid))
    time.sleep(0.5)

    def answered() -> str:
        running.join()
        return text[0]

    return answered


def _whole_answer(model: Path, protocol: int) -> str:
    """What a client of that protocol is told."""
    connection = dial(socket_path(), 5)
    assert connection is not None
    with connection, connection.makefile("rb") as lines:
        connection.sendall(encode({"hello": {"protocol": protocol}}) + encode(gen(model)))
        *_, last = map(orjson.loads, lines_until_done(lines))
    return str(last["full_text"])


def lines_until_done(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        yield line
        if b'"done":true' in line:
            return


@pytest.mark.parametrize(("prelude", "protocol"), [(OLD, PROTOCOL), (OTHER_PROTOCOL, 0)])
def test_several_who_replace_an_old_daemon_let_it_finish(
    monkeypatch: pytest.MonkeyPatch, launch: Launch, fake_model: FakeModel, prelude: str, protocol: int
) -> None:
    old = OldDaemon(monkeypatch, prelude)
    answered = answering(old, fake_model(tokens=numbered(200), ms_per_token=10), protocol)
    program = "from myllm.client import start; print(start.daemon().greeting['pid'])"
    starters = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    pids = {starter.communicate(timeout=30)[0].strip() for starter in starters}
    assert answered() == "".join(numbered(200))
    assert old.ended() == 0
    with start.daemon() as client:
        assert pids == {str(client.greeting["pid"])}
    os.kill(int(pids.pop()), signal.SIGTERM)


@pytest.mark.parametrize("version", ["0.0.1", __version__])
def test_a_serve_is_never_replaced(version: str) -> None:
    program = f"import myllm; myllm.__version__ = {version!r}\n{SERVE}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as serve:
        assert serve.stdout is not None
        assert serve.stdout.readline() == "ready\n"
        if version == __version__:
            with closing(start.daemon()) as client:
                assert client.greeting["pid"] == serve.pid
                (refusal,) = map(orjson.loads, client.stream({"op": "shutdown"}))
                assert refusal["error"]["code"] == "unavailable"
                assert str(serve.pid) in refusal["error"]["message"]
        else:
            with pytest.raises(UnavailableError, match=rf"process {serve.pid}\b"):
                start.daemon()
        assert serve.poll() is None
        serve.terminate()
        assert serve.wait(10) == 0


# ── clocks ──────────────────────────────────────────────────────────────────────────────────

JUMPING = """
import datetime, pathlib, time
real, late = time.time, pathlib.Path({file!r})
def jumped():
    return real() + float(late.read_text() or 0 if late.exists() else 0)
class Jumped(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return cls.fromtimestamp(jumped(), zone)
time.time, datetime.datetime = jumped, Jumped
"""
"""As sitecustomize.py: the wall clock of the daemon and of its workers is as late as the file says."""
DAY = 86400


def test_a_jump_of_the_clock_changes_nothing(launch: Launch, fake_model: FakeModel, tmp_path: Path) -> None:
    late = tmp_path / "late"
    (tmp_path / "sitecustomize.py").write_text(JUMPING.format(file=str(late)))
    daemon = launch(PYTHONPATH=str(tmp_path), MYLLM_KEEP_ALIVE="10m")
    model = fake_model(tokens=numbered(100), ms_per_token=5)
    for jump in (0, DAY, -DAY, 0):
        with daemon.client() as client:
            lines = client.stream(gen(model, deadline_ms=20_000))
            while b'"token"' not in next(lines):
                pass
            late.write_text(str(jump))
            *_, last = map(orjson.loads, lines)
        assert last["full_text"] == "".join(numbered(100))
        assert last["finish_reason"] == "stop"
        assert 400 < last["timings"]["decode_ms"] < 20_000
        assert 0 <= last["timings"]["ttft_ms"] < 20_000
        (loaded,) = daemon.models().values()
        assert 500 < loaded["keep_alive_s"] <= 600
        assert 0 <= loaded["idle_s"] < 60
        assert 0 <= daemon.status()["daemon"]["uptime_s"] < 300
    days = {entry["time"][:10] for entry in daemon.log()}
    assert len(days) == 3, "the wall clock did jump"


def test_a_deadline_is_kept_over_a_jump(launch: Launch, fake_model: FakeModel, tmp_path: Path) -> None:
    late = tmp_path / "late"
    (tmp_path / "sitecustomize.py").write_text(JUMPING.format(file=str(late)))
    daemon = launch(PYTHONPATH=str(tmp_path))
    model = fake_model(tokens=numbered(4000), ms_per_token=5)
    daemon.done({"op": "load", "model": str(model)})
    for jump in (-DAY, DAY):
        began = time.monotonic()
        with daemon.client() as client:
            lines = client.stream(gen(model, deadline_ms=500))
            while b'"token"' not in next(lines):
                pass
            late.write_text(str(jump))
            *_, last = map(orjson.loads, lines)
        assert last["finish_reason"] == "deadline"
        assert 0.4 < time.monotonic() - began < 3
