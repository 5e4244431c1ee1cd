"""Processes are killed at any moment: what was said stays said, the rest goes on, nothing needs cleaning."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from myllm.errors import UnavailableError

from .conftest import Launch
from .rig import MYLLM, Daemon, Event, gen, numbered, processes, text_of, times, until

FakeModel = Callable[..., Path]
FATAL = [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]


def later(seconds: float, daemon: Daemon, number: int = signal.SIGKILL) -> threading.Thread:
    """Sends the daemon a signal in a while."""
    timer = threading.Timer(seconds, daemon.signal, [number])
    timer.start()
    return timer


def up_to_the_end(daemon: Daemon, request: Event) -> list[Event]:
    """The events of a request that its daemon's death ends."""
    events: list[Event] = []
    with daemon.client() as client, pytest.raises(UnavailableError):
        events.extend(map(orjson.loads, client.stream(request)))
    return events


def nothing_lives() -> bool:
    """the workers are gone"""
    return not processes()


# ── the daemon ──────────────────────────────────────────────────────────────────────────────


def killed_in_mid_stream(launch: Launch, model: Path, moment: float, **parameters: object) -> list[Event]:
    """The events up to the kill, `moment` seconds after the first token, or before it where negative."""
    daemon = launch()
    events: list[Event] = []
    if moment < 0:
        killer = later(-moment, daemon)
        events = up_to_the_end(daemon, gen(model, **parameters))
    else:
        with daemon.client() as client:
            lines = client.stream(gen(model, **parameters))
            while "token" not in (event := orjson.loads(next(lines))):
                pass
            events.append(event)
            killer = later(moment, daemon)
            with pytest.raises(UnavailableError):
                events.extend(map(orjson.loads, lines))
    killer.join()
    assert daemon.ended() == -signal.SIGKILL
    until(nothing_lives, 2)
    assert os.path.lexists(daemon.path), "a stale socket is what the next daemon meets"
    return events


@times(10, 200)
def test_a_killed_daemon_loses_nothing_that_was_said_and_needs_no_cleaning(
    launch: Launch, fake_model: FakeModel, count: int
) -> None:
    model = fake_model(tokens=numbered(4000), ms_per_token=1)
    moments = random.Random(count)
    for _ in range(count):
        moment = moments.uniform(-0.4, 0.4)
        events = killed_in_mid_stream(launch, model, moment)
        tokens = [event["token"] for event in events if "token" in event]
        assert tokens == numbered(4000)[: len(tokens)]
        assert not any(event.get("done") for event in events)
        # A step takes 1 ms and a little, more on a busy machine; but what was said must have come.
        assert len(tokens) >= moment * 1000 / 20
    assert launch().done(gen(model, max_tokens=3))["full_text"] == " 0 1 2"


@pytest.mark.model
@times(2, 20)
def test_a_killed_daemon_with_the_real_model(launch: Launch, smollm2_path: Path, count: int) -> None:
    moments = random.Random(count)
    for _ in range(count):
        events = killed_in_mid_stream(
            launch, smollm2_path, moments.uniform(-1, 1), prompt="Count to 900.", ignore_eos=True
        )
        assert not any(event.get("done") for event in events)
    done = launch().done(gen(smollm2_path, "Say hello.", max_tokens=4, temperature=0))
    assert done["usage"]["completion_tokens"] == 4


def test_a_command_whose_daemon_is_killed_keeps_its_text_and_exits_69(
    daemon: Daemon, fake_model: FakeModel
) -> None:
    model = fake_model(tokens=numbered(4000), ms_per_token=2)
    command = [*MYLLM, "gen", "-n", "-t", "-m", model, "x"]
    environ = {**os.environ, "MYLLM_DAEMON": "always"}
    with subprocess.Popen(command, env=environ, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        text = process.stdout.read(20)
        daemon.signal(signal.SIGKILL)
        text += process.stdout.read()
        said = process.stderr.read().decode()
    assert process.returncode == 69
    assert "".join(numbered(4000)).startswith(text.decode().rstrip("\n"))
    assert len(text) >= 20
    assert said.count("\n") == 1
    assert said.startswith("myllm: ")
    assert daemon.ended() == -signal.SIGKILL


# ── a worker ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", FATAL)
@times(3, 100)
def test_a_killed_worker_fails_its_streams_only(
    daemon: Daemon, fake_model: FakeModel, number: signal.Signals, count: int
) -> None:
    other = fake_model("other", tokens=numbered(10), ms_per_token=1, window=1_000_000)
    moments = random.Random(count + number)
    with daemon.client() as bystander:
        stream = bystander.stream(gen(other, ignore_eos=True))
        bystanders = daemon.workers
        told = 0
        while not bystanders or told == 0:
            told += b'"token"' in next(stream)
            bystanders = daemon.workers
        for turn in range(count):
            model = fake_model(f"victim{turn}", tokens=numbered(3000), ms_per_token=1)
            killed_worker(daemon, model, number, bystanders, moments.uniform(0, 0.2))
            for _ in range(20):
                assert b'"token"' in next(stream)
            daemon.done({"op": "unload", "model": str(model)})
    assert daemon.lives
    assert [entry["event"] for entry in daemon.log()].count("crashed") == count


def killed_worker(
    daemon: Daemon, model: Path, number: signal.Signals, bystanders: set[int], moment: float
) -> None:
    """Kills the model's worker in mid-stream; its stream gets the error, and a new worker answers soon."""
    with daemon.client() as client:
        lines = client.stream(gen(model))
        while b'"token"' not in next(lines):
            pass
        (victim,) = daemon.workers - bystanders
        time.sleep(moment)
        os.kill(victim, number)
        *_, last = map(orjson.loads, lines)
    assert last["error"]["code"] == "worker_crashed"
    assert number.name in last["error"]["message"]
    began = time.monotonic()
    assert daemon.done(gen(model, max_tokens=2))["full_text"] == " 0 1"
    assert time.monotonic() - began < 5
    assert victim not in daemon.workers


def test_a_model_that_crashes_three_times_is_refused_with_the_reason(
    daemon: Daemon, fake_model: FakeModel
) -> None:
    model = fake_model(fault={"kind": "segv", "after_tokens": 1})
    sound = fake_model("sound", tokens=numbered(3))
    errors = [daemon.done(gen(model))["error"] for _ in range(4)]
    assert [error["code"] for error in errors] == ["worker_crashed"] * 3 + ["unavailable"]
    assert "died 3 times within 60 s" in errors[-1]["message"]
    assert not daemon.workers, "it was not tried again"
    assert daemon.done({"op": "load", "model": str(model)})["error"]["code"] == "unavailable"
    assert text_of(daemon.ask(gen(sound))) == " 0 1 2"


def test_a_model_that_crashes_while_it_loads_is_refused_too(daemon: Daemon, fake_model: FakeModel) -> None:
    model = fake_model(fault={"kind": "abort", "at": "load", "words": "the reason"})
    errors = [daemon.done(gen(model))["error"] for _ in range(4)]
    assert [error["code"] for error in errors] == ["worker_crashed"] * 3 + ["unavailable"]
    assert "the reason" in errors[0]["message"]
    assert not daemon.workers
