"""The embed requests of an engine: what waits, batch by batch through an Embedder, and how each ends.

Used by the engine's thread, which decides when a batch is due beside generation. Must not know
llama.cpp: the fake engine's requests go the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, takewhile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from myllm.engine.embedding import Embedding, Packer, Piece, Waiting
from myllm.errors import ContextOverflowError, MyllmError
from myllm.protocol import Message, error_event, tagged
from myllm.requests import EmbedRequest


class Embedder(Protocol):
    """What makes vectors of windows."""

    n_tokens: int
    """Tokens of a batch at most, and so of a window."""
    n_sequences: int
    """Windows of a batch at most."""
    n_batches: int
    """Batches that are computed side by side at most."""

    def embed(self, batches: Sequence[Sequence[Sequence[int]]]) -> list[NDArray[np.float32]]:
        """For each batch of windows, `(len(windows), dimensions)` vectors; blocks. Raises MyllmError."""

    def close(self) -> None: ...


class EmbedQueue:
    """Embeddings in flight; `open_embedder` makes their context, for windows of so many tokens, when
    the first one comes, and again when one is longer. Their vectors have norm 1 if the model `normalizes`."""

    def __init__(
        self,
        open_embedder: Callable[[int], Embedder],
        window: int,
        clock: Callable[[], float],
        *,
        normalizes: bool = True,
    ) -> None:
        self._open, self._window, self._clock = open_embedder, window, clock
        self._normalizes = normalizes
        self._embedder: Embedder | None = None
        self._packer = Packer()
        self._embeddings: dict[int, Embedding] = {}
        self._held: dict[Embedding, list[Waiting]] = {}
        """What is left of the paused ones."""

    def __bool__(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._packer)

    @property
    def due(self) -> float:
        """When the first deadline is."""
        return min((embedding.due for embedding in self._embeddings.values()), default=math.inf)

    def counts(self) -> tuple[int, int, int]:
        """How many requests have been in a batch, wait for their first, and are paused. Thread-safe."""
        embeddings = tuple(self._embeddings.values())
        paused = sum(e.paused for e in embeddings)
        waiting = sum(e.started is None and not e.paused for e in embeddings)
        return len(embeddings) - paused - waiting, waiting, paused

    def start(
        self, request: EmbedRequest, texts: list[list[Piece]], arrived: float, *, paused: bool
    ) -> list[Message]:
        """Takes a request in whose `id` is set; its error event where it cannot be done."""
        try:
            longest = max((len(piece.tokens) for pieces in texts for piece in pieces), default=0)
            if longest > self._window:
                raise ContextOverflowError(
                    f"embed: a window of {longest:,} tokens, the model takes {self._window:,}; "
                    "give a smaller --window"
                )
            if self._embedder is None or longest > self._embedder.n_tokens:
                self.close()
                self._embedder = self._open(longest)
                self._packer.n_tokens = self._embedder.n_tokens
                self._packer.n_sequences = self._embedder.n_sequences
        except MyllmError as error:
            return [tagged(error_event(error), request.id)]
        embedding = Embedding(request, texts, arrived, normalizes=self._normalizes)
        if embedding.finished:
            return [embedding.closing(None, self._clock())]
        self._embeddings[request.id or 0] = embedding
        self._packer.add(embedding.windows())
        self.pause(request.id or 0, paused)
        return []

    def pause(self, request_id: int, paused: bool) -> None:
        """No window of it is computed until it goes on; an unknown id is no error."""
        embedding = self._embeddings.get(request_id)
        if embedding is None or embedding.paused == paused:
            return
        embedding.paused = paused
        if paused:
            self._held[embedding] = self._packer.drop(embedding)
        else:
            self._packer.add(self._held.pop(embedding))

    def end(self, request_id: int, reason: str) -> list[Message]:
        """Ends a request early, `cancelled` or `deadline`; an unknown id is no error."""
        embedding = self._embeddings.pop(request_id, None)
        if embedding is None:
            return []
        self._forget(embedding)
        return [embedding.closing(reason, self._clock())]

    def expire(self) -> list[Message]:
        """Ends the requests whose deadline has passed."""
        now = self._clock()
        late = [request_id for request_id, e in self._embeddings.items() if now >= e.due]
        return [event for request_id in late for event in self.end(request_id, "deadline")]

    def step(self, most: int | None = None) -> list[Message]:
        """As many batches as are computed side by side, or one of about `most` tokens: the events of
        their windows. A failure ends whom they held."""
        if self._embedder is None:
            return []
        n_batches = 1 if most else self._embedder.n_batches
        batches = list(takewhile(bool, (self._packer.next_batch(most) for _ in range(n_batches))))
        if not batches:
            return []
        windows = list(chain.from_iterable(batches))
        started = self._clock()
        for window in windows:
            if window.embedding.started is None:
                window.embedding.started = started
        try:
            vectors = self._embedder.embed([[window.tokens for window in batch] for batch in batches])
        except MyllmError as error:
            return self._fail([window.embedding for window in windows], error)
        events: list[Message] = []
        for window, vector in zip(windows, chain.from_iterable(vectors), strict=True):
            events += window.embedding.take(window.item, window.chunk, vector)
            if window.embedding.finished:
                self._embeddings.pop(window.embedding.request.id or 0, None)
                events.append(window.embedding.closing(None, self._clock()))
        return events

    def fail_all(self, error: MyllmError) -> list[Message]:
        """Ends all with `error`."""
        return self._fail(list(self._embeddings.values()), error)

    def _fail(self, embeddings: Iterable[Embedding], error: MyllmError) -> list[Message]:
        events = []
        for embedding in embeddings:
            if self._embeddings.pop(embedding.request.id or 0, None):
                self._forget(embedding)
                events.append(tagged(error_event(error), embedding.request.id))
        return events

    def _forget(self, embedding: Embedding) -> None:
        self._packer.drop(embedding)
        self._held.pop(embedding, None)

    def close(self) -> None:
        if self._embedder:
            self._embedder.close()
            self._embedder = None
