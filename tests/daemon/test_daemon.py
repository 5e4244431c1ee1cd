"""A daemon by itself: it takes whatever doors it is given, in the event loop of whoever serves it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

from myllm.daemon.daemon import Daemon
from myllm.daemon.door import SocketDoor
from myllm.logs import open_log
from myllm.protocol import Message
from myllm.runtime.runtime import Runtime
from myllm.settings import load


class Heard:
    def __init__(self) -> None:
        self.ended: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def event(self, event: Message) -> None: ...
    def line(self, line: bytes, start: int) -> None: ...

    def done(self, event: Message) -> None:
        self.ended.set_result(event)


class ScriptedDoor:
    """A way in that is no socket, as HTTP's will be."""

    n_clients = 3

    def __init__(self, told: list[str]) -> None:
        self._told = told
        self.runtime: Runtime | None = None

    async def open(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._told.append("open")

    async def close(self) -> None:
        self._told.append("close")

    async def ask(self, message: dict[str, Any]) -> Message:
        assert self.runtime
        heard = Heard()
        self.runtime.welcome().ask(message, heard)
        return await heard.ended


def test_requests_come_by_any_door_and_doors_close_when_all_has_ended(tmp_path: Path) -> None:
    told: list[str] = []

    async def run() -> None:
        door = ScriptedDoor(told)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            listener.listen()
            daemon = Daemon(load(), open_log(None), "serve", [door, SocketDoor(listener, pid=os.getpid())])
            ready = asyncio.Event()
            serving = asyncio.create_task(daemon.serve(ready.set, lambda: told.append("drained")))
            await ready.wait()
            status = (await door.ask({"op": "status"}))["status"]
            assert status["daemon"]["connections"] == 3
            refused = await door.ask({"op": "status", "modell": "m"})
            assert refused["error"]["code"] == "usage"
            assert not daemon.stopping
            daemon.stop()
            await serving

    asyncio.run(run())
    assert told == ["open", "drained", "close"]
