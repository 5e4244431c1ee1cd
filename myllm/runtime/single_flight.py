"""Work that many may wait for and that is done once, on one event loop.

Owns who waits and whether it still makes sense. Must not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from myllm.protocol import Message

T = TypeVar("T")
Watch = Callable[[Message], None]
"""Takes events that tell how far the work is."""


class SingleFlight(Generic[T]):
    """Starts `work` at once; each who joins gets its result or its error, and its progress events.

    Work that nobody waits for any more is cancelled. `forget` is called when it has failed or is
    cancelled: from then on nobody should join.
    """

    def __init__(
        self,
        work: Callable[[Watch], Awaitable[T]],
        forget: Callable[[SingleFlight[T]], None] = lambda flight: None,
    ) -> None:
        self._forget = forget
        self._watchers: list[Watch] = []
        self._task = asyncio.ensure_future(work(self._tell))
        self._task.add_done_callback(self._settle)

    def _tell(self, event: Message) -> None:
        for watch in list(self._watchers):
            watch(event)

    async def join(self, watch: Watch) -> T:
        """Waits for the result. Raises what the work raised."""
        if self._task.done():
            return self._task.result()
        self._watchers.append(watch)
        try:
            return await asyncio.shield(self._task)
        finally:
            self._watchers.remove(watch)
            if not self._watchers and not self._task.done():
                self._task.cancel()
                self._forget(self)  # at once: cancelling may take a while

    def _settle(self, task: asyncio.Future[T]) -> None:
        # Asking for the exception also notes it, or asyncio would report on stderr what nobody waits for.
        if task.cancelled() or task.exception():
            self._forget(self)
