"""A call's promise: exactly one done event, and none once nobody wants it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from myllm import events
from myllm.errors import ContextOverflowError, UnavailableError
from myllm.protocol import Message
from myllm.runtime.call import Call
from myllm.runtime.reply import Completed, Reply, Retried

DONE: Message = {"done": True, "full_text": "a"}


class Heard:
    """An asker's end that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Message] = []

    def event(self, event: Message) -> None:
        self.events.append(event)

    def line(self, line: bytes, start: int) -> None:
        self.events.append({"line": line[start:]})

    def done(self, event: Message) -> None:
        self.events.append(event)


class Backend:
    """Keeps what it is told of the one request it has."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.reply: Reply | None = None

    def submit(self, message: Message, client: int, reply: Reply) -> None:
        self.reply = reply
        self.told.append((message, client))

    def cancel(self, reply: Reply) -> None:
        assert reply is self.reply
        self.told.append("cancel")

    def pause(self, reply: Reply, paused: bool) -> None:
        assert reply is self.reply
        self.told.append(("pause", paused))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def call(heard: Heard) -> Call:
    return Call(heard, lambda call: None, client=3)


def test_the_first_done_event_is_the_last(call: Call, heard: Heard) -> None:
    ended: list[Call] = []
    call.when_over(ended.append)
    call.done(dict(DONE))
    call.fail(UnavailableError("too late"))
    call.event({"loading": 0.5})
    call.line(b'{"token":"a"}', 1)
    assert heard.events == [DONE]
    assert ended == [call]


def test_what_is_tried_again_goes_on_and_ends_once(call: Call, heard: Heard) -> None:
    tries: list[bool] = []

    def again() -> bool:
        tries.append(True)
        return len(tries) == 1

    overflow = events.failed(ContextOverflowError("too long"))
    reply = Retried(call, again)
    reply.done(events.failed(UnavailableError("something else")) | {"passed": "on"})
    assert tries == []
    assert call.over

    call = Call(heard, lambda call: None)
    reply = Retried(call, again)
    reply.done(overflow)
    assert not call.over
    reply.done(overflow)
    assert len(tries) == 2
    assert heard.events[1:] == [overflow]


def test_the_runtime_adds_what_only_it_knows(call: Call, heard: Heard) -> None:
    Completed(call, "smollm2", 12.34).done({"done": True, "full_text": "a", "timings": {"queue_ms": 1.0}})
    (event,) = heard.events
    assert list(event) == ["done", "full_text", "model", "timings"]
    assert event["timings"] == {"queue_ms": 1.0, "load_ms": 12.3}


def test_a_backend_is_told_what_becomes_of_the_call_it_carries(call: Call) -> None:
    backend: Any = Backend()
    call.pause(True)
    call.carry(backend, {"op": "gen"}, Completed(call, "m", 0))
    call.pause(False)
    call.abandon()
    assert backend.told == [({"op": "gen"}, 3), ("pause", True), ("pause", False), "cancel"]
    backend.reply.done(dict(DONE))  # nobody wants it any more


@pytest.mark.parametrize("end", [Call.abandon, lambda call: call.done(dict(DONE))], ids=["gone", "done"])
def test_what_is_over_is_freed_at_once_with_all_that_was_asked(end: Callable[[Call], None]) -> None:
    call = Call(Heard(), lambda call: None)
    backend: Any = Backend()
    call.carry(backend, {"op": "gen"}, Retried(call, partial(bool, call)))
    backend.reply = None
    gone = weakref.ref(call)
    gc.disable()
    try:
        backend.cancel = lambda reply: None
        end(call)
        del call
        assert gone() is None
    finally:
        gc.enable()
