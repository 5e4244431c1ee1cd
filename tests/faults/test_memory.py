"""Models under a memory limit: the least recently used goes, its work done first, and its memory is free."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from .conftest import Launch
from .rig import Daemon, Event, gen, memory, numbered, until

FakeModel = Callable[..., Path]
MEGABYTE = 2**20
SIZE = 100 * MEGABYTE
LIMIT = {"MYLLM_MODELS_MAX_MEMORY": "250M"}
"""Room for two models of that size."""


def loaded(daemon: Daemon, model: Path, **wishes: object) -> Event:
    """Loads a model; the last event."""
    return daemon.done({"op": "load", "model": str(model), **wishes})


def taken(daemon: Daemon) -> int:
    """Bytes of the daemon and its workers."""
    return memory(daemon.pid, *daemon.workers)


def test_the_least_recently_used_goes_and_its_memory_really_returns(
    launch: Launch, fake_model: FakeModel
) -> None:
    daemon = launch(**LIMIT)
    first, second, third = (fake_model(name, memory_bytes=SIZE) for name in ("first", "second", "third"))
    before = taken(daemon)
    for model in (first, second):
        assert loaded(daemon, model)["loaded"]["state"] == "ready"
    assert taken(daemon) - before > 2 * SIZE
    daemon.done(gen(first))  # so that the second is the one used longest ago
    victim = daemon.models()["second"]["pid"]
    assert loaded(daemon, third)["loaded"]["memory_bytes"] > SIZE
    assert not os.path.lexists(f"/proc/{victim}")
    assert set(daemon.models()) == {"first", "third"}
    assert taken(daemon) - before < 2 * SIZE + 60 * MEGABYTE
    daemon.done({"op": "unload", "all": True})
    until(lambda: not daemon.workers, 2)
    assert taken(daemon) - before < 10 * MEGABYTE
    reasons = [entry["reason"] for entry in daemon.log() if entry["event"] == "unloaded"]
    assert reasons[0] == "memory"


def test_its_running_requests_have_finished_before(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(**LIMIT)
    slow = {"tokens": numbered(150), "ms_per_token": 10, "memory_bytes": SIZE}
    first, second = fake_model("first", **slow), fake_model("second", **slow)
    third = fake_model("third", memory_bytes=SIZE, tokens=["here"])
    with ExitStack() as stack:
        running = []
        for model in (first, second):
            running.append(stack.enter_context(daemon.client()).stream(gen(model)))
            while b'"token"' not in next(running[-1]):
                pass
        victim = daemon.models()["first"]["pid"]
        newcomer = threading.Thread(target=daemon.done, args=[gen(third)])
        began = time.monotonic()
        newcomer.start()
        *_, last = map(orjson.loads, running[0])
        assert last["full_text"] == "".join(numbered(150))
        newcomer.join()
        assert time.monotonic() - began > 0.3, "it waited"
        assert not os.path.lexists(f"/proc/{victim}")
        assert "first" not in daemon.models()
        *_, last = map(orjson.loads, running[1])
        assert last["full_text"] == "".join(numbered(150))


def test_a_newcomer_gets_its_turn_though_the_others_never_rest(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(MYLLM_MODELS_MAX_MEMORY="150M")
    busy = fake_model("busy", tokens=numbered(20), ms_per_token=10, memory_bytes=SIZE)
    other = fake_model("other", tokens=["here"], memory_bytes=SIZE)
    enough = threading.Event()
    ends: list[Event] = []

    def ask_and_ask() -> None:
        while not enough.is_set():
            ends.append(daemon.done(gen(busy)))

    askers = [threading.Thread(target=ask_and_ask) for _ in range(3)]
    for number, asker in enumerate(askers):
        asker.start()
        time.sleep(0.07 * (number == 0))
    until(lambda: ends)
    try:
        assert daemon.done(gen(other, deadline_ms=5000)).get("full_text") == "here"
    finally:
        enough.set()
        for asker in askers:
            asker.join()
    assert {end.get("finish_reason") for end in ends} == {"stop"}


def test_two_cold_models_that_do_not_fit_together_are_served_one_after_the_other(
    launch: Launch, fake_model: FakeModel
) -> None:
    daemon = launch(MYLLM_MODELS_MAX_MEMORY="150M")
    models = [fake_model(f"model{n}", tokens=[f"{n}"], load_ms=200, memory_bytes=SIZE) for n in range(4)]
    ends: list[Event] = []
    askers = [threading.Thread(target=lambda m=m: ends.append(daemon.done(gen(m)))) for m in models * 2]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert sorted(str(end.get("error", end.get("full_text"))) for end in ends) == list("00112233")


def test_a_load_that_fails_is_no_crash(daemon: Daemon, fake_model: FakeModel) -> None:
    model = fake_model(fault={"kind": "error", "at": "load"})
    errors = [daemon.done(gen(model))["error"] for _ in range(5)]
    assert {error["code"] for error in errors} == {"bad_data"}
    assert "crashed" not in [entry["event"] for entry in daemon.log()]


def test_an_unloaded_model_is_gone_when_that_is_said(daemon: Daemon, fake_model: FakeModel) -> None:
    model = fake_model(memory_bytes=SIZE)
    loaded(daemon, model, pin=True)
    (worker,) = daemon.workers
    assert daemon.done({"op": "unload", "model": str(model)})["unloaded"] == [str(model)]
    assert not os.path.lexists(f"/proc/{worker}")
    assert daemon.models() == {}


def test_a_pinned_model_stays(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(**LIMIT)
    pinned, other, third = (fake_model(name, memory_bytes=SIZE) for name in ("pinned", "other", "third"))
    loaded(daemon, pinned, pin=True)
    loaded(daemon, other)
    loaded(daemon, third)
    assert set(daemon.models()) == {"pinned", "third"}
    loaded(daemon, third, pin=True)
    refusal = loaded(daemon, other)
    assert refusal["error"]["code"] == "unavailable"
    assert "pinned, " in refusal["error"]["message"] or "pinned.fake" in refusal["error"]["message"]
    assert set(daemon.models()) == {"pinned", "third"}


def test_a_model_over_the_limit_is_refused_and_not_tried(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(**LIMIT)
    other, large = fake_model("other", memory_bytes=SIZE), fake_model("large", memory_bytes=3 * SIZE)
    loaded(daemon, other)
    before = daemon.workers
    for refusal in (daemon.ask(gen(large)), daemon.ask({"op": "load", "model": str(large)})):
        (last,) = refusal
        assert last["error"]["code"] == "unavailable"
        assert "models.max_memory is 262 MB" in last["error"]["message"]
    assert daemon.workers == before
    assert set(daemon.models()) == {"other"}, "nobody went in vain"


def test_a_model_that_was_refused_is_taken_once_there_is_room(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(**LIMIT)
    pinned, large = fake_model("pinned", memory_bytes=SIZE), fake_model("large", memory_bytes=2 * SIZE)
    loaded(daemon, pinned, pin=True)
    assert loaded(daemon, large)["error"]["code"] == "unavailable"
    loaded(daemon, pinned, pin=False)
    assert loaded(daemon, large)["loaded"]["state"] == "ready"


def test_several_who_want_a_cold_model_share_one_load(daemon: Daemon, fake_model: FakeModel) -> None:
    model = fake_model(load_ms=500)
    answers: list[list[Event]] = []
    askers = [threading.Thread(target=lambda: answers.append(daemon.ask(gen(model)))) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [answer[-1]["full_text"] for answer in answers] == ["a b c"] * 8
    assert all("loading" in answer[0] for answer in answers)
    assert [entry["event"] for entry in daemon.log()].count("loaded") == 1


@pytest.mark.parametrize("keep_alive", ["0", "5ms"])
def test_no_request_meets_a_worker_that_is_just_let_go(
    launch: Launch, fake_model: FakeModel, keep_alive: str
) -> None:
    daemon = launch(MYLLM_KEEP_ALIVE=keep_alive)
    model = fake_model()
    ends: list[Event] = []

    def ask_and_ask() -> None:
        with daemon.client() as client:
            ends.extend(orjson.loads(list(client.stream(gen(model)))[-1]) for _ in range(15))

    askers = [threading.Thread(target=ask_and_ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [end.get("error", end.get("full_text")) for end in ends] == ["a b c"] * 60
