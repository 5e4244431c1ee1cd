"""Embed requests whose batches are computed ahead, by a scripted embedder."""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from myllm.engine import TextWindow
from myllm.engine.embeds_in_flight import EmbedsInFlight
from myllm.errors import InternalError, MyllmError, UnavailableError
from myllm.protocol import Message
from myllm.requests import Arrival, EmbedRequest

Windows = Sequence[Sequence[int]]


class Scripted:
    """A window a batch, three of them under way; a window's vector is `[its first token, 1]`."""

    n_sequences = 1
    n_ahead = 3

    def __init__(self, window: int) -> None:
        self.n_tokens = window
        self.under_way: dict[int, Windows] = {}
        self.failing: set[int] = set()
        """First tokens of windows that cannot be computed."""
        self.refusal: MyllmError | None = None
        """What is raised where the next batches are to be begun."""
        self.next = -1
        """Which of the batches under way is done first: the last that was begun."""
        self.closed = False

    def start(self, batches: Mapping[int, Windows]) -> None:
        refusal, self.refusal = self.refusal, None
        if refusal:
            raise refusal
        self.under_way |= batches

    def result(self) -> tuple[int, NDArray[np.float32] | MyllmError]:
        number = list(self.under_way)[self.next]
        windows = self.under_way.pop(number)
        if any(window[0] in self.failing for window in windows):
            return number, InternalError("no vectors")
        return number, np.array([[window[0], 1] for window in windows], np.float32)

    def close(self) -> None:
        assert not self.under_way, "somebody still waits for these"
        self.closed = True


class Queue(EmbedsInFlight):
    """A queue, and the embedders that it opened."""

    def __init__(self) -> None:
        self.opened: list[Scripted] = []
        runner: Any = SimpleNamespace(open_embedder=self._scripted, embed_window=512, normalizes=False)
        super().__init__(runner, time.monotonic)

    def ask(self, request_id: int, *firsts: int, n_tokens: int = 8) -> list[Message]:
        """A request of texts of one window each, told by its first token."""
        texts = [[TextWindow(0, 1, [first] * n_tokens)] for first in firsts]
        return self.start(EmbedRequest(texts=["x"] * len(firsts)), texts, Arrival(request_id, 0.0))

    def run(self) -> list[Message]:
        """All events up to the last batch's end."""
        events = []
        while self:
            events += self.step()
        return events

    def _scripted(self, window: int) -> Scripted:
        self.opened.append(Scripted(window))
        return self.opened[-1]


def of(events: list[Message], request_id: int) -> list[Any]:
    """What a request was told: its items' first tokens in the order of items, then its ends."""
    mine = [event for event in events if event["id"] == request_id]
    items = sorted((e["item"], int(first_number(e))) for e in mine if "item" in e)
    ends = [e.get("finish_reason") or e.get("error", {}).get("code") for e in mine if e.get("done")]
    return [*(number for _, number in items), *ends]


def first_number(event: Message) -> float:
    return float(np.frombuffer(b64decode(event["embedding"]), "<f4")[0])


def test_as_many_batches_are_under_way_as_the_embedder_takes_and_one_beside_generation() -> None:
    queue = Queue()
    queue.ask(1, *range(10))
    queue.step()
    assert len(queue.opened[0].under_way) == Scripted.n_ahead - 1, "one of them was waited for"
    queue.run()
    queue.ask(2, *range(10))
    queue.step(128)
    assert not queue.opened[0].under_way


def test_a_request_that_ends_while_its_batches_are_under_way_hears_no_more() -> None:
    queue = Queue()
    queue.ask(1, 10, 11, 12)
    assert of(queue.step(), 1) == [12]
    assert of(queue.end(1, "cancelled"), 1) == ["cancelled"]
    assert len(queue.opened[0].under_way) == 2
    queue.ask(2, 20, 21)
    events = queue.run()
    assert of(events, 1) == []
    assert of(events, 2) == [20, 21, None]


def test_a_later_request_of_the_same_number_gets_only_its_own_vectors() -> None:
    queue = Queue()
    queue.ask(1, 10, 11, 12)
    queue.step()
    queue.end(1, "cancelled")
    queue.opened[0].next = 0
    queue.ask(1, 20, 21)
    assert of(queue.run(), 1) == [20, 21, None]


def test_a_longer_window_waits_for_what_is_under_way_and_nothing_is_lost_or_told_twice() -> None:
    queue = Queue()
    queue.ask(1, *range(10, 16))
    events = queue.step()
    events += (meanwhile := queue.ask(2, 20, n_tokens=100))
    assert of(meanwhile, 1) == [10, 11], "the two that were under way"
    assert [(one.n_tokens, one.closed) for one in queue.opened] == [(8, True), (100, False)]
    events += queue.run()
    assert of(events, 1) == [*range(10, 16), None]
    assert of(events, 2) == [20, None]


def test_a_batch_that_fails_ends_whom_it_held_and_nobody_else() -> None:
    queue = Queue()
    queue.ask(1, 10, 11, 12, 13)
    queue.ask(2, 20, 21)
    queue.opened[0].failing = {11}
    queue.opened[0].next = 0
    events = queue.run()
    assert of(events, 1) == [10, "internal"], "though 12 had been begun"
    assert of(events, 2) == [20, 21, None]


def test_batches_that_cannot_be_begun_end_whom_they_held_and_the_next_goes_on() -> None:
    queue = Queue()
    queue.ask(1, 10, 11, 12, 13)
    queue.opened[0].refusal = UnavailableError("no memory")
    assert of(queue.step(), 1) == ["unavailable"]
    assert not queue, "what it still wanted goes with it"
    queue.ask(2, 20)
    assert of(queue.run(), 2) == [20, None]


@pytest.mark.parametrize("later", [False, True], ids=["nobody", "a later request"])
def test_a_failure_of_what_was_cancelled_is_nobody_s(later: bool) -> None:
    queue = Queue()
    queue.ask(1, 10, 11, 12)
    queue.step()
    queue.end(1, "cancelled")
    queue.opened[0].failing = {10, 11}
    queue.opened[0].next = 0
    if later:
        queue.ask(1, 20, 21)
    assert of(queue.run(), 1) == ([20, 21, None] if later else [])
