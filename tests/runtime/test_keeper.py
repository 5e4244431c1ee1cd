"""The keeper with scripted workers, on a clock that jumps where it would sleep."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from myllm.errors import BadDataError, MyllmError, NotFoundError, UnavailableError, WorkerCrashedError
from myllm.models.registry import Model
from myllm.requests import LoadOptions
from myllm.runtime import keeper as module
from myllm.runtime.fleet import Fleet, Member
from myllm.runtime.keeper import Keeper, Wishes

MINUTE = 60.0
AS_IT_IS = Wishes()
ANYHOW = LoadOptions()
NARROW = LoadOptions(context=512, threads=3)
Event = dict[str, Any]


class Jumping(selectors.DefaultSelector):
    """Where its loop would sleep, 5 ms pass for other threads to speak up, then the clock jumps."""

    late = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0.005:
            return super().select(timeout)
        if ready := super().select(0.005):
            return ready
        self.late += timeout - 0.005
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return super().time() + self._jumping.late


def simulated(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(scenario)


class ScriptedWorker:
    """Loads when told to; is busy as long as it is said to be."""

    started: list[ScriptedWorker]
    gates: dict[str, asyncio.Event]
    failures: dict[str, MyllmError]
    last_words = "its last words"
    window = None

    def __init__(self) -> None:
        self.pid = 0
        self.dismissed = False
        self.busy = False
        self.closed = False
        self.name = ""
        self.options = LoadOptions()
        self._mourners: list[Callable[[asyncio.Task[None]], None]] = []
        self._rested: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls) -> Any:
        cls.started.append(cls())
        return cls.started[-1]

    async def load(self, path: Path, name: str, options: LoadOptions, tell: Callable[[Event], None]) -> Event:
        self.name, self.options = name, options
        tell({"loading": 0.5})
        if gate := self.gates.get(name):
            await gate.wait()
        if failure := self.failures.get(name):
            if isinstance(failure, WorkerCrashedError):
                self.die()
            raise failure
        return {}

    async def close(self) -> None:
        self.dismissed = True
        self.die()
        await asyncio.sleep(0.1)
        self.closed = True

    def when_dead(self, tell: Callable[[asyncio.Task[None]], None]) -> None:
        self._mourners.append(tell)

    def when_idle(self, tell: Callable[[], None]) -> None:
        self._rested = tell

    def work(self, seconds: float) -> None:
        """Is busy for a while."""
        self.busy = True
        asyncio.get_running_loop().call_later(seconds, self._rest)

    def die(self) -> None:
        burial = asyncio.ensure_future(asyncio.sleep(0))
        for tell in self._mourners:
            tell(burial)  # type: ignore[arg-type]
        self._mourners.clear()

    async def status(self) -> Event:
        return {"busy": int(self.busy), "secret": 1}

    def _rest(self) -> None:
        self.busy = False
        self._rested()


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedWorker]:
    ScriptedWorker.started, ScriptedWorker.gates, ScriptedWorker.failures = [], {}, {}
    monkeypatch.setattr(module, "resident_bytes", lambda pid: 7)
    return ScriptedWorker


class Kept:
    """A keeper, and what it logged."""

    def __init__(self, fleet: Fleet | None = None, keep_alive: float | None = 30 * MINUTE) -> None:
        self.logged: list[tuple[str, str]] = []
        self.keeper = Keeper(
            fleet or Fleet(),
            keep_alive,
            ScriptedWorker.start,
            estimate=lambda path, options: 100,
            available=lambda: 10**12,
            log=lambda event, **fields: self.logged.append((event, fields.get("reason", ""))),
        )

    async def ready(
        self,
        name: str = "model",
        wishes: Wishes = AS_IT_IS,
        work: float = 0,
        options: LoadOptions = ANYHOW,
    ) -> ScriptedWorker:
        """A worker, which is given work for some seconds at once."""
        worker: Any = await self.keeper.ready(model(name), options, lambda event: None, wishes)
        if work:
            worker.work(work)
        return worker  # type: ignore[no-any-return]

    def give_way(self, worker: ScriptedWorker) -> Member | None:
        return self.keeper.give_way(worker)  # type: ignore[arg-type]

    async def widen(self, member: Member) -> ScriptedWorker:
        """The worker with the model's own window; by the time it begins to load, no other is left."""
        worker: Any = await self.keeper.widen(member, model(member.name), lambda event: None)
        return worker  # type: ignore[no-any-return]

    async def names(self) -> list[str]:
        return [entry["model"] for entry in await self.keeper.status()]


def model(name: str) -> Model:
    return Model(name, Path(f"/{name}"), "file")


# ── keep-alive ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("keep_alive", "work"), [(30 * MINUTE, 20 * MINUTE), (0, 5)])
def test_a_model_goes_after_its_keep_alive_counted_from_its_last_work(keep_alive: float, work: float) -> None:
    async def scenario() -> None:
        kept = Kept(keep_alive=keep_alive)
        worker = await kept.ready(work=work)
        await asyncio.sleep(work + keep_alive - 0.1)
        assert not worker.closed
        await asyncio.sleep(0.6)
        assert worker.closed
        assert kept.keeper.empty
        assert kept.logged == [("loaded", ""), ("unloaded", "keep-alive")]

    simulated(scenario())


@pytest.mark.parametrize("wishes", [Wishes(keep_alive=float("inf")), Wishes(pin=True)])
def test_a_model_that_is_to_stay_stays(wishes: Wishes) -> None:
    async def scenario() -> None:
        kept = Kept()
        worker = await kept.ready(wishes=wishes)
        await asyncio.sleep(10_000 * MINUTE)
        assert not worker.closed
        await kept.ready(wishes=Wishes(keep_alive=MINUTE, pin=False))
        await asyncio.sleep(2 * MINUTE)
        assert worker.closed

    simulated(scenario())


def test_one_that_is_being_let_go_is_not_given_to_anybody() -> None:
    async def scenario() -> None:
        kept = Kept(keep_alive=0)
        first = await kept.ready(work=1)
        await asyncio.sleep(0.99)
        for _ in range(40):  # all around the moment in which it goes
            await asyncio.sleep(0.001)
            worker = await kept.ready()
            assert not worker.dismissed
        await asyncio.sleep(1)
        assert first.closed

    simulated(scenario())


# ── loads ───────────────────────────────────────────────────────────────────────────────────


def test_all_who_want_a_cold_model_share_one_load(scripted: type[ScriptedWorker]) -> None:
    async def scenario() -> None:
        scripted.gates["model"] = asyncio.Event()
        kept = Kept()
        asking = [asyncio.create_task(kept.ready()) for _ in range(5)]
        await asyncio.sleep(1)
        assert [entry["state"] for entry in await kept.keeper.status()] == ["loading"]
        scripted.gates["model"].set()
        assert len(set(await asyncio.gather(*asking))) == len(scripted.started) == 1

    simulated(scenario())


def test_a_load_that_nobody_waits_for_ends(scripted: type[ScriptedWorker]) -> None:
    async def scenario() -> None:
        scripted.gates["model"] = asyncio.Event()
        kept = Kept()
        asking = asyncio.create_task(kept.ready())
        await asyncio.sleep(1)
        asking.cancel()
        await asyncio.sleep(1)
        assert kept.keeper.empty
        assert scripted.started[0].closed
        scripted.gates["model"].set()
        assert await kept.ready() is scripted.started[1]

    simulated(scenario())


def test_a_failed_load_is_tried_anew_and_is_no_crash(scripted: type[ScriptedWorker]) -> None:
    async def scenario() -> None:
        scripted.failures["model"] = BadDataError("no model")
        kept = Kept()
        for _ in range(5):
            with pytest.raises(BadDataError):
                await kept.ready()
        assert len(scripted.started) == 5
        assert all(worker.closed for worker in scripted.started)
        assert ("crashed", "") not in kept.logged

    simulated(scenario())


def test_a_model_whose_worker_dies_three_times_is_refused_for_a_minute(
    scripted: type[ScriptedWorker],
) -> None:
    async def scenario() -> None:
        kept = Kept()
        for _ in range(3):
            (await kept.ready()).die()
            await asyncio.sleep(1)
        assert kept.keeper.empty
        assert kept.logged.count(("crashed", "")) == 3
        with pytest.raises(UnavailableError, match="died 3 times"):
            await kept.ready()
        await kept.ready("another")
        await asyncio.sleep(MINUTE)
        await kept.ready()

    simulated(scenario())


def test_dying_while_it_loads_counts_as_well(scripted: type[ScriptedWorker]) -> None:
    async def scenario() -> None:
        scripted.failures["model"] = WorkerCrashedError("dead")
        kept = Kept()
        for _ in range(3):
            with pytest.raises(WorkerCrashedError):
                await kept.ready()
        with pytest.raises(UnavailableError, match="died 3 times"):
            await kept.ready()

    simulated(scenario())


# ── room ────────────────────────────────────────────────────────────────────────────────────


def test_the_least_recently_used_goes_before_the_load_begins(scripted: type[ScriptedWorker]) -> None:
    async def scenario() -> None:
        kept = Kept(Fleet(max_memory=200))
        old, new = await kept.ready("old"), await kept.ready("new")
        await asyncio.sleep(1)
        await kept.ready("new")
        third = asyncio.create_task(kept.ready("third"))
        while len(scripted.started) < 3:
            await asyncio.sleep(0.001)
        assert old.closed, "its memory is free"
        await third
        assert not new.closed
        assert await kept.names() == ["new", "third"]
        assert ("unloaded", "memory") in kept.logged

    simulated(scenario())


def test_one_with_work_is_waited_for_and_gets_no_more() -> None:
    async def scenario() -> None:
        kept = Kept(Fleet(max_memory=100))
        busy = await kept.ready("busy", work=10)
        began = asyncio.get_running_loop().time()
        other = asyncio.create_task(kept.ready("other", work=10))
        await asyncio.sleep(1)
        again = asyncio.create_task(kept.ready("busy"))
        await other
        assert 8.9 < asyncio.get_running_loop().time() - began < 12
        assert busy.closed
        assert await again is not busy, "it got its turn after the other"
        assert (await other).closed

    simulated(scenario())


def test_a_newcomer_that_gives_up_leaves_the_others_to_work_on() -> None:
    async def scenario() -> None:
        kept = Kept(Fleet(max_memory=100))
        await kept.ready("busy", work=10)
        other = asyncio.create_task(kept.ready("other"))
        await asyncio.sleep(1)
        other.cancel()
        await asyncio.sleep(1)
        assert await kept.names() == ["busy"]
        await asyncio.sleep(20)
        assert await kept.names() == []
        await kept.ready("busy")

    simulated(scenario())


def test_a_newcomer_that_gives_up_while_another_ends_leaves_no_half_dead() -> None:
    async def scenario() -> None:
        kept = Kept(Fleet(max_memory=100))
        idle = await kept.ready("idle")
        await asyncio.sleep(1)
        other = asyncio.create_task(kept.ready("other"))
        while not idle.dismissed:
            await asyncio.sleep(0.001)
        other.cancel()
        await asyncio.sleep(1)
        assert idle.closed
        assert kept.keeper.empty
        await kept.ready("idle")

    simulated(scenario())


# ── a window that was too small ─────────────────────────────────────────────────────────────


def test_one_with_a_narrow_window_gives_way_and_nobody_new_gets_it() -> None:
    async def scenario() -> None:
        kept = Kept()
        narrow = await kept.ready(options=NARROW)
        assert await kept.ready() is narrow, "it served whoever did not ask for more"
        await asyncio.sleep(1)
        assert kept.give_way(narrow) is not None
        assert await kept.ready() is not narrow

    simulated(scenario())


def test_one_with_its_models_own_window_or_with_work_or_dead_gives_no_way() -> None:
    async def scenario() -> None:
        kept = Kept()
        busy, dead = await kept.ready("busy", options=NARROW), await kept.ready("dead", options=NARROW)
        wide = await kept.ready("wide", options=LoadOptions(threads=2))
        busy.work(10)
        dead.die()
        await asyncio.sleep(1)
        assert [kept.give_way(worker) for worker in (wide, busy, dead)] == [None] * 3
        assert await kept.ready("busy") is busy, "it is left as it was"
        await asyncio.sleep(20)
        assert not busy.closed

    simulated(scenario())


@pytest.mark.parametrize("wishes", [AS_IT_IS, Wishes(5 * MINUTE), Wishes(float("inf")), Wishes(pin=True)])
def test_the_wider_takes_the_others_place_and_stays_as_long_as_that_was_to(wishes: Wishes) -> None:
    async def scenario() -> None:
        kept = Kept(Fleet(max_memory=100))
        narrow = await kept.ready(options=NARROW, wishes=wishes)
        await asyncio.sleep(1)
        (before,) = await kept.keeper.status()
        member = kept.give_way(narrow)
        assert member is not None
        wider = await kept.widen(member)
        assert narrow.closed
        assert wider.options == NARROW._replace(context=None)
        (after,) = await kept.keeper.status()
        assert after["pinned"] == before["pinned"]
        assert after["keep_alive_s"] == pytest.approx(before["keep_alive_s"], abs=2)
        assert ("unloaded", "window") in kept.logged
        assert kept.give_way(wider) is None

    simulated(scenario())


@pytest.mark.parametrize("pause", [0, 0.05, MINUTE])
def test_the_wider_begins_to_load_when_the_others_memory_is_free_whoever_ended_that(
    scripted: type[ScriptedWorker], pause: float
) -> None:
    async def scenario() -> None:
        kept = Kept()
        narrow, _ = await kept.ready(options=NARROW), await kept.ready("another")
        await asyncio.sleep(1)
        member = kept.give_way(narrow)
        assert member is not None
        await kept.ready("another")  # the keeper looks around afterwards, and ends what is to go
        await asyncio.sleep(pause)
        widening = [asyncio.create_task(kept.widen(member)) for _ in range(2)]
        while len(scripted.started) < 3:
            await asyncio.sleep(0.001)
        assert narrow.closed
        assert len(set(await asyncio.gather(*widening))) == 1
        assert len(scripted.started) == 3

    simulated(scenario())


def test_a_widening_that_is_given_up_leaves_no_half_dead() -> None:
    async def scenario() -> None:
        kept = Kept()
        narrow = await kept.ready(options=NARROW)
        await asyncio.sleep(1)
        member = kept.give_way(narrow)
        assert member is not None
        widening = asyncio.create_task(kept.widen(member))
        while not narrow.dismissed:
            await asyncio.sleep(0.001)
        widening.cancel()
        await asyncio.sleep(1)
        assert narrow.closed
        assert kept.keeper.empty

    simulated(scenario())


def test_one_that_gave_way_and_whom_nobody_widens_any_more_goes() -> None:
    async def scenario() -> None:
        kept = Kept()
        narrow = await kept.ready(options=NARROW, wishes=Wishes(pin=True))
        await asyncio.sleep(1)
        kept.give_way(narrow)
        await kept.ready("another")
        await asyncio.sleep(1)
        assert narrow.closed
        assert await kept.names() == ["another"]

    simulated(scenario())


# ── unloading ───────────────────────────────────────────────────────────────────────────────


def test_unload_waits_for_the_work_and_the_end() -> None:
    async def scenario() -> None:
        kept = Kept()
        worker = await kept.ready(work=10, wishes=Wishes(pin=True))
        began = asyncio.get_running_loop().time()
        assert await kept.keeper.unload(model("model").name) == ["model"]
        assert asyncio.get_running_loop().time() - began > 9
        assert worker.closed
        assert kept.logged[-1] == ("unloaded", "unload")
        with pytest.raises(NotFoundError, match="not loaded"):
            await kept.keeper.unload(model("model").name)
        assert await kept.keeper.unload(None) == []

    simulated(scenario())


def test_unload_ends_when_the_worker_dies_meanwhile() -> None:
    async def scenario() -> None:
        kept = Kept()
        worker = await kept.ready(work=1000)
        unloading = asyncio.create_task(kept.keeper.unload(None))
        await asyncio.sleep(1)
        worker.die()
        assert await unloading == ["model"]

    simulated(scenario())


def test_status_tells_what_is_known_of_each() -> None:
    async def scenario() -> None:
        kept = Kept()
        worker = await kept.ready()
        await asyncio.sleep(MINUTE)
        (entry,) = await kept.keeper.status()
        assert entry["state"] == "ready"
        assert "secret" not in entry
        assert entry["idle_s"] == pytest.approx(60, abs=1)
        assert entry["keep_alive_s"] == pytest.approx(29 * 60, abs=1)
        assert entry["memory_bytes"] == 7
        worker.work(MINUTE)
        await kept.keeper.close()
        assert worker.closed
        assert ("crashed", "") not in kept.logged

    simulated(scenario())
