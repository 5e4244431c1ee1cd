"""Names → models: looked up, and pulled where the catalog has them and this machine has not.

Owns that a name is resolved once for all who ask at the same time. Must not know workers or
connections. The registry blocks, so it runs on threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from myllm import events
from myllm.errors import TryAgainError
from myllm.runtime.single_flight import SingleFlight, Watch
from myllm.runtime.threads import in_daemon_thread

if TYPE_CHECKING:
    from myllm.models.registry import Model, Registry

FRESH_FOR: Final = 1.0
"""Seconds for which an answer is given again: a batch asks hundreds of times, an alias changes seldom."""


class Resolver:
    """Resolves names on one event loop; `open_registry` is called on threads."""

    def __init__(self, open_registry: Callable[[], Registry]) -> None:
        self._open_registry = open_registry
        self._known: dict[str, tuple[Model, float]] = {}
        self._under_way: dict[str, SingleFlight[Model]] = {}

    async def resolve(self, name: str, watch: Watch) -> Model:
        """The model of that name; `watch` takes `pulling` events. Raises what the registry raises."""
        now = asyncio.get_running_loop().time()
        if (known := self._known.get(name)) and known[1] > now:
            return known[0]
        work = self._under_way.get(name)
        if work is None:
            work = SingleFlight(
                lambda tell: self._resolve(name, tell), lambda flight: self._forget(name, flight)
            )
            self._under_way[name] = work
        return await work.join(watch)

    async def _resolve(self, name: str, tell: Watch) -> Model:
        from myllm.models.registry import NotPulledError

        try:
            model = await in_daemon_thread(lambda: self._open_registry().resolve(name))
        except NotPulledError:
            model = await self._pull(name, tell)
        self._under_way.pop(name, None)
        self._known[name] = model, asyncio.get_running_loop().time() + FRESH_FOR
        return model

    def _forget(self, name: str, work: SingleFlight[Model]) -> None:
        if self._under_way.get(name) is work:
            del self._under_way[name]

    async def _pull(self, name: str, tell: Watch) -> Model:
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()

        def progress(done: int, total: int | None) -> None:
            if unwanted.is_set():
                raise TryAgainError(f"{name}: nobody waits for this download any more")
            loop.call_soon_threadsafe(tell, events.pulling(name, done, total))

        try:
            return await in_daemon_thread(lambda: self._open_registry().pull(name, progress))
        finally:
            unwanted.set()
