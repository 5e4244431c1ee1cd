"""A call: one request in flight in the Runtime, from whoever asked to the backend that answers.

Owns the promise of exactly one done event, and where the request is: in a task that readies its model, or
with a backend. Must not know sockets or how a backend is reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from myllm import events
from myllm.errors import MyllmError
from myllm.protocol import Message
from myllm.runtime.backend import Backend
from myllm.runtime.reply import Reply, Wrapper


class Call(Wrapper):
    """The reply to one request, of client number `client`; `inner` is the asker's end.

    `ended` is called once, after the done event or when nobody wants one any more.
    """

    def __init__(self, inner: Reply, ended: Callable[[Call], None], client: int = 0) -> None:
        super().__init__(inner)
        self.client = client
        """Whose it is: clients share a backend fairly."""
        self.model = ""
        self.over = False
        self.paused = False
        self.outcome: Message = {"abandoned": True}
        """How it ended, for the log: nothing of what was asked or said."""
        self.task: asyncio.Task[None] | None = None
        """Set while its model is resolved, pulled and loaded."""
        self._carrier: tuple[Backend, Reply] | None = None
        self._ended = [ended]

    def when_over(self, tell: Callable[[Call], None]) -> None:
        """Has `tell` called after the done event, or when nobody wants one any more."""
        self._ended.append(tell)

    def carry(self, backend: Backend, message: Message, reply: Reply | None = None) -> None:
        """Gives the request to a backend, whose events come back through `reply`, a wrapper of this call."""
        reply = reply or self
        self._carrier = backend, reply
        backend.submit(message, self.client, reply)
        if self.paused:
            backend.pause(reply, True)

    def event(self, event: Message) -> None:
        if not self.over:
            self.inner.event(event)

    def line(self, line: bytes, start: int) -> None:
        if not self.over:
            self.inner.line(line, start)

    def done(self, event: Message) -> None:
        """The done event; a second one is ignored."""
        if not self.over:
            self.outcome = events.outcome(event)
            self.inner.done(event)
            self._end()

    def fail(self, error: MyllmError) -> None:
        """The done event of a call that failed."""
        self.done(events.failed(error))

    def cancel(self) -> None:
        """Asks for the end; its done event follows."""
        if self._carrier:
            backend, reply = self._carrier
            backend.cancel(reply)
        elif self.task:
            self.task.cancel()

    def pause(self, paused: bool) -> None:
        """Stops it for an asker that does not read, or lets it go on."""
        self.paused = paused
        if self._carrier:
            backend, reply = self._carrier
            backend.pause(reply, paused)

    def leave_backend(self) -> None:
        """The backend has ended its part, and the call goes on elsewhere."""
        self._carrier = None

    def stop(self, error: MyllmError) -> None:
        """Ends it with an error at once; the backend stops."""
        if not self.over:
            self.cancel()
            self.fail(error)

    def abandon(self) -> None:
        """Ends it for an asker that is gone: no more events, and the backend stops."""
        if not self.over:
            self.cancel()
            self._end()

    def _end(self) -> None:
        self.over = True
        # A wrapper there knows this call: nobody but the garbage collector would free them.
        self._carrier = None
        for tell in self._ended:
            tell(self)
