"""Reading conversations from a file of any known format, which its content tells.

Owns how a format is recognised. Must not know what is in one beyond that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal, get_args

from myllm.errors import BadDataError, IOFailureError, NotFoundError, PermissionDeniedError
from myllm.protocol import ROLES
from myllm.transcripts import chatgpt, claude_code, codex, llm_logs, native, openai
from myllm.transcripts.json_lines import BOM, Line, lines, loads
from myllm.transcripts.transcript import Notes, Transcript

SQLITE: Final = b"SQLite format 3\0"
"""What every SQLite file begins with (sqlite.org/fileformat.html)."""
MAX_WHOLE: Final = 2**30
"""Bytes of a file that is one JSON value, and has to be in memory."""
PEEK: Final = 64 * 1024
Format = Literal["myllm", "openai", "claude-code", "codex", "chatgpt", "llm"]
LINES: Final[dict[Format, Callable[[Iterable[Line], Notes, float], Iterator[Transcript]]]] = {
    "myllm": native.parse,
    "openai": openai.parse,
    "claude-code": claude_code.parse,
    "codex": codex.parse,
}
FORMATS: Final[tuple[Format, ...]] = get_args(Format)


def read(
    path: Path, notes: Notes, format_: Format | None = None, now: float | None = None
) -> Iterator[Transcript]:
    """The conversations in a file, one in memory at a time where the format allows; blocks on the disk.

    None for `format_` recognises it. What has no date is of `now`. What cannot be kept is in
    `notes` at the end. Raises BadDataError for a file that is none or holds none, and the file's errors.
    """
    moment = time.time() if now is None else now
    found = False
    try:
        with BufferedReader(path.open("rb", buffering=0), PEEK) as file:
            for transcript in _parsed(path, file, notes, format_, moment):
                found = True
                yield transcript
    except BadDataError as error:
        raise BadDataError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file; check the path") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{path}: permission denied; make it readable to you") from error
    except OSError as error:
        raise IOFailureError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise BadDataError(f"{path}: no conversation in it; {'; '.join(notes.lines()[:3]) or 'it is empty'}")


def recognised(line: bytes) -> Format:
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
    path: Path, file: BufferedReader[Any], notes: Notes, format_: Format | None, now: float
) -> Iterator[Transcript]:
    start = file.peek(PEEK)
    if format_ == "llm" or (format_ is None and start.startswith(SQLITE)):
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
