"""What the Runtime may rely on of every backend, run on a worker process and on a script in this process.

The script stands for what is no process at all, such as a remote server: the seam must not need one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm import events
from myllm.errors import UnavailableError
from myllm.models.registry import Model
from myllm.protocol import Message
from myllm.requests import LoadOptions
from myllm.runtime.backend import Backend
from myllm.runtime.fleet import Fleet
from myllm.runtime.keeper import Keeper
from myllm.runtime.reply import Reply
from myllm.runtime.runtime import Runtime
from myllm.runtime.worker import start_worker
from myllm.settings import load

Start = Callable[[], Awaitable[Backend]]
USAGE = events.Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=3, dropped_messages=0)
TIMINGS = events.Timings(queue_ms=0, prefill_ms=0, ttft_ms=0, decode_ms=0, tokens_per_second=0)
ASKED = {"op": "gen", "prompt": "hi"}


class Scripted:
    """A backend without a process: counts up, a token a moment, until it is told otherwise."""

    pid = None
    dismissed = False
    last_words = ""
    window = None

    def __init__(self) -> None:
        self._running: dict[Reply, asyncio.Task[None]] = {}
        self._going: dict[Reply, asyncio.Event] = {}
        self._tell_idle: Callable[[], None] = lambda: None
        self._tell_dead: list[Callable[[asyncio.Task[None]], None]] = []

    @property
    def busy(self) -> bool:
        return bool(self._running)

    async def load(self, path: Path, name: str, options: LoadOptions, progress: Any) -> Message:
        progress(events.loading(0.5))
        return events.done(window=99)

    def submit(self, message: Message, client: int, reply: Reply) -> None:
        if self.dismissed:
            reply.done(events.failed(UnavailableError("script: it is over")))
            return
        going = self._going[reply] = asyncio.Event()
        going.set()
        self._running[reply] = asyncio.ensure_future(self._count(message.get("max_tokens", 3), reply, going))

    async def _count(self, last: int, reply: Reply, going: asyncio.Event) -> None:
        text, event = "", None
        try:
            for number in range(last):
                await asyncio.sleep(0.005)
                await going.wait()
                text += f" {number}"
                line = orjson.dumps({"id": 1, **events.token(f" {number}")})
                reply.line(line, line.index(b'"token"'))
            event = events.generated(text, "length", USAGE, TIMINGS)
        except asyncio.CancelledError:
            event = events.generated(text, "cancelled", USAGE, TIMINGS)
            if self.dismissed:
                event = events.failed(UnavailableError("script: it was ended"))
        del self._running[reply], self._going[reply]
        reply.done(event)
        if not self._running:
            self._tell_idle()

    def cancel(self, reply: Reply) -> None:
        if task := self._running.get(reply):
            task.cancel()

    def pause(self, reply: Reply, paused: bool) -> None:
        if going := self._going.get(reply):
            (going.clear if paused else going.set)()

    async def status(self) -> Message:
        return {"busy": len(self._running), "window": 99}

    def when_idle(self, tell: Callable[[], None]) -> None:
        self._tell_idle = tell

    def when_dead(self, tell: Callable[[asyncio.Task[None]], None]) -> None:
        self._tell_dead.append(tell)

    async def close(self) -> None:
        self.dismissed = True
        burial = asyncio.get_running_loop().create_task(self._bury())
        for tell in self._tell_dead:
            tell(burial)
        await burial

    async def _bury(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


async def start_script() -> Backend:
    return Scripted()


class Asked:
    """An asker's end: what came, and when it is over."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ends: list[Message] = []
        self.over = asyncio.Event()
        self.first = asyncio.Event()

    def event(self, event: Message) -> None:
        pass

    def line(self, line: bytes, start: int) -> None:
        self.tokens.append(orjson.loads(b"{" + line[start:])["token"])
        self.first.set()

    def done(self, event: Message) -> None:
        self.ends.append(event)
        self.over.set()

    async def end(self) -> Message:
        async with asyncio.timeout(20):
            await self.over.wait()
        (event,) = self.ends
        return event


@pytest.fixture(params=["worker", "script"])
def start(request: pytest.FixtureRequest) -> Start:
    return {"worker": start_worker, "script": start_script}[request.param]


@pytest.fixture
def path(fake_model: Callable[..., Path]) -> Path:
    return fake_model(ms_per_token=5, tokens=[f" {n}" for n in range(1000)])


def on(start: Start, path: Path, scenario: Callable[[Backend], Awaitable[None]]) -> None:
    """Runs the scenario on a backend that has the model loaded, and ends it."""

    async def run() -> None:
        backend = await start()
        try:
            await backend.load(path, "model", LoadOptions(), lambda event: None)
            await scenario(backend)
        finally:
            await backend.close()

    asyncio.run(run())


def test_each_request_gets_its_events_in_order_and_one_end(start: Start, path: Path) -> None:
    async def scenario(backend: Backend) -> None:
        asked = [Asked() for _ in range(3)]
        for number, each in enumerate(asked, 1):
            backend.submit({**ASKED, "max_tokens": number}, number, each)
        assert backend.busy
        for number, each in enumerate(asked, 1):
            end = await each.end()
            assert end["full_text"] == "".join(each.tokens)
            assert end["finish_reason"] == "length"
            assert len(each.tokens) == number
        assert not backend.busy

    on(start, path, scenario)


def test_a_cancelled_request_ends_as_such_and_the_others_go_on(start: Start, path: Path) -> None:
    async def scenario(backend: Backend) -> None:
        cancelled, other = Asked(), Asked()
        backend.submit({**ASKED, "max_tokens": 900}, 1, cancelled)
        backend.submit({**ASKED, "max_tokens": 20}, 2, other)
        await cancelled.first.wait()
        backend.cancel(cancelled)
        assert (await cancelled.end())["finish_reason"] == "cancelled"
        backend.cancel(cancelled)  # it is over: nothing happens
        backend.pause(cancelled, True)
        assert (await other.end())["finish_reason"] == "length"

    on(start, path, scenario)


def test_a_paused_request_stands_still_until_it_goes_on(start: Start, path: Path) -> None:
    async def scenario(backend: Backend) -> None:
        paused, other = Asked(), Asked()
        backend.submit({**ASKED, "max_tokens": 30}, 1, paused)
        await paused.first.wait()
        backend.pause(paused, True)
        backend.submit({**ASKED, "max_tokens": 30}, 2, other)
        await other.end()
        assert not paused.ends
        backend.pause(paused, False)
        assert len((await paused.end())["full_text"].split()) == 30

    on(start, path, scenario)


def test_it_says_when_it_is_idle_and_how_it_is(start: Start, path: Path) -> None:
    async def scenario(backend: Backend) -> None:
        idle = asyncio.Event()
        backend.when_idle(idle.set)
        asked = Asked()
        backend.submit({**ASKED, "max_tokens": 500}, 1, asked)
        await asked.first.wait()
        assert (await backend.status())["busy"] == 1
        assert not idle.is_set()
        backend.cancel(asked)
        async with asyncio.timeout(20):
            await idle.wait()

    on(start, path, scenario)


def test_its_end_is_told_and_fails_what_it_has_and_what_comes_later(start: Start, path: Path) -> None:
    async def scenario(backend: Backend) -> None:
        burials: list[asyncio.Task[None]] = []
        backend.when_dead(burials.append)
        before, after = Asked(), Asked()
        backend.submit({**ASKED, "max_tokens": 900}, 1, before)
        await before.first.wait()
        await backend.close()
        assert backend.dismissed
        await burials[0]
        backend.submit(dict(ASKED), 1, after)
        for asked in (before, after):
            assert (await asked.end())["error"]["code"] in ("unavailable", "worker_crashed")

    on(start, path, scenario)


def test_a_runtime_answers_with_a_backend_that_is_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> Message:
        runtime = Runtime(load(), Keeper(Fleet(), None, start_script))
        there = Model("remote", Path("/remote"), "endpoint")
        monkeypatch.setattr(runtime, "_find", lambda request, call, default: asyncio.sleep(0, there))
        asked = Asked()
        runtime.welcome().ask({**ASKED, "max_tokens": 2}, asked)
        try:
            return await asked.end()
        finally:
            await runtime.close()

    end = asyncio.run(run())
    assert (end["full_text"], end["finish_reason"]) == (" 0 1", "length")
    assert end["timings"]["load_ms"] >= 0
