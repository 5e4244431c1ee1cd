"""Fixtures for the command line: `myllm` as a process, and streams that are files."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import orjson
import pytest

from myllm.cli.console import Streams
from myllm.errors import MyllmError, UnavailableError
from myllm.protocol import encode
from myllm.socket_file import socket_path

MYLLM = (sys.executable, "-m", "myllm")


class Ended:
    """How a run of `myllm` ended."""

    def __init__(self, process: subprocess.CompletedProcess[bytes]) -> None:
        self.status = process.returncode
        self.out = process.stdout
        self.err = process.stderr.decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """stdout as JSONL."""
        return [orjson.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ended]

OPEN = Path("/proc/self/fd")


@pytest.fixture
def run() -> Run:
    """Runs `myllm` with arguments; `stdin` is bytes, or None for no input at all (/dev/null)."""

    def start(
        *arguments: object, stdin: bytes | None = None, under: Sequence[str] = (), **options: Any
    ) -> Ended:
        """`under` is a command that runs the one after it."""
        command = [*under, *MYLLM, *map(str, arguments)]
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **given, **options}
        return Ended(subprocess.run(command, check=False, **options))

    return start


def on_a_terminal(*arguments: object) -> str:
    """What a terminal of 200 columns shows of a run whose three streams it is; the run must succeed."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    command = [*MYLLM, *map(str, arguments)]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while data := os.read(leader, 4096):
                shown += data
        except OSError:  # Linux says EIO where the other side is closed
            pass
        assert process.wait(10) == 0
    os.close(leader)
    return shown.decode().replace("\r\n", "\n")


def processes_of(home: Path) -> dict[int, str]:
    """Command lines, by pid, of the processes that were started with this HOME."""
    mine = b"HOME=" + os.fsencode(home)
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mine in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:  # it ended just now, or is another user's
                continue
    return found


@pytest.fixture
def daemons(home: Path, run: Run) -> Iterator[None]:
    """For tests that start a daemon: it is stopped, and no process, socket or descriptor of it is left."""
    before = set(OPEN.iterdir())  # of which an earlier test's may be closed meanwhile
    yield
    run("load", "--stop")
    left = processes_of(home)
    for _ in range(100):
        if not (left := processes_of(home)):
            break
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}
    assert not os.path.lexists(socket_path())
    assert [each for each in OPEN.iterdir() if each not in before and each.is_symlink()] == []


class Captured:
    """Streams over files, and what was written to them."""

    def __init__(self, folder: Path, stdin: bytes) -> None:
        (folder / "stdin").write_bytes(stdin)
        self._out = folder / "stdout"
        given = os.open(folder / "stdin", os.O_RDONLY)
        taken = os.open(self._out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fds = given, taken
        self._err = io.StringIO()
        self.streams = Streams(given, taken, self._err)

    @property
    def out(self) -> bytes:
        return self._out.read_bytes()

    @property
    def err(self) -> str:
        return self._err.getvalue()

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


class ScriptedClient:
    """Answers each request with the event or events of `answer(request)`; an exception among them ends the
    connection."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self._answer = answer
        self._lines: SimpleQueue[bytes | MyllmError] = SimpleQueue()
        self._lost: MyllmError | None = None

    def __enter__(self) -> ScriptedClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.put(UnavailableError("closed"))

    def send(self, request: dict[str, Any]) -> None:
        if self._lost:
            raise self._lost
        answer = self._answer(request)
        for event in answer if isinstance(answer, list) else [answer]:
            if isinstance(event, MyllmError):
                self._lost = event
                self._lines.put(event)
            else:
                self._lines.put(encode({"id": request["id"], **event}).rstrip())

    def batches(self) -> Iterator[list[bytes]]:
        while not isinstance(line := self._lines.get(), MyllmError):
            yield [line]
        raise line


@pytest.fixture
def captured(tmp_path: Path) -> Iterator[Callable[..., Captured]]:
    """Makes streams: `captured(stdin=b"…")`."""
    made: list[Captured] = []

    def make(stdin: bytes = b"") -> Captured:
        folder = tmp_path / f"streams{len(made)}"
        folder.mkdir()
        made.append(Captured(folder, stdin))
        return made[-1]

    yield make
    for one in made:
        one.close()
