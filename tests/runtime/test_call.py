"""A call's promise: exactly one done event, and none once nobody wants it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import orjson
import pytest

from myllm.errors import UnavailableError
from myllm.protocol import Message
from myllm.runtime.call import Call

DONE: Message = {"done": True, "full_text": "a"}


@pytest.fixture
def lines() -> list[bytes]:
    return []


@pytest.fixture
def call(lines: list[bytes]) -> Call:
    return Call(7, lines.append, lambda call: None)


def test_the_first_done_event_is_the_last(call: Call, lines: list[bytes]) -> None:
    ended: list[Call] = []
    call.when_over(ended.append)
    call.finish(dict(DONE))
    call.fail(UnavailableError("too late"))
    call.send({"loading": 0.5})
    assert [orjson.loads(line) for line in lines] == [{"id": 7, **DONE}]
    assert ended == [call]


def test_what_is_rescued_goes_on_and_ends_once(call: Call, lines: list[bytes]) -> None:
    asked: list[Message] = []

    def rescue(event: Message) -> bool:
        asked.append(event)
        return len(asked) == 1

    call.rescue = rescue
    call.fail(UnavailableError("at first"))
    assert not call.over
    call.finish(dict(DONE))
    assert [orjson.loads(line)["full_text"] for line in lines] == ["a"]
    assert len(asked) == 2


def test_a_call_that_nobody_waits_for_is_not_rescued(call: Call) -> None:
    asked: list[Message] = []
    call.rescue = lambda event: bool(asked.append(event)) or True
    call.abandon()
    call.fail(UnavailableError("nobody listens"))
    assert asked == []


class Through:
    """A carrier that knows its call."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def cancel(self, call: Call) -> None:
        assert call is self._call

    def pause(self, call: Call) -> None:
        raise AssertionError


@pytest.mark.parametrize("end", [Call.abandon, lambda call: call.finish(dict(DONE))], ids=["gone", "done"])
def test_what_is_over_is_freed_at_once_with_all_that_was_asked(end: Callable[[Call], None]) -> None:
    call = Call(7, lambda line: None, lambda call: None)
    call.rescue = partial(lambda call, event: False, call)
    call.carrier = Through(call)
    gone = weakref.ref(call)
    gc.disable()
    try:
        end(call)
        del call
        assert gone() is None
    finally:
        gc.enable()
