"""Work that many wait for is done once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from myllm.errors import BadDataError
from myllm.runtime.single_flight import SingleFlight, Watch


def ignore(event: dict[str, Any]) -> None:
    pass


def test_all_who_join_get_one_result_and_the_progress_from_then_on() -> None:
    async def scenario() -> None:
        started = 0
        go = asyncio.Event()

        async def work(tell: Watch) -> str:
            nonlocal started
            started += 1
            await go.wait()
            tell({"loading": 0.5})
            return "done"

        seen: list[dict[str, Any]] = []
        shared = SingleFlight(work)
        waiting = [asyncio.create_task(shared.join(seen.append)) for _ in range(3)]
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(*waiting) == ["done"] * 3
        assert await shared.join(ignore) == "done"
        assert seen == [{"loading": 0.5}] * 3
        assert started == 1

    asyncio.run(scenario())


def test_all_who_join_get_the_error() -> None:
    async def scenario() -> None:
        async def work(tell: Watch) -> str:
            await asyncio.sleep(0)
            raise BadDataError("broken")

        shared = SingleFlight(work)
        results = await asyncio.gather(*(shared.join(ignore) for _ in range(2)), return_exceptions=True)
        assert [str(result) for result in results] == ["broken"] * 2
        with pytest.raises(BadDataError):
            await shared.join(ignore)

    asyncio.run(scenario())


def test_work_is_cancelled_when_the_last_who_waited_is_gone_and_not_before() -> None:
    async def scenario() -> None:
        cancelled = False

        async def work(tell: Watch) -> str:
            nonlocal cancelled
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise
            return ""

        shared = SingleFlight(work)
        first, second = (asyncio.create_task(shared.join(ignore)) for _ in range(2))
        for task, expected in ((first, False), (second, True)):
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0.01)
            assert cancelled is expected

    asyncio.run(scenario())


def test_it_is_forgotten_as_soon_as_it_is_given_up_or_has_failed_and_never_when_it_succeeds() -> None:
    async def scenario() -> None:
        forgotten: list[SingleFlight[str]] = []

        async def hesitate(tell: Watch) -> str:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.05)
            return ""

        async def fail(tell: Watch) -> str:
            raise BadDataError("broken")

        async def succeed(tell: Watch) -> str:
            return ""

        given_up = SingleFlight(hesitate, forgotten.append)
        waiting = asyncio.create_task(given_up.join(ignore))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert forgotten == [given_up]
        failed = SingleFlight(fail, forgotten.append)
        await asyncio.gather(failed.join(ignore), return_exceptions=True)
        await SingleFlight(succeed, forgotten.append).join(ignore)
        await asyncio.sleep(0)
        assert set(forgotten) == {given_up, failed}

    asyncio.run(scenario())
