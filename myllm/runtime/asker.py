"""Somebody who asks: a connection with its requests in flight, or an HTTP client with one.

Owns whose requests are whose, the places that somebody with many waits for, and what happens to them when
their asker stops reading or goes. Must not know sockets, HTTP or how a line is written: that is the asker's
own end, a `Reply`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from myllm.protocol import MAX_IN_FLIGHT, Message
from myllm.runtime.call import Call
from myllm.runtime.reply import Reply

if TYPE_CHECKING:
    from myllm.runtime.runtime import Runtime

PATIENCE: Final = 600.0
"""Seconds that an asker may leave what waits for it unread, say `gen | less`, before it is cut off."""


class Asker:
    """One client of a Runtime, by the number that the Runtime gave it; made by `Runtime.welcome`."""

    def __init__(self, runtime: Runtime, number: int) -> None:
        self._runtime = runtime
        self._number = number
        self._calls: set[Call] = set()
        self._ended = asyncio.Event()
        self._paused = False

    def ask(self, message: Message, reply: Reply) -> Call:
        """Takes a request in, without its `id`; all that follows, at last one done event, goes to `reply`."""
        call = Call(reply, self._forget, self._number)
        self._calls.add(call)
        call.paused = self._paused
        self._runtime.start(message, call)
        return call

    async def place(self) -> None:
        """Waits until one more of many requests may start: who has many is never refused."""
        while len(self._calls) >= MAX_IN_FLIGHT:
            self._ended.clear()
            await self._ended.wait()
        await self._runtime.room()

    def pause(self, paused: bool) -> None:
        """Stops all its requests, as it does not read, or lets them go on."""
        self._paused = paused
        for call in self._calls:
            call.pause(paused)

    def leave(self) -> None:
        """Ends all its requests: it is gone."""
        for call in list(self._calls):
            call.abandon()

    def _forget(self, call: Call) -> None:
        self._calls.discard(call)
        self._ended.set()
