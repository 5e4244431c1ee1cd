"""Reading conversations from a file of any known format, which its content tells.

Owns how a format is recognised. Must not know what is in one beyond that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from itertools import chain
from pathlib import Path
from typing import Any, Final

from myllm.errors import BadDataError, IOFailureError, NotFoundError, PermissionDeniedError
from myllm.protocol import ROLES
from myllm.transcripts import FORMATS, chatgpt, claude_code, codex, llm_logs, native, openai
from myllm.transcripts.json_lines import BOM, Line, lines, loads
from myllm.transcripts.transcript import Notes, Transcript

SQLITE: Final = b"SQLite format 3\0"
"""What every SQLite file begins with (sqlite.org/fileformat.html)."""
MAX_WHOLE: Final = 2**30
"""Bytes of a file that is one JSON value, and has to be in memory."""
PEEK: Final = 64 * 1024
LINES: Final[dict[str, Callable[[Iterable[Line], Notes, float], Iterator[Transcript]]]] = {
    "myllm": native.parse,
    "openai": openai.parse,
    "claude-code": claude_code.parse,
    "codex": codex.parse,
}


def read(
    path: Path, notes: Notes, format_: str | None = None, now: float | None = None
) -> Iterator[Transcript]:
    """The conversations in a file, one in memory at a time where the format allows; blocks on the disk.

    None for `format_` recognises it. What has no date is of `now`. What cannot be kept is in
    `notes` at the end. Raises BadDataError for a file that is none or holds none, and the file's errors.
    """
    with _errors_named(str(path)), BufferedReader(path.open("rb", buffering=0), PEEK) as file:
        yield from _parsed(file, path, notes, format_, now)


def read_stream(
    raw: RawIOBase, name: str, notes: Notes, format_: str | None = None, now: float | None = None
) -> Iterator[Transcript]:
    """The same of what is open already, say a pipe, and is closed; `name` is what errors call it."""
    with _errors_named(name), BufferedReader(raw, PEEK) as file:
        yield from _parsed(file, None, notes, format_, now)


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except BadDataError as error:
        raise BadDataError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error
    except FileNotFoundError as error:
        raise NotFoundError(f"{name}: no such file; check the path") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{name}: permission denied; make it readable to you") from error
    except OSError as error:
        raise IOFailureError(f"{name}: cannot be read: {error.strerror or error}") from error


def recognised(line: bytes) -> str:
    """The format of a file by its first line. Raises BadDataError."""
    try:
        first = loads(line)
    except BadDataError:
        first = None
    match first:
        case {"format": native.FORMAT}:
            return "myllm"
        case {"messages": list()}:
            return "openai"
        case {"role": role, "content": _} if role in ROLES and "type" not in first:
            return "openai"
        case {"mapping": dict()}:
            return "chatgpt"
        case {"payload": dict(), "type": kind} if kind in codex.ENVELOPES:
            return "codex"
        case {"id": str(), "timestamp": str()} if "type" not in first:
            return "codex"
        case {"type": str()}:
            return "claude-code"
    raise BadDataError(f"of no known format; name one of {', '.join(FORMATS)}")


def _parsed(
    file: BufferedReader[Any], path: Path | None, notes: Notes, format_: str | None, now: float | None
) -> Iterator[Transcript]:
    """What is in a file, whose `path` is known where it has one."""
    found = False
    for transcript in _of_format(file, path, notes, format_, time.time() if now is None else now):
        found = True
        yield transcript
    if not found:
        raise BadDataError(f"no conversation in it; {'; '.join(notes.lines()[:3]) or 'it is empty'}")


def _of_format(
    file: BufferedReader[Any], path: Path | None, notes: Notes, format_: str | None, now: float
) -> Iterator[Transcript]:
    start = file.peek(PEEK)
    if format_ == "llm" or (format_ is None and start.startswith(SQLITE)):
        if path is None:
            raise BadDataError("a database cannot be read from a pipe; give the file's path")
        return llm_logs.parse(path, notes, now)
    if format_ == "chatgpt" or (format_ is None and start.removeprefix(BOM).lstrip().startswith(b"[")):
        return chatgpt.parse(_whole(file), notes, now)
    rest = lines(file)
    first = next(rest, None)
    if first is None:
        return iter(())
    format_ = format_ or recognised(first.data)
    if format_ == "chatgpt":
        return chatgpt.parse(first.data + b"".join(line.data for line in rest), notes, now)
    return LINES[format_](chain([first], rest), notes, now)


def _whole(file: BufferedReader[Any]) -> bytes:
    data = file.read(MAX_WHOLE + 1)
    if len(data) > MAX_WHOLE:
        raise BadDataError(f"longer than {MAX_WHOLE:,} bytes")
    return data.removeprefix(BOM)
