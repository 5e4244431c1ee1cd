"""The log of a daemon: one JSON line an event, without what users wrote and without secrets.

A leaf. Owns the shape of a line, what is left out of it, and the file with its rotation. Must not
know what happens in a daemon. A log that cannot be written is said once on stderr and never fails
the work that it tells of. One process writes a file; any of its threads may.

The rotation is ours: of a line that a full disk cut, logging's RotatingFileHandler leaves the half, which
spoils the next, and for a line longer than a file it sets aside an empty one.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, Protocol

from myllm.errors import MyllmError
from myllm.paths import make_private

Level = Literal["debug", "info", "warning", "error"]

MAX_BYTES: Final = 5 * 2**20
OLD_FILES: Final = 3
"""Beside FILE there are FILE.1, the newest, to FILE.3."""
MAX_CHARS: Final = 4000
"""Of a longer text only the length is written: it quotes what a stranger sent, and looking for secrets in
it takes time that grows with its square.
"""
NEVER: Final = frozenset(
    {
        *("prompt", "system", "messages", "content", "text", "texts", "full_text", "token", "input"),
        *("authorization", "api_key"),
    }
)
"""Fields that hold what users and models wrote, or keys; left out at any depth."""
HIDDEN: Final = "***"

_URL_USER: Final = re.compile(r"(:/{1,2})[^\s/]*@")  # one slash: a URL that became a Path
"""Up to the last @, as a password may have one in it."""
_URL_QUERY: Final = re.compile(r"(:/{1,2}[^\s?#]*[?#])\S+")
"""And a fragment, where OAuth puts tokens."""
_SECRET: Final = re.compile(
    r"""(hf_)[a-z0-9]{6,}
    | ((?:(?<![a-z])|(?<=\\[nrt]))sk-)[\w-]{6,}  # not the end of task-…, but what repr() puts before it
    | (bearer\s+)\S{6,}""",
    re.IGNORECASE | re.VERBOSE,
)


class Sink(Protocol):
    """Where lines go; never raises."""

    def write(self, line: str) -> None: ...

    def close(self) -> None: ...


def open_log(file: Path | None) -> Log:
    """The log in `file`, which is made with its folder at the first event; None: on stderr."""
    return Log(_Stderr() if file is None else _RotatingFile(file))


class Log:
    """Takes events. No method raises."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._writing = threading.Lock()

    def write(self, event: str, /, *, level: Level = "info", **fields: object) -> None:
        """One line: time (UTC, ms), level, event, then `fields` as given, e.g. `request=17`.

        Blocks for as long as the disk takes.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": now, "level": level, "event": redact(event)}
        with self._writing:
            self._sink.write(_encode({**line, **_without(fields, *line)}))

    def close(self) -> None:
        """Closes the file; the next event would open it again."""
        with self._writing:
            self._sink.close()


def redact(text: str) -> str:
    """`text` without Hugging Face and API keys, and without user names, passwords and queries in URLs."""
    if len(text) > MAX_CHARS:
        return f"{len(text)} characters"
    text = _URL_USER.sub(rf"\1{HIDDEN}@", text)
    text = _URL_QUERY.sub(rf"\1{HIDDEN}", text)
    return _SECRET.sub(lambda match: f"{match[match.lastindex or 0]}{HIDDEN}", text)


def _encode(line: dict[str, object]) -> str:
    """JSON in printable ASCII, so that no control character of whatever kind reaches a terminal."""
    return json.dumps(line, separators=(",", ":"), ensure_ascii=True) + "\n"


def _without(fields: dict[str, object], *names: str) -> dict[str, object]:
    return {
        redact(str(key)): _plain(value)
        for key, value in fields.items()
        if str(key).lower() not in NEVER and key not in names
    }


def _plain(value: object) -> object:
    """What JSON can say of `value`, redacted."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes() | bytearray():
            return f"{len(value)} bytes"
        case dict():
            return _without(value)
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
        case _:
            return redact(str(value))


class _Stderr:
    def write(self, line: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            sys.stderr.write(line)
            sys.stderr.flush()

    def close(self) -> None:
        pass


class _RotatingFile:
    """A private file that is no symlink's target, and its predecessors; holds whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._size = 0
        self._failed = False

    def write(self, line: str) -> None:
        data = line.encode("ascii")
        try:
            self._append(self._open_with_room(len(data)), data)
        except (OSError, MyllmError) as error:
            self.close()  # the next event tries again
            if not self._failed:
                self._failed = True
                why = error.strerror if isinstance(error, OSError) else error
                _Stderr().write(f"myllm: {self._path}: the log cannot be written: {why}; make room for it\n")

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _open_with_room(self, n_bytes: int) -> int:
        """The descriptor of the file, a new one where the old would grow over MAX_BYTES."""
        descriptor = self._open() if self._descriptor is None else self._descriptor
        if self._size == 0 or self._size + n_bytes <= MAX_BYTES:
            return descriptor
        self.close()
        names = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, OLD_FILES + 1))]
        for newer, older in reversed(list(pairwise(names))):
            with suppress(FileNotFoundError):
                newer.replace(older)
        return self._open()

    def _open(self) -> int:
        make_private(self._path.parent)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o600)  # not blocking: a FIFO has no reader
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        os.fchmod(self._descriptor, 0o600)
        self._size = status.st_size
        return self._descriptor

    def _append(self, descriptor: int, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(descriptor, self._size)
            raise
        self._size += len(data)
