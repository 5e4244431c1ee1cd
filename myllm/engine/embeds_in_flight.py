"""The embed requests in flight: what waits, batch by batch through an Embedder, and how each ends.

Used by the engine's thread, which decides when a batch is due beside generation. Must not know llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain, takewhile

from myllm.engine import TextWindow
from myllm.engine.runner import Embedder, Runner
from myllm.engine.text_vectors import TextVectors
from myllm.engine.window_packer import WaitingWindow, WindowPacker
from myllm.errors import ContextOverflowError, MyllmError
from myllm.events import failed
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest


class EmbedsInFlight:
    """Embed requests on their way; the runner opens their embedder, for windows of so many tokens, when the
    first one comes, and again when one is longer.
    """

    def __init__(self, runner: Runner, clock: Callable[[], float]) -> None:
        self._runner, self._clock = runner, clock
        self._embedder: Embedder | None = None
        self._packer = WindowPacker()
        self._requests: dict[int, TextVectors] = {}
        self._held: dict[TextVectors, list[WaitingWindow]] = {}
        """What is left of the paused ones."""
        self._begun: dict[int, list[WaitingWindow]] = {}
        self._n_batches = 0

    def __bool__(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._packer or self._begun)

    @property
    def due(self) -> float:
        """When the first deadline is."""
        return min((asked.due for asked in self._requests.values()), default=math.inf)

    def counts(self) -> tuple[int, int, int]:
        """How many requests have been in a batch, wait for their first, and are paused. Thread-safe."""
        requests = tuple(self._requests.values())
        paused = sum(e.paused for e in requests)
        waiting = sum(e.started is None and not e.paused for e in requests)
        return len(requests) - paused - waiting, waiting, paused

    def start(self, request: EmbedRequest, texts: list[list[TextWindow]], arrival: Arrival) -> list[Message]:
        """Takes a request in; its error event where it cannot be done."""
        events: list[Message] = []
        try:
            longest = max((len(window.tokens) for windows in texts for window in windows), default=0)
            if longest > self._runner.embed_window:
                raise ContextOverflowError(
                    f"embed: a window of {longest:,} tokens, the model takes {self._runner.embed_window:,}; "
                    "give a smaller --window"
                )
            if self._embedder is None or longest > self._embedder.n_tokens:
                events += self._let_finish()
                self._embedder = self._runner.open_embedder(longest)
                self._packer.n_tokens = self._embedder.n_tokens
                self._packer.n_sequences = self._embedder.n_sequences
        except MyllmError as error:
            return [*events, tagged(failed(error), arrival.id)]
        asked = TextVectors(request, texts, arrival, normalizes=self._runner.normalizes)
        if asked.finished:
            return [*events, asked.closing(None, self._clock())]
        self._requests[arrival.id] = asked
        self._packer.add(asked.windows())
        self.pause(arrival.id, arrival.paused)
        return events

    def pause(self, request_id: int, paused: bool) -> None:
        """No window of it is computed until it goes on; an unknown id is no error."""
        asked = self._requests.get(request_id)
        if asked is None or asked.paused == paused:
            return
        asked.paused = paused
        if paused:
            self._held[asked] = self._packer.drop(asked)
        else:
            self._packer.add(self._held.pop(asked))

    def end(self, request_id: int, reason: str) -> list[Message]:
        """Ends a request early, `cancelled` or `deadline`; an unknown id is no error."""
        asked = self._requests.pop(request_id, None)
        if asked is None:
            return []
        self._forget(asked)
        return [asked.closing(reason, self._clock())]

    def expire(self) -> list[Message]:
        """Ends the requests whose deadline has passed."""
        now = self._clock()
        late = [request_id for request_id, e in self._requests.items() if now >= e.due]
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
            if window.owner.started is None:
                window.owner.started = started
        numbered = dict(enumerate(batches, self._n_batches))
        self._n_batches += len(batches)
        try:
            embedder.start({n: [window.tokens for window in batch] for n, batch in numbered.items()})
        except MyllmError as error:
            return self._fail([window.owner for window in chain.from_iterable(batches)], error)
        self._begun |= numbered
        return []

    def _take(self, embedder: Embedder) -> list[Message]:
        """The events of one batch, as soon as it is done. Of requests that ended meanwhile there are none."""
        number, vectors = embedder.result()
        windows = self._begun.pop(number)
        if isinstance(vectors, MyllmError):
            return self._fail([window.owner for window in windows], vectors)
        events: list[Message] = []
        for window, vector in zip(windows, vectors, strict=True):
            asked = window.owner
            if self._requests.get(asked.arrival.id) is not asked:
                continue
            events += asked.take(window.item, window.chunk, vector)
            if asked.finished:
                del self._requests[asked.arrival.id]
                events.append(asked.closing(None, self._clock()))
        return events

    def fail_all(self, error: MyllmError) -> list[Message]:
        """Ends all with `error`."""
        return self._fail(list(self._requests.values()), error)

    def _fail(self, requests: Iterable[TextVectors], error: MyllmError) -> list[Message]:
        events = []
        for asked in requests:
            if self._requests.get(asked.arrival.id) is asked:
                del self._requests[asked.arrival.id]
                self._forget(asked)
                events.append(tagged(failed(error), asked.arrival.id))
        return events

    def _forget(self, asked: TextVectors) -> None:
        self._packer.drop(asked)
        self._held.pop(asked, None)

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
