"""Keeps models ready: loads each once for all who ask, lets it go when its time is over, buries the dead.

Does what `fleet.py` decides. Owns backends from their start to their end. Must not know requests,
connections, names that are not resolved yet, or what kind a backend is. Everything runs on one event loop, by
whose clock time is told.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from myllm import hardware
from myllm.errors import MyllmError, NotFoundError
from myllm.protocol import Message
from myllm.requests import LoadOptions, Wishes
from myllm.runtime.backend import Backend
from myllm.runtime.fleet import Fleet, Member, Room, State
from myllm.runtime.memory import resident_bytes, rough_estimate
from myllm.runtime.single_flight import SingleFlight, Watch
from myllm.runtime.threads import in_daemon_thread
from myllm.runtime.worker import start_worker

if TYPE_CHECKING:
    from pathlib import Path

    from myllm.models.registry import Model
    from myllm.settings import Settings

ENGINE_KEYS: Final = (
    *("context", "window", "busy", "waiting", "cached", "tokens_per_second", "kv_hit_rate"),
    *("threads", "gpu_layers"),
)
"""What an engine says of itself, passed on."""


AS_IT_IS: Final = Wishes()


class Keeper:
    """The backends of one Runtime; `start` makes one that has nothing loaded yet."""

    def __init__(
        self,
        fleet: Fleet,
        keep_alive: float | None,
        start: Callable[[], Awaitable[Backend]] = start_worker,
        *,
        estimate: Callable[[Path, LoadOptions], int] = rough_estimate,
        available: Callable[[], int] = hardware.available_memory,
        log: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._fleet = fleet
        self._keep_alive = keep_alive
        self._start = start
        self._estimate, self._available, self._log = estimate, available, log
        self._living: set[Backend] = set()
        """All that are not buried, also those whose member is gone."""
        self._placing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def empty(self) -> bool:
        """Whether no model is loaded or about to be."""
        return not self._fleet.members

    async def ready(
        self, model: Model, options: LoadOptions, watch: Watch, wishes: Wishes = AS_IT_IS
    ) -> Backend:
        """A backend that has the model loaded at least as `options` say; `watch` takes events meanwhile.

        What is submitted to it at once, before anything is awaited, finds it there. Raises MyllmError.
        """
        member = self._fleet.find(model.path, options)
        if member is None:
            member = self._enlist(model, options)
        self._heed(member, wishes)
        backend = await member.work.join(watch)
        self._settle(member)
        return backend

    def configure(self, settings: Settings) -> None:
        """New limits, for the loads to come."""
        self._fleet.max_memory, self._fleet.max_loaded = (
            settings.models_max_memory,
            settings.models_max_loaded,
        )
        self._keep_alive = settings.keep_alive

    def has(self, name: str) -> bool:
        """Whether a model of that name is loaded or about to be."""
        return any(member.name == name for member in self._fleet.members)

    async def unload(self, name: str | None) -> list[str]:
        """Lets a model go, or all of them, when their running requests have finished; their names.

        Raises NotFoundError where it is not loaded.
        """
        going = [member for member in self._fleet.members if name in (None, member.name)]
        if name is not None and not going:
            raise NotFoundError(f"{name}: not loaded; `myllm load --list` shows what is")
        for member in going:
            member.leaving = "unload"
        self._review()
        while any(member in self._fleet.members for member in going):
            await self._changed.wait()
        return [member.name for member in going]

    def give_way(self, backend: Backend) -> Member | None:
        """A backend's member, which nobody gets any more, if it has less than its model's own window and
        nothing to do.
        """
        member = next((member for member in self._fleet.members if member.backend is backend), None)
        if member is None or member.options.context is None or backend.busy:
            return None
        member.leaving = "window"
        return member

    async def widen(self, member: Member, model: Model, watch: Watch) -> Backend:
        """A backend with the model's own window in the place of one that gave way. Raises MyllmError."""
        wishes = Wishes(math.inf if member.keep_alive is None else member.keep_alive, member.pinned)
        if member in self._fleet.members:
            await asyncio.wait([self._dismiss(member, "window")])
        return await self.ready(model, member.options._replace(context=None), watch, wishes)

    async def close(self) -> None:
        """Ends all backends; returns when they are gone."""
        if self._alarm:
            self._alarm.cancel()
        await asyncio.gather(*(backend.close() for backend in list(self._living)))

    async def status(self) -> list[Message]:
        """What is loaded, as `load --list` shows it."""
        return list(await asyncio.gather(*(self._describe(member) for member in list(self._fleet.members))))

    # ── a member's life ─────────────────────────────────────────────────────────────────────

    def _enlist(self, model: Model, options: LoadOptions) -> Member:
        """Begins to load a model. Raises UnavailableError for one that crashed too often."""
        now = self._now()
        self._fleet.check_crashes(model.name, model.path, now)
        member = Member(model.name, model.path, options, 0, self._keep_alive, now)
        self._fleet.members.append(member)
        member.work = SingleFlight(lambda tell: self._load(member, tell), lambda _: self._forget(member))
        return member

    async def _load(self, member: Member, tell: Watch) -> Backend:
        member.estimate = await in_daemon_thread(lambda: self._estimate(member.path, member.options))
        await self._make_room(member)
        backend = member.backend = await self._start()
        self._living.add(backend)
        backend.when_dead(lambda burial: self._mourn(member, backend, burial))
        backend.when_idle(lambda: self._settle(member))
        started = self._now()
        try:
            await backend.load(member.path, member.name, member.options, tell)
        except BaseException as error:
            if isinstance(error, MyllmError):
                self._log("load_failed", level="error", model=member.name, error=str(error))
            await backend.close()
            raise
        member.state = State.READY
        self._log("loaded", model=member.name, pid=backend.pid, seconds=round(self._now() - started, 3))
        return backend

    async def _make_room(self, newcomer: Member) -> None:
        """Has others leave until the newcomer fits. One load after the other: each counts what is free."""
        async with self._placing:
            while (room := self._fleet.room(newcomer, self._available())) != Room():
                for member in room.wait:  # nobody new gets it, or those who keep it busy would starve us
                    member.leaving = member.leaving or "memory"
                if room.evict:
                    await asyncio.wait([self._dismiss(member, "memory") for member in room.evict])
                if room.wait:
                    await self._changed.wait()
            newcomer.state = State.LOADING

    def _dismiss(self, member: Member, reason: str) -> asyncio.Task[None]:
        """Ends a member without work, which nobody gets any more; done when its memory is free.

        For `asyncio.wait`: whoever awaited it and gave up would cancel it for all.
        """
        if member.end is None:
            member.leaving, member.busy = member.leaving or reason, True
            member.state = State.ENDING
            member.end = asyncio.get_running_loop().create_task(self._end(member))
        return member.end

    async def _end(self, member: Member) -> None:
        backend, member.backend = member.backend, None
        if backend:
            self._log("unloaded", model=member.name, pid=backend.pid, reason=member.leaving)
            await backend.close()
        self._forget(member)

    def _mourn(self, member: Member, backend: Backend, burial: asyncio.Task[None]) -> None:
        unforeseen = not backend.dismissed
        if unforeseen:
            self._fleet.crashed(member.path, self._now())
            self._forget(member)

        def buried(_: object) -> None:
            self._living.discard(backend)
            if unforeseen:
                words = backend.last_words
                self._log("crashed", level="error", model=member.name, pid=backend.pid, words=words)

        burial.add_done_callback(buried)

    def _forget(self, member: Member) -> None:
        if member in self._fleet.members:
            self._fleet.members.remove(member)
        member.backend = None
        self._tell_change()

    def _heed(self, member: Member, wishes: Wishes) -> None:
        if wishes.keep_alive is not None:
            member.keep_alive = None if wishes.keep_alive == math.inf else wishes.keep_alive
        if wishes.pin is not None:
            member.pinned = wishes.pin

    # ── idling ──────────────────────────────────────────────────────────────────────────────

    def _settle(self, member: Member) -> None:
        """Looks, a moment later, whether a member has work: whoever waited for it submits at once."""
        member.busy = True
        asyncio.get_running_loop().call_soon(self._look, member)

    def _look(self, member: Member) -> None:
        if member.backend is None:
            return
        member.busy = member.backend.busy
        member.used = self._now()
        self._review()

    def _review(self) -> None:
        """Dismisses those whose time is over, and sets the alarm for the next."""
        for member in self._fleet.expired(self._now()):
            self._dismiss(member, "keep-alive")
        if self._alarm:
            self._alarm.cancel()
        when = self._fleet.next_expiry()
        self._alarm = asyncio.get_running_loop().call_at(when, self._review) if when is not None else None
        self._tell_change()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed.clear()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ── telling ─────────────────────────────────────────────────────────────────────────────

    async def _describe(self, member: Member) -> Message:
        backend = member.backend
        state = "unloading" if member.leaving else "ready" if member.state is State.READY else "loading"
        entry: Message = {"model": member.name, "path": str(member.path), "state": state}
        if backend is None:
            return entry | {"pinned": member.pinned}
        said: Message = {}
        with suppress(MyllmError, TimeoutError):
            said = await backend.status()
        expires = member.expires
        kept = member.keep_alive if expires is None else max(expires - self._now(), 0.0)
        return {
            **entry,
            "pid": backend.pid,
            "memory_bytes": resident_bytes(backend.pid),
            **{key: said.get(key) for key in ENGINE_KEYS},
            "idle_s": 0.0 if member.busy else round(self._now() - member.used, 1),
            "keep_alive_s": None if member.pinned or kept is None else round(kept, 1),
            "pinned": member.pinned,
        }
