"""Keeps workers: loads a model once for all who ask, lets it go when its time is over, buries the dead.

Does what `fleet.py` decides. Owns worker processes from their start to their end. Must not know
requests, connections or names that are not resolved yet. Everything runs on one event loop, by whose
clock time is told.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from myllm import hardware
from myllm.errors import MyllmError, NotFoundError
from myllm.protocol import Message
from myllm.requests import LoadOptions
from myllm.runtime.fleet import Fleet, Member, Room
from myllm.runtime.memory import resident_bytes, rough_estimate
from myllm.runtime.single_flight import Shared, Watch
from myllm.runtime.threads import in_daemon_thread
from myllm.runtime.worker import Worker
from myllm.spawning import WorkerProcess, spawn

if TYPE_CHECKING:
    from pathlib import Path

    from myllm.models.registry import Model
    from myllm.settings import Settings

ENGINE_KEYS: Final = (
    *("context", "window", "busy", "waiting", "cached", "tokens_per_second", "kv_hit_rate"),
    *("threads", "gpu_layers"),
)
"""What an engine says of itself, passed on."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """How long a model shall stay from now on; None leaves it as it is."""

    keep_alive: float | None = None
    """Seconds; infinity is for ever."""
    pin: bool | None = None


class Keeper:
    """The workers of one Runtime. `spare` is a process started in advance, for the first model."""

    def __init__(
        self,
        fleet: Fleet,
        keep_alive: float | None,
        spare: WorkerProcess | None = None,
        *,
        estimate: Callable[[Path, LoadOptions], int] = rough_estimate,
        available: Callable[[], int] = hardware.available_memory,
        log: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._fleet = fleet
        self._keep_alive = keep_alive
        self._spare = spare
        self._estimate, self._available, self._log = estimate, available, log
        self._work: dict[Member, Shared[Worker]] = {}
        self._workers: dict[Member, Worker] = {}
        self._running: set[Worker] = set()
        self._placing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._ends: dict[Member, asyncio.Task[None]] = {}

    @property
    def empty(self) -> bool:
        """Whether no model is loaded or about to be."""
        return not self._fleet.members

    async def ready(
        self, model: Model, options: LoadOptions, watch: Watch, wishes: Wishes = Wishes()
    ) -> Worker:
        """A worker that has the model loaded at least as `options` say; `watch` takes events meanwhile.

        What is submitted to it at once, before anything is awaited, finds it there. Raises MyllmError.
        """
        member = self._fleet.find(model.path, options)
        if member is None:
            member = self._enlist(model, options)
        self._heed(member, wishes)
        worker = await self._work[member].join(watch)
        self._settle(member)
        return worker

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

    def give_way(self, worker: Worker) -> Member | None:
        """A worker's member, which nobody gets any more, if it has less than its model's own window and
        nothing to do.
        """
        member = next((member for member, each in self._workers.items() if each is worker), None)
        if member is None or member.options.context is None or worker.busy:
            return None
        member.leaving = "window"
        return member

    async def widen(self, member: Member, model: Model, watch: Watch) -> Worker:
        """A worker with the model's own window in the place of one that gave way. Raises MyllmError."""
        wishes = Wishes(math.inf if member.keep_alive is None else member.keep_alive, member.pinned)
        if member in self._fleet.members:
            await asyncio.wait([self._dismiss(member, "window")])
        return await self.ready(model, member.options._replace(context=None), watch, wishes)

    async def close(self) -> None:
        """Ends all workers; returns when they are gone."""
        if self._alarm:
            self._alarm.cancel()
        if self._spare:
            self._running.add(await Worker.attach(self._spare))
            self._spare = None
        await asyncio.gather(*(worker.close() for worker in list(self._running)))

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
        self._work[member] = Shared(lambda tell: self._load(member, tell), lambda _: self._forget(member))
        return member

    async def _load(self, member: Member, tell: Watch) -> Worker:
        member.estimate = await in_daemon_thread(lambda: self._estimate(member.path, member.options))
        await self._make_room(member)
        process, self._spare = self._spare or spawn(), None
        worker = await Worker.attach(process)
        self._running.add(worker)
        self._workers[member] = worker
        worker.when_dead(lambda burial: self._mourn(member, worker, burial))
        worker.when_idle(lambda: self._settle(member))
        started = self._now()
        try:
            await worker.load(member.path, member.name, member.options, tell)
        except BaseException as error:
            if isinstance(error, MyllmError):
                self._log("load_failed", level="error", model=member.name, error=str(error))
            await worker.close()
            raise
        member.loading = False
        self._log("loaded", model=member.name, pid=worker.pid, seconds=round(self._now() - started, 3))
        return worker

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
            newcomer.placed = True

    def _dismiss(self, member: Member, reason: str) -> asyncio.Task[None]:
        """Ends a member without work, which nobody gets any more; done when its memory is free.

        For `asyncio.wait`: whoever awaited it and gave up would cancel it for all.
        """
        if member not in self._ends:
            member.leaving, member.busy = member.leaving or reason, True
            task = self._ends[member] = asyncio.get_running_loop().create_task(self._end(member))
            task.add_done_callback(lambda _: self._ends.pop(member))
        return self._ends[member]

    async def _end(self, member: Member) -> None:
        if worker := self._workers.pop(member, None):
            self._log("unloaded", model=member.name, pid=worker.pid, reason=member.leaving)
            await worker.close()
        self._forget(member)

    def _mourn(self, member: Member, worker: Worker, burial: asyncio.Task[None]) -> None:
        unforeseen = not worker.dismissed
        if unforeseen:
            self._fleet.crashed(member.path, self._now())
            self._forget(member)

        def buried(_: object) -> None:
            self._running.discard(worker)
            if unforeseen:
                words = worker.last_words
                self._log("crashed", level="error", model=member.name, pid=worker.pid, words=words)

        burial.add_done_callback(buried)

    def _forget(self, member: Member) -> None:
        if member in self._fleet.members:
            self._fleet.members.remove(member)
        self._work.pop(member, None)
        self._workers.pop(member, None)
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
        worker = self._workers.get(member)
        if worker is None:
            return
        member.busy = worker.busy
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
        worker = self._workers.get(member)
        state = "unloading" if member.leaving else "loading" if member.loading else "ready"
        entry: Message = {"model": member.name, "path": str(member.path), "state": state}
        if worker is None:
            return entry | {"pinned": member.pinned}
        said: Message = {}
        with suppress(MyllmError, TimeoutError):
            said = await worker.status()
        expires = member.expires
        kept = member.keep_alive if expires is None else max(expires - self._now(), 0.0)
        return {
            **entry,
            "pid": worker.pid,
            "memory_bytes": resident_bytes(worker.pid),
            **{key: said.get(key) for key in ENGINE_KEYS},
            "idle_s": 0.0 if member.busy else round(self._now() - member.used, 1),
            "keep_alive_s": None if member.pinned or kept is None else round(kept, 1),
            "pinned": member.pinned,
        }
