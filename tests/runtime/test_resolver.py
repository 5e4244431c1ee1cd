"""Names become models once, and catalog names are pulled with their progress told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from myllm.errors import MyllmError, NotFoundError
from myllm.models.registry import Model, NotPulledError, Registry
from myllm.runtime.resolver import Resolver

MODEL = Model("tiny", Path("/models/tiny.gguf"), "file:/models/tiny.gguf")
Event = dict[str, Any]


class FakeRegistry:
    """Knows `tiny`, has `catalog` to pull, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pulls = 0
        self.halfway = threading.Event()
        self.go_on = threading.Event()
        self.stopped_by: MyllmError | None = None

    def resolve(self, name: str) -> Model:
        self.asked.append(name)
        if name == "catalog":
            raise NotPulledError("catalog: not pulled yet")
        if name != "tiny":
            raise NotFoundError(f"{name}: no such model")
        return MODEL

    def pull(self, source: str, progress: Callable[[int, int | None], None]) -> Model:
        self.pulls += 1
        progress(1, 2)
        self.halfway.set()
        self.go_on.wait(5)
        try:
            progress(2, 2)
        except MyllmError as error:
            self.stopped_by = error
            raise
        return MODEL


def resolver_of(registry: FakeRegistry) -> Resolver:
    return Resolver(lambda: cast("Registry", registry))


def ignore(event: Event) -> None:
    pass


def test_many_who_ask_at_once_make_one_look_up() -> None:
    registry = FakeRegistry()

    async def scenario() -> list[Model]:
        resolver = resolver_of(registry)
        found = await asyncio.gather(*(resolver.resolve("tiny", ignore) for _ in range(50)))
        return [*found, await resolver.resolve("tiny", ignore)]

    assert asyncio.run(scenario()) == [MODEL] * 51
    assert registry.asked == ["tiny"]


def test_an_unknown_name_is_asked_again_next_time() -> None:
    registry = FakeRegistry()

    async def scenario() -> None:
        resolver = resolver_of(registry)
        for _ in range(2):
            with pytest.raises(NotFoundError):
                await resolver.resolve("gone", ignore)

    asyncio.run(scenario())
    assert registry.asked == ["gone", "gone"]


def test_a_catalog_name_is_pulled_once_and_every_waiting_request_is_told_how_far() -> None:
    registry = FakeRegistry()
    registry.go_on.set()
    events: list[Event] = []

    async def scenario() -> list[Model]:
        resolver = resolver_of(registry)
        return await asyncio.gather(*(resolver.resolve("catalog", events.append) for _ in range(2)))

    assert asyncio.run(scenario()) == [MODEL] * 2
    assert registry.pulls == 1
    half, whole = ({"pulling": {"model": "catalog", "bytes": done, "total": 2}} for done in (1, 2))
    assert events == [half, half, whole, whole]


def test_a_pull_that_nobody_waits_for_is_stopped() -> None:
    registry = FakeRegistry()

    async def scenario() -> None:
        task = asyncio.create_task(resolver_of(registry).resolve("catalog", ignore))
        while not registry.halfway.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        registry.go_on.set()
        while registry.stopped_by is None:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(scenario(), 5))
