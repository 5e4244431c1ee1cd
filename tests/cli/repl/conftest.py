"""Fixtures for the REPL: in a terminal of its own, and without one for what needs none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from myllm.cli.repl.chat import Chat, begun
from myllm.cli.repl.loop import Loop
from myllm.cli.repl.screen import Screen
from myllm.cli.repl.signals import Signals
from myllm.cli.repl.talk import Talk
from myllm.cli.repl.turn import Turns
from myllm.conversation import Session
from myllm.paths import state_dir
from myllm.storage.sessions import SQLiteSessions
from tests.cli.conftest import Captured
from tests.cli.repl.stand_in import StandIn

PATIENCE = 30.0
"""Seconds for what takes a tenth of one on a machine that has nothing else to do."""
CURSOR_ASKED = b"\x1b[6n"
"""prompt-toolkit asks where the cursor is when it has drawn a prompt."""
SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_=>])")


@pytest.fixture
def store() -> Iterator[SQLiteSessions]:
    """The sessions of this test's home."""
    sessions = SQLiteSessions(state_dir())
    yield sessions
    sessions.close()


class Terminal:
    """The REPL in a terminal; `raw` is all that it wrote."""

    def __init__(
        self, arguments: tuple[str, ...], columns: int, environ: dict[str, str], **options: Any
    ) -> None:
        self._leader, follower = pty.openpty()
        self.resize(columns)
        self.raw = b""
        self._read_until = 0
        self._asked = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.repl.stand_in", *arguments],
            **{"stdin": follower, "stdout": follower, "stderr": follower, **options},
            env=os.environ | {"TERM": "xterm-256color"} | environ,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C there is its Ctrl-C
        )
        self.modes = termios.tcgetattr(follower)
        self._follower = follower

    def resize(self, columns: int) -> None:
        termios.tcsetwinsize(self._leader, (24, columns))

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def paste(self, text: str) -> None:
        """As terminals do: marked where the program wants that, and with Enter for each line's end."""
        marked = f"\x1b[200~{text}\x1b[201~" if self.marks_pastes else text
        self.type(marked.replace("\n", "\r"))

    @property
    def marks_pastes(self) -> bool:
        return self.raw.rfind(b"\x1b[?2004h") > self.raw.rfind(b"\x1b[?2004l")

    def expect(self, text: str) -> None:
        """Waits for `text` after what was waited for last; escape sequences count for nothing."""
        self._wait(lambda: text in self.shown[self._read_until :], f"{text!r}")
        self._read_until = self.shown.index(text, self._read_until) + len(text)

    def prompt(self) -> None:
        """Waits for the next prompt."""
        seen, self._asked = self._asked, self._asked + 1
        self._wait(lambda: self.raw.count(CURSOR_ASKED) > seen and self.marks_pastes, "a prompt")

    def say(self, text: str, expected: str) -> None:
        """Sends a message or a command, waits for what it shows and for the next prompt."""
        self.type(f"{text}\r")
        self.expect(expected)
        self.prompt()

    def leave(self) -> int:
        """The exit status, after what it shows till then."""
        self._wait(lambda: self.process.poll() is not None, "the end")
        return self.process.returncode

    @property
    def shown(self) -> str:
        return SEQUENCE.sub("", self.raw.decode(errors="replace")).replace("\r\n", "\n")

    def modes_now(self) -> list[Any]:
        return termios.tcgetattr(self._follower)

    def hang_up(self) -> None:
        """Closes the terminal."""
        os.close(self._follower)
        os.close(self._leader)
        self._leader = self._follower = None

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._leader is not None:
            self.hang_up()

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < end, f"{what} did not come; it showed:\n{self.shown[-2000:]}"
            if select.select([self._leader], [], [], 0.05)[0]:
                data = os.read(self._leader, 65536)
                self.raw += data
                os.write(self._leader, b"\x1b[1;1R" * data.count(CURSOR_ASKED))


OpenTerminal = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[OpenTerminal]:
    """Opens the REPL: `terminal("NAME", columns=40, environ={"NO_COLOR": "1"})`."""
    opened: list[Terminal] = []

    def start(
        *arguments: str, columns: int = 80, environ: dict[str, str] | None = None, **options: Any
    ) -> Terminal:
        opened.append(Terminal(arguments, columns, environ or {}, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


class Typed:
    """A reader of what was typed beforehand; what it was given to change is in `before`."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self.before: list[str] = []

    def read(self, before: str = "") -> str:
        self.before.append(before)
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)

    def awaiting(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


class Conversation:
    """The REPL without a terminal: answers go to `out`, all else to `err`."""

    def __init__(self, captured: Captured, store: SQLiteSessions) -> None:
        self._captured = captured
        self.client = StandIn(store, pace=0)
        self.chat: Chat = begun({}, None, "/begun/here")
        self.store = store
        self.before: list[str] = []

    def type(self, *lines: str) -> None:
        """Types these lines, then Ctrl-D."""
        with Signals() as signals:
            screen = Screen(self._captured.streams)
            talk = Talk(screen, self.store, Turns(screen, signals, lambda: self.client), self.chat)
            reader = Typed(*lines)
            Loop(talk, reader).run()
        self.before = reader.before

    @property
    def out(self) -> str:
        return self._captured.out.decode()

    @property
    def err(self) -> str:
        return self._captured.err

    @property
    def session(self) -> Session:
        """As the store has it."""
        assert self.chat.session is not None
        return self.store.find(self.chat.session.id)

    @property
    def path(self) -> list[str]:
        """What is on the session's path."""
        return [message.content for message in self.store.path(self.session.id)]


@pytest.fixture
def conversation(captured: Callable[..., Captured], store: SQLiteSessions) -> Conversation:
    return Conversation(captured(), store)


@pytest.fixture
def history() -> Path:
    """Where what was typed is kept."""
    return state_dir() / "chat_history"
