"""A call: one request in flight in the Runtime, from whoever asked to the worker that answers.

Owns the promise of exactly one done event. Must not know sockets or how a worker is reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from myllm.errors import MyllmError
from myllm.protocol import Message, encode, error_event, tagged, with_id


class Carrier(Protocol):
    """Where a running call can be cancelled and paused: the worker that has it."""

    def cancel(self, call: Call) -> None: ...

    def pause(self, call: Call) -> None:
        """Stops or goes on, as `call.paused` says."""


class Call:
    """Events of one request on their way out, under the asker's own id or none.

    `write` takes whole lines; `ended` is called once, after the done event or when nobody wants
    one any more.
    """

    def __init__(
        self,
        request_id: int | None,
        write: Callable[[bytes], None],
        ended: Callable[[Call], None],
        client: int = 0,
    ) -> None:
        self.id = request_id
        self.client = client
        """Whose it is: clients share a worker fairly."""
        self.model = ""
        self.load_ms = 0.0
        self.over = False
        self.paused = False
        self.rescue: Callable[[Message], bool] | None = None
        """Is shown the done event first; where it returns true the call goes on, and another one follows."""
        self.outcome: Message = {"abandoned": True}
        """How it ended, for the log: nothing of what was asked or said."""
        self.carrier: Carrier | None = None
        """Set while a worker has it."""
        self.task: asyncio.Task[None] | None = None
        """Set while its model is resolved, pulled and loaded."""
        self._write = write
        self._ended = [ended]

    def when_over(self, tell: Callable[[Call], None]) -> None:
        """Has `tell` called after the done event, or when nobody wants one any more."""
        self._ended.append(tell)

    def send(self, event: Message) -> None:
        """An event that is not the last."""
        if not self.over:
            self._write(encode(tagged(event, self.id)))

    def forward(self, line: bytes, start: int) -> None:
        """A worker's token line, its own keys from `start` on, passed on unparsed."""
        if not self.over:
            self._write(with_id(line, start, self.id))

    def finish(self, event: Message) -> None:
        """The done event; a second one is ignored."""
        if not self.over and not (self.rescue and self.rescue(event)):
            self.outcome = _outcome(event)
            self._write(encode(tagged(event, self.id)))
            self._end()

    def fail(self, error: MyllmError) -> None:
        """The done event of a call that failed."""
        self.finish(error_event(error))

    def cancel(self) -> None:
        """Asks for the end; its done event follows."""
        if self.carrier:
            self.carrier.cancel(self)
        elif self.task:
            self.task.cancel()

    def pause(self, paused: bool) -> None:
        """Stops it for an asker that does not read, or lets it go on."""
        self.paused = paused
        if self.carrier:
            self.carrier.pause(self)

    def stop(self, error: MyllmError) -> None:
        """Ends it with an error at once; the worker stops."""
        if not self.over:
            self.cancel()
            self.fail(error)

    def abandon(self) -> None:
        """Ends it for an asker that is gone: no more events, and the worker stops."""
        if not self.over:
            self.cancel()
            self._end()

    def _end(self) -> None:
        self.over = True
        # Both may know this call: nobody but the garbage collector would free them, and all that was asked.
        self.rescue = self.carrier = None
        for tell in self._ended:
            tell(self)


def _outcome(event: Message) -> Message:
    if error := event.get("error"):
        return {"error": error.get("code")}
    return {key: event[key] for key in ("finish_reason", "usage", "timings") if key in event}
