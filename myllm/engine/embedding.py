"""An embedding: one request's way from windows of tokens to vectors; and which windows share a batch.

Pure, but for numpy. Makes events, sends nothing. Must not know llama.cpp, clocks or texts.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from myllm.events import embedded
from myllm.events import vector as vector_event
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest


class TextWindow(NamedTuple):
    """A window of a text: `start` and `end` in characters, `tokens` as the model takes them, not empty."""

    start: int
    end: int
    tokens: list[int]


@dataclass(slots=True, eq=False)
class Embedding:
    """A request and its `texts`, each in windows; a text without any was answered before. Its vectors
    have norm 1, or are what the model made where it does not want them normalised."""

    request: EmbedRequest
    texts: list[list[TextWindow]]
    arrival: Arrival
    normalizes: bool = True
    paused: bool = False
    started: float | None = None
    n_tokens: int = 0
    dimensions: int = 0
    _left: int = 0
    _held: dict[int, dict[int, Message]] = field(default_factory=dict)
    """Events of a text that are ahead of an earlier window's, by item and chunk."""
    _next: dict[int, int] = field(default_factory=dict)
    _sums: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _missing: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._left = sum(map(len, self.texts))
        self._missing = {index: len(pieces) for index, pieces in enumerate(self.texts)}

    @property
    def due(self) -> float:
        """When its deadline is, on the clock of its arrival."""
        limit = self.request.deadline_ms
        return math.inf if limit is None else self.arrival.at + limit / 1000

    @property
    def id(self) -> int:
        """Its request's number in the worker."""
        return self.arrival.id

    @property
    def share(self) -> tuple[int, int]:
        """Priority and client: of equal ones, the windows go in turn."""
        return self.request.priority, self.arrival.client

    @property
    def finished(self) -> bool:
        return self._left == 0

    def windows(self) -> list[Waiting]:
        """All of its windows, in order."""
        return [
            Waiting(self, item, chunk, piece.tokens)
            for item, pieces in enumerate(self.texts)
            for chunk, piece in enumerate(pieces)
        ]

    def take(self, item: int, chunk: int, vector: NDArray[np.float32]) -> list[Message]:
        """A window's vector, shape `(dimensions,)`, as the model made it: its event, or none yet
        where a text's windows become one vector."""
        self._left -= 1
        self.dimensions = len(vector)
        piece = self.texts[item][chunk]
        self.n_tokens += len(piece.tokens)
        vector = self._finished(vector)
        if self.request.pool == "mean":
            return self._pool(item, vector * np.float32(len(piece.tokens)))
        event = self._item(item, chunk, piece.start, piece.end, len(piece.tokens), vector)
        return self._in_order(item, chunk, event)

    def _in_order(self, item: int, chunk: int, event: Message) -> list[Message]:
        """The events of a text that may go out now: its windows come in order."""
        held = self._held.setdefault(item, {})
        held[chunk] = event
        events = []
        while (ready := held.pop(self._next.get(item, 0), None)) is not None:
            self._next[item] = self._next.get(item, 0) + 1
            events.append(ready)
        return events

    def _pool(self, item: int, weighted: NDArray[np.float32]) -> list[Message]:
        self._sums[item] = self._sums.get(item, np.float32(0)) + weighted
        self._missing[item] -= 1
        if self._missing[item]:
            return []
        pieces = self.texts[item]
        n_tokens = sum(len(piece.tokens) for piece in pieces)
        vector = self._finished(self._sums.pop(item) / np.float32(n_tokens))
        return [self._item(item, 0, 0, pieces[-1].end, n_tokens, vector)]

    def _finished(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        return normalised(vector) if self.normalizes else vector

    def _item(
        self, item: int, chunk: int, start: int, end: int, tokens: int, vector: NDArray[np.float32]
    ) -> Message:
        encoded = b64encode(vector.astype("<f4").tobytes()).decode()
        return tagged(vector_event(item, chunk, (start, end, tokens), encoded, cached=False), self.id)

    def closing(self, finish_reason: str | None, now: float) -> Message:
        """The done event; `finish_reason` where it ended before all was done."""
        started = now if self.started is None else self.started
        event = embedded(
            self.dimensions,
            self.n_tokens,
            queue_ms=round((started - self.arrival.at) * 1000, 1),
            embed_ms=round((now - started) * 1000, 1),
            finish_reason=finish_reason,
        )
        return tagged(event, self.id)


class Waiting(NamedTuple):
    """A window that has no vector yet; `turn` says when it is due, among those as urgent."""

    embedding: Embedding
    item: int
    chunk: int
    tokens: list[int]
    turn: int = 0


class Packer:
    """Windows that wait, the urgent first, in batches as full as a look ahead makes them.

    Clients share the batches evenly: a window's turn comes when its client's windows before it, as urgent,
    are paid for in tokens, counted from where the queue stood when they came (start-time fair queueing:
    Goyal, Vin and Cheng, 1996).
    """

    LOOK_AHEAD = 64
    """Windows behind the first that may go before it, to fill a batch that has no room for it."""

    def __init__(self, n_tokens: int = 0, n_sequences: int = 0) -> None:
        self.n_tokens, self.n_sequences = n_tokens, n_sequences
        self._waiting: deque[Waiting] = deque()
        self._now: dict[int, int] = {}
        """By priority, the turn of the last batch's first window."""
        self._next: dict[tuple[int, int], int] = {}
        """By priority and client, the turn of its next window."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, windows: Sequence[Waiting]) -> None:
        """Behind those of the same client that came before and are as urgent."""
        if not self._waiting:  # all are even
            self._now, self._next = {}, {}
        waiting = [*self._waiting, *map(self._with_turn, windows)]
        self._waiting = deque(sorted(waiting, key=lambda w: (w.embedding.request.priority, w.turn)))

    def _with_turn(self, window: Waiting) -> Waiting:
        priority, _ = key = window.embedding.share
        turn = max(self._next.get(key, 0), self._now.get(priority, 0))
        self._next[key] = turn + len(window.tokens)
        return window._replace(turn=turn)

    def drop(self, embedding: Embedding) -> list[Waiting]:
        """Takes out what is left of a request, which its client has not had; it may be added again."""
        left = [w for w in self._waiting if w.embedding is embedding]
        self._waiting = deque(w for w in self._waiting if w.embedding is not embedding)
        if left:
            self._next[embedding.share] -= sum(len(window.tokens) for window in left)
        return left

    def next_batch(self, most: int | None = None) -> list[Waiting]:
        """The windows of the next batch; the oldest is always one of them, whatever its length.

        Within `most` tokens, or the batch's size, and its number of sequences.
        """
        room = min(self.n_tokens, most or self.n_tokens)
        batch: list[Waiting] = []
        passed: list[Waiting] = []
        while self._waiting and len(batch) < self.n_sequences and len(passed) < self.LOOK_AHEAD and room > 0:
            window = self._waiting.popleft()
            if batch and len(window.tokens) > room:
                passed.append(window)
                continue
            if not batch:
                self._now[window.embedding.request.priority] = window.turn
            batch.append(window)
            room -= len(window.tokens)
        self._waiting.extendleft(reversed(passed))
        return batch


def normalised(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """`vector` with norm 1; zeros stay zeros."""
    norm = float(np.linalg.norm(vector))
    return vector / np.float32(norm) if norm else vector
