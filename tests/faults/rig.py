"""A real daemon under test: started as `myllm load` starts it, looked at from outside, and buried.

Everything is found by the test's own HOME in the processes' environment, so that nothing of anybody
else's is ever counted or killed. Linux only, as /proc tells it all.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm import spawning
from myllm.client import start
from myllm.client.client import Client
from myllm.client.dial import dial, dial_daemon
from myllm.protocol import MessageReader, encode, hello
from myllm.socket_file import socket_path

Event = dict[str, Any]
MYLLM = (sys.executable, "-m", "myllm")
HELLO = encode(hello("test"))
WAIT = 10.0
"""Seconds after which a test gives up on what must happen, where it promises nothing about time."""


def times(few: int, many: int, **options: Any) -> pytest.MarkDecorator:
    """Runs a test with `count` = `few`, and with `many` under the marker `slow`."""
    full = pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("count", [few, full], **options)


def until(true: Callable[[], Any], seconds: float = WAIT) -> float:
    """Waits until something is true, at most so long; the seconds it took. Fails the test where it is not."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            pytest.fail(f"not within {seconds} s: {getattr(true, '__doc__', None) or true}")
        time.sleep(0.01)
    return time.monotonic() - began


def processes() -> set[int]:
    """Living processes that were started in this test's home, but this one."""
    mark = b"HOME=" + os.fsencode(os.environ["HOME"])
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it ended just now; a zombie's environment is empty
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def children(pid: int) -> set[int]:
    """Living children of a process: of a daemon, its workers."""
    with suppress(OSError):
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return set()


def descriptors(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.append(str(entry.readlink()))
    return sorted(found)


def memory(*pids: int) -> int:
    """Bytes that processes have in memory, shared pages by shares (PSS)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def gen(model: Path, prompt: str = "a b c", **parameters: Any) -> Event:
    """A request."""
    return {"op": "gen", "model": str(model), "prompt": prompt, **parameters}


def numbered(count: int) -> list[str]:
    """Tokens of which each is another, so that a lost or doubled one shows."""
    return [f" {number}" for number in range(count)]


def text_of(events: list[Event]) -> str:
    return "".join(event.get("token", "") for event in events)


class Daemon:
    """One background daemon of this version, running already or started."""

    def __init__(self) -> None:
        with closing(start.daemon()) as client:
            self.pid: int = client.greeting["pid"]
        self.path = socket_path()
        self.status()
        until(self._alone)
        self._open = len(descriptors(self.pid))
        self._ended: int | None = None

    # ── from inside ─────────────────────────────────────────────────────────────────────────

    def client(self) -> Client:
        """A new connection."""
        client = dial_daemon()
        assert client is not None
        return client

    def ask(self, request: Event) -> list[Event]:
        """All events of one request on a connection of its own."""
        with self.client() as client:
            return [orjson.loads(line) for line in client.stream(request)]

    def done(self, request: Event) -> Event:
        """The last of them."""
        return self.ask(request)[-1]

    def status(self) -> Event:
        """What it says of itself."""
        status: Event = self.done({"op": "status"})["status"]
        return status

    def models(self) -> dict[str, Event]:
        """What is loaded, by the stem of its file."""
        return {Path(model["path"]).name.partition(".")[0]: model for model in self.status()["models"]}

    def is_quiet(self) -> bool:
        """every model is ready and none has work"""
        return all(m["state"] == "ready" and m["busy"] == m["waiting"] == 0 for m in self.models().values())

    def raw(self) -> socket.socket:
        """A connection on which nothing has been said."""
        connection = dial(self.path, WAIT)
        assert connection is not None
        connection.settimeout(WAIT)
        return connection

    def talk(self, *sent: bytes) -> list[Event]:
        """Sends bytes; the events up to the connection's end, which the daemon must make; without hello."""
        with self.raw() as connection:
            with suppress(ConnectionError):  # it had enough, and did not read the rest
                for data in sent:
                    connection.sendall(data)
            first, *events = received(connection)
            assert "hello" in first
            return events

    # ── from outside ────────────────────────────────────────────────────────────────────────

    @property
    def workers(self) -> set[int]:
        return children(self.pid)

    def memory(self) -> int:
        """Bytes of the daemon's own process that nobody shares."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) * 1024
        raise AssertionError

    def log(self) -> list[Event]:
        """What it has logged."""
        file = Path(os.environ["XDG_STATE_HOME"]) / "myllm" / "daemon.log"
        return [orjson.loads(line) for line in file.read_bytes().splitlines()]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, seconds: float = WAIT) -> int:
        """Waits for its end: its exit status, or the negative number of the signal that ended it."""
        deadline = time.monotonic() + seconds
        while self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                pytest.fail(f"the daemon has not ended after {seconds} s")
            else:
                time.sleep(0.005)
        return self._ended

    @property
    def lives(self) -> bool:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended = os.waitstatus_to_exitcode(status)
        return self._ended is None

    def bury(self) -> None:
        """Its end, if it lives: all it had open for others is closed first, and it leaves no socket."""
        if not self.lives:
            return
        self.done({"op": "unload", "all": True})
        until(self._is_back)
        self.signal(signal.SIGTERM)
        assert self.ended() == 0
        assert not os.path.lexists(self.path)

    def _alone(self) -> bool:
        """no client is connected but the one that asks"""
        return bool(self.status()["daemon"]["connections"] == 1)

    def _is_back(self) -> bool:
        """the daemon's descriptors are back to where they were"""
        return len(descriptors(self.pid)) <= self._open


def received(connection: socket.socket) -> Iterator[Event]:
    """Events up to the connection's end."""
    reader = MessageReader()
    with suppress(ConnectionError):  # the end, after all that was written, where something is left unread
        while data := connection.recv(65536):
            yield from reader.feed(data)


def end_all(pids: set[int]) -> None:
    """Ends processes of this test for good."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def command_with(prelude: str, module: str) -> list[str]:
    """As `spawning.python`, but first, with `myllm` imported, `prelude` runs in that process."""
    executable, *options, program, root, fd, name = spawning.python(module)
    head, found, tail = program.partition("from importlib")
    assert found
    return [executable, *options, f"{head}{prelude}\n{found}{tail}", root, fd, name]
