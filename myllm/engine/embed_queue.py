"""The embed requests of an engine: what waits, batch by batch through an Embedder, and how each ends.

Used by the engine's thread, which decides when a batch is due beside generation. Must not know
llama.cpp: the fake engine's requests go the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, takewhile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from myllm.engine.embedding import Embedding, Packer, TextWindow, Waiting
from myllm.errors import ContextOverflowError, MyllmError
from myllm.events import failed
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest


class Embedder(Protocol):
    """What makes vectors of windows."""

    n_tokens: int
    """Tokens of a batch at most, and so of a window."""
    n_sequences: int
    """Windows of a batch at most."""
    n_ahead: int
    """Batches that are to be begun before one is waited for."""

    def start(self, batches: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Begins to compute batches of windows, by number; returns at once. Raises MyllmError."""

    def result(self) -> tuple[int, NDArray[np.float32] | MyllmError]:
        """The number of a batch that was begun, any of them, and its `(len(windows), dimensions)` vectors
        or what went wrong; blocks."""

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
        self._begun: dict[int, list[Waiting]] = {}
        self._n_batches = 0

    def __bool__(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._packer or self._begun)

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

    def start(self, request: EmbedRequest, texts: list[list[TextWindow]], arrival: Arrival) -> list[Message]:
        """Takes a request in; its error event where it cannot be done."""
        events: list[Message] = []
        try:
            longest = max((len(piece.tokens) for pieces in texts for piece in pieces), default=0)
            if longest > self._window:
                raise ContextOverflowError(
                    f"embed: a window of {longest:,} tokens, the model takes {self._window:,}; "
                    "give a smaller --window"
                )
            if self._embedder is None or longest > self._embedder.n_tokens:
                events += self._let_finish()
                self._embedder = self._open(longest)
                self._packer.n_tokens = self._embedder.n_tokens
                self._packer.n_sequences = self._embedder.n_sequences
        except MyllmError as error:
            return [*events, tagged(failed(error), arrival.id)]
        embedding = Embedding(request, texts, arrival, normalizes=self._normalizes)
        if embedding.finished:
            return [*events, embedding.closing(None, self._clock())]
        self._embeddings[arrival.id] = embedding
        self._packer.add(embedding.windows())
        self.pause(arrival.id, arrival.paused)
        return events

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
        """Begins the next batches, of about `most` tokens and one at a time if that is given, and waits for
        one: the events of its windows. A failure ends whom it held."""
        if self._embedder is None:
            return []
        events = self._begin(self._embedder, most)
        return events + self._take(self._embedder) if self._begun else events

    def _begin(self, embedder: Embedder, most: int | None) -> list[Message]:
        """As many batches as are to be under way; events only of a failure."""
        room = (1 if most else embedder.n_ahead) - len(self._begun)
        batches = list(takewhile(bool, (self._packer.next_batch(most) for _ in range(room))))
        started = self._clock()
        for window in chain.from_iterable(batches):
            if window.embedding.started is None:
                window.embedding.started = started
        numbered = dict(enumerate(batches, self._n_batches))
        self._n_batches += len(batches)
        try:
            embedder.start({n: [window.tokens for window in batch] for n, batch in numbered.items()})
        except MyllmError as error:
            return self._fail([window.embedding for window in chain.from_iterable(batches)], error)
        self._begun |= numbered
        return []

    def _take(self, embedder: Embedder) -> list[Message]:
        """The events of one batch, as soon as it is done. Of requests that ended meanwhile there are none."""
        number, vectors = embedder.result()
        windows = self._begun.pop(number)
        if isinstance(vectors, MyllmError):
            return self._fail([window.embedding for window in windows], vectors)
        events: list[Message] = []
        for window, vector in zip(windows, vectors, strict=True):
            embedding = window.embedding
            if self._embeddings.get(embedding.id) is not embedding:
                continue
            events += embedding.take(window.item, window.chunk, vector)
            if embedding.finished:
                del self._embeddings[embedding.id]
                events.append(embedding.closing(None, self._clock()))
        return events

    def fail_all(self, error: MyllmError) -> list[Message]:
        """Ends all with `error`."""
        return self._fail(list(self._embeddings.values()), error)

    def _fail(self, embeddings: Iterable[Embedding], error: MyllmError) -> list[Message]:
        events = []
        for embedding in embeddings:
            if self._embeddings.get(embedding.id) is embedding:
                del self._embeddings[embedding.id]
                self._forget(embedding)
                events.append(tagged(failed(error), embedding.id))
        return events

    def _forget(self, embedding: Embedding) -> None:
        self._packer.drop(embedding)
        self._held.pop(embedding, None)

    def _let_finish(self) -> list[Message]:
        """The events of what is under way, for which this waits; then there is no embedder any more."""
        events: list[Message] = []
        while self._embedder and self._begun:
            events += self._take(self._embedder)
        self.close()
        return events

    def close(self) -> None:
        """Waits for what is under way, of which nobody hears any more."""
        if self._embedder:
            self._embedder.close()
            self._embedder = None
