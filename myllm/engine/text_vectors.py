"""An embed request's texts on their way from windows of tokens to vectors, and its events.

Pure, but for numpy. Makes events, sends nothing. Must not know llama.cpp, clocks or batches.
"""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from myllm import events
from myllm.engine import TextWindow
from myllm.engine.window_packer import WaitingWindow
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest


@dataclass(slots=True, eq=False)
class TextVectors:
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
        self._missing = {index: len(windows) for index, windows in enumerate(self.texts)}

    @property
    def due(self) -> float:
        """When its deadline is, on the clock of its arrival."""
        limit = self.request.deadline_ms
        return math.inf if limit is None else self.arrival.at + limit / 1000

    @property
    def finished(self) -> bool:
        return self._left == 0

    def windows(self) -> list[WaitingWindow]:
        """All of its windows, in order."""
        return [
            WaitingWindow(self, item, chunk, window.tokens)
            for item, windows in enumerate(self.texts)
            for chunk, window in enumerate(windows)
        ]

    def take(self, item: int, chunk: int, vector: NDArray[np.float32]) -> list[Message]:
        """A window's vector, shape `(dimensions,)`, as the model made it: its event, or none yet
        where a text's windows become one vector."""
        self._left -= 1
        self.dimensions = len(vector)
        window = self.texts[item][chunk]
        self.n_tokens += len(window.tokens)
        vector = self._finished(vector)
        if self.request.pool == "mean":
            return self._pool(item, vector * np.float32(len(window.tokens)))
        event = self._item(item, chunk, window.start, window.end, len(window.tokens), vector)
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
        windows = self.texts[item]
        n_tokens = sum(len(window.tokens) for window in windows)
        vector = self._finished(self._sums.pop(item) / np.float32(n_tokens))
        return [self._item(item, 0, 0, windows[-1].end, n_tokens, vector)]

    def _finished(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        return normalised(vector) if self.normalizes else vector

    def _item(
        self, item: int, chunk: int, start: int, end: int, tokens: int, vector: NDArray[np.float32]
    ) -> Message:
        encoded = b64encode(vector.astype("<f4").tobytes()).decode()
        event = events.vector(item, chunk, (start, end, tokens), encoded, cached=False)
        return tagged(event, self.arrival.id)

    def closing(self, finish_reason: str | None, now: float) -> Message:
        """The done event; `finish_reason` where it ended before all was done."""
        started = now if self.started is None else self.started
        event = events.embedded(
            self.dimensions,
            self.n_tokens,
            queue_ms=round((started - self.arrival.at) * 1000, 1),
            embed_ms=round((now - started) * 1000, 1),
            finish_reason=finish_reason,
        )
        return tagged(event, self.arrival.id)


def normalised(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """`vector` with norm 1; zeros stay zeros."""
    norm = float(np.linalg.norm(vector))
    return vector / np.float32(norm) if norm else vector
