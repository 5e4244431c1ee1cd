"""A backend that is a worker process: load a model, pass requests on, bury the dead.

Owns the process, whose request is whose over there, and its last words. Must not know names of models,
connections or what runs in a worker. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from myllm import __version__, events
from myllm.errors import BadDataError, MyllmError, UnavailableError, WorkerCrashedError, from_wire
from myllm.protocol import PROTOCOL, TOKEN_LINE, Message, MessageReader, encode, hello, parse
from myllm.requests import LoadOptions
from myllm.runtime.last_words import LastWords, how_it_ended
from myllm.runtime.reply import Reply
from myllm.spawning import WorkerProcess, spawn

GRACE: Final = 0.5
"""Seconds a worker has to end when its connection is closed, before it is killed."""
STATUS_WAIT: Final = 1.0
"""Seconds that a worker has to say how it is."""
CHUNK: Final = 256 * 1024
_FIRST_LOOK: Final = 0.001
_LONGEST_LOOK: Final = 0.05


class Worker(asyncio.Protocol):
    """One worker process and the requests it has, see `Backend`; make it with `Worker.attach`."""

    def __init__(self, process: WorkerProcess) -> None:
        self.dismissed = False
        """Whether its end was asked for."""
        self.window: int | None = None
        """The most tokens of prompt and answer, once a model is loaded."""
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._reader = MessageReader()
        self._words = LastWords()
        self._replies: dict[int, Reply] = {}
        self._ids: dict[Reply, int] = {}
        self._next_id = 0
        self._model = "model"
        self._progress: Callable[[Message], None] = lambda event: None
        self._loaded: asyncio.Future[Message] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._burial: asyncio.Task[None] | None = None
        self._mourners: list[Callable[[asyncio.Task[None]], None]] = []
        self._rested: Callable[[], None] = lambda: None
        self._asked: dict[int, asyncio.Future[Message]] = {}

    @classmethod
    async def attach(cls, process: WorkerProcess) -> Worker:
        """Takes over a process that `spawn` started."""
        worker = cls(process)
        await worker._loop.create_connection(lambda: worker, sock=process.protocol)
        worker._loop.add_reader(process.words, worker._hear)
        return worker

    @property
    def alive(self) -> bool:
        return self._burial is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The end of what it wrote on stdout and stderr, in one line."""
        return str(self._words)

    @property
    def busy(self) -> bool:
        """Whether it has requests."""
        return bool(self._replies)

    async def status(self) -> Message:
        """What its engine says of itself. Raises TimeoutError where it does not answer soon."""
        self._next_id = request_id = self._next_id + 1
        asked = self._asked[request_id] = self._loop.create_future()
        self._send({"op": "status", "id": request_id})
        try:
            async with asyncio.timeout(STATUS_WAIT):
                status: Message = (await asked)["status"]
                return status
        finally:
            del self._asked[request_id]

    async def load(
        self, path: Path, name: str, options: LoadOptions, progress: Callable[[Message], None]
    ) -> Message:
        """Loads the model; `progress` takes `loading` events. Raises what the engine raised, or
        WorkerCrashedError.
        """
        self._model = name
        self._progress = progress
        self._send({"op": "load", "path": str(path), "name": name, "options": options.to_wire()})
        return await self._loaded

    def submit(self, message: Message, client: int, reply: Reply) -> None:
        """Passes a request on; all its events, the last too, go to `reply`."""
        if not self.alive:
            reply.done(events.failed(UnavailableError(f"{self._model}: its worker just ended; try again")))
            return
        self._next_id += 1
        self._replies[self._next_id] = reply
        self._ids[reply] = self._next_id
        self._send({**message, "id": self._next_id, "client": client})

    def cancel(self, reply: Reply) -> None:
        """Asks the worker to end a request; its done event follows."""
        self._tell("cancel", reply)

    def pause(self, reply: Reply, paused: bool) -> None:
        """Has the worker stop or go on with a request."""
        self._tell("pause" if paused else "resume", reply)

    def _tell(self, op: str, reply: Reply) -> None:
        if self.alive and reply in self._ids:
            self._send({"op": op, "id": self._ids[reply]})

    def when_idle(self, tell: Callable[[], None]) -> None:
        """Has `tell` called whenever the last of its requests has ended."""
        self._rested = tell

    def when_dead(self, tell: Callable[[asyncio.Task[None]], None]) -> None:
        """Has `tell` called as soon as the process is known to end, with the task that reaps it and then
        fails its requests.
        """
        self._mourners.append(tell)

    async def close(self) -> None:
        """Ends the process, which frees all it had; its requests fail. Waits at most about `GRACE`."""
        self.dismissed = True
        if self._transport:
            self._transport.abort()
        while self._burial is None:
            await asyncio.sleep(0)
        await asyncio.shield(self._burial)

    # ── asyncio.Protocol ────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send(hello(__version__))

    def data_received(self, data: bytes) -> None:
        try:
            for line in self._reader.feed_lines(data):
                if token := TOKEN_LINE.match(line):
                    if reply := self._replies.get(int(token[1])):
                        reply.line(line, token.end())
                else:
                    self._take(parse(line))
        except MyllmError as error:
            self._words.hear(f"\nit sent what is no message: {error}\n".encode())
            self._kill()

    def connection_lost(self, exc: Exception | None) -> None:
        with suppress(OSError):  # where writing failed first, what it had said is still to be read
            while data := self._process.protocol.recv(CHUNK):
                self.data_received(data)
        self._burial = self._loop.create_task(self._bury())
        for tell in self._mourners:
            tell(self._burial)

    # ── events ──────────────────────────────────────────────────────────────────────────────

    def _take(self, event: Message) -> None:
        request_id = event.pop("id", None)
        if "hello" in event:
            _check_hello(event["hello"])
        elif request_id is None:
            self._take_load(event)
        elif reply := self._replies.get(request_id):
            if event.get("done"):
                del self._replies[request_id], self._ids[reply]
                reply.done(event)
                if not self._replies:
                    self._rested()
            else:
                reply.event(event)
        elif asked := self._asked.get(request_id):
            asked.set_result(event)

    def _take_load(self, event: Message) -> None:
        if not event.get("done"):
            self._progress(event)
        elif not self._loaded.done():
            if error := event.get("error"):
                self._fail_load(from_wire(error))
            else:
                self.window = event.get("window")
                self._loaded.set_result(event)

    def _fail_load(self, error: MyllmError) -> None:
        self._loaded.set_exception(error)
        self._loaded.exception()  # noted, as perhaps nobody waits for it any more

    def _send(self, message: Message) -> None:
        if self._transport:
            self._transport.write(encode(message))

    # ── the end ─────────────────────────────────────────────────────────────────────────────

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            if data := os.read(self._process.words, 64 * 1024):
                self._words.hear(data)
            else:
                self._loop.remove_reader(self._process.words)

    async def _bury(self) -> None:
        """Reaps the process, and fails its requests with how it died."""
        status = await self._reap()
        self._loop.remove_reader(self._process.words)
        with suppress(BlockingIOError):
            while data := os.read(self._process.words, 64 * 1024):
                self._words.hear(data)
        os.close(self._process.words)
        last_words = str(self._words)
        error = WorkerCrashedError(
            f"{self._model}: its worker {how_it_ended(status)}"
            + (f"; its last words: {last_words}" if last_words else "; try again")
        )
        if not self._loaded.done():
            self._fail_load(error)
        replies, self._replies = self._replies, {}
        self._ids.clear()
        for reply in replies.values():
            reply.done(events.failed(error))

    async def _reap(self) -> int | None:
        """The wait status; a process that does not end by itself is killed after `GRACE`."""
        pause, waited = _FIRST_LOOK, 0.0
        while True:
            try:
                pid, status = os.waitpid(self._process.pid, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid:
                return status
            await asyncio.sleep(pause)
            waited += pause
            pause = min(2 * pause, _LONGEST_LOOK)
            if waited > GRACE:
                self._kill()

    def _kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)


async def start_worker() -> Worker:
    """A worker in a new process, with nothing loaded. Raises UnavailableError."""
    return await Worker.attach(spawn())


class Spare:
    """Starts workers, the first of them in the process that was started in advance, if one was."""

    def __init__(self, process: WorkerProcess | None) -> None:
        self._process = process

    async def start(self) -> Worker:
        """A worker with nothing loaded. Raises UnavailableError."""
        process, self._process = self._process or spawn(), None
        return await Worker.attach(process)

    async def close(self) -> None:
        """Ends the process that nobody wanted."""
        if self._process:
            await (await self.start()).close()


def _check_hello(greeting: Any) -> None:
    if not isinstance(greeting, dict) or greeting.get("protocol") != PROTOCOL:
        raise BadDataError("another version of MyLLM answers")
