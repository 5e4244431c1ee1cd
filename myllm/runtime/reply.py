"""A reply on its way out: what a backend says goes through wrappers, each a `Reply`, to whoever asked.

Owns the interface, and the wrappers that every answer of a model passes. Must not know sockets, nor how a
backend is reached. The asker's own end (lines on a socket, SSE) is the last wrapper; `call.py` is the one
that promises exactly one done event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from myllm.errors import ContextOverflowError
from myllm.events import completed
from myllm.protocol import Message


class Reply(Protocol):
    """Takes the events of one request, in order, on the Runtime's event loop; returns at once."""

    def event(self, event: Message) -> None:
        """An event that is not the last."""

    def line(self, line: bytes, start: int) -> None:
        """A token event as the line it came in, its own keys from `start` on: by far the most, not parsed."""

    def done(self, event: Message) -> None:
        """The last event."""


class Unheard:
    """The end of a reply that nobody waits for."""

    def event(self, event: Message) -> None: ...
    def line(self, line: bytes, start: int) -> None: ...
    def done(self, event: Message) -> None: ...


class Wrapper:
    """Passes everything on to `inner`; what stands between overrides what it cares for."""

    def __init__(self, inner: Reply) -> None:
        self.inner = inner

    def event(self, event: Message) -> None:
        self.inner.event(event)

    def line(self, line: bytes, start: int) -> None:
        self.inner.line(line, start)

    def done(self, event: Message) -> None:
        self.inner.done(event)


class Completed(Wrapper):
    """Adds what only the Runtime knows: the model's name, and the milliseconds that it was waited for."""

    def __init__(self, inner: Reply, model: str, load_ms: float) -> None:
        super().__init__(inner)
        self._model, self._load_ms = model, load_ms

    def done(self, event: Message) -> None:
        self.inner.done(completed(event, self._model, self._load_ms))


class Retried(Wrapper):
    """A prompt that did not fit the window: where `again` takes it on, its done event is another one's."""

    def __init__(self, inner: Reply, again: Callable[[], bool]) -> None:
        super().__init__(inner)
        self._again = again

    def done(self, event: Message) -> None:
        overflowed = (event.get("error") or {}).get("code") == ContextOverflowError.code
        if not (overflowed and self._again()):
            self.inner.done(event)
