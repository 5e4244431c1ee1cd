"""Text files that go to the model with a message: read, refused, and written into it under their names.

Must not know the terminal, sessions or requests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from myllm.errors import BadDataError, IOFailureError, NotFoundError, PermissionDeniedError

LARGEST: Final = 1024 * 1024
"""Bytes of one file where nobody can say how to cut it: more than the windows of models at home hold."""
_MENTION: Final = re.compile(r"(?:^|(?<=\s))@(\S+)")
_FENCES: Final = re.compile("`{3,}")


class Attachment(NamedTuple):
    """A file's text, under the name that the user called it by."""

    name: str
    text: str


def read(name: str, largest: int = LARGEST) -> Attachment:
    """The file `name`. Raises NotFoundError, PermissionDeniedError, IOFailureError; BadDataError for what
    is binary or has more than `largest` bytes.
    """
    path = at(name)
    try:
        if not path.is_file():
            why = "not a file" if path.exists() else "no such file"
            raise NotFoundError(f"{name}: {why}; check the path")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except PermissionError as error:
        raise PermissionDeniedError(f"{name}: permission denied; make it readable to you") from error
    except (OSError, ValueError) as error:
        raise IOFailureError(f"{name}: cannot be read: {error}") from error
    if len(data) > largest:
        raise BadDataError(f"{name}: larger than {largest:,} bytes; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadDataError(f"{name}: not UTF-8 text but binary; give a text file")
    return Attachment(name, text)


def at(name: str) -> Path:
    """Where the user means; the `~` of nobody is a name like any other."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 — Path's own raises there


def mentioned(message: str) -> list[str]:
    """The names of files that a message of one line mentions as `@PATH`; `@` before anything else is text.

    In longer messages, which are often pasted, nothing is a mention: code is full of `@`.
    """
    if "\n" in message:
        return []
    return [name for name in dict.fromkeys(_MENTION.findall(message)) if _is_file(name)]


def _is_file(name: str) -> bool:
    try:
        return at(name).is_file()
    except (OSError, ValueError):  # too long, a NUL
        return False


def composed(files: Iterable[Attachment], message: str) -> str:
    """The message, if any, with the files before it, each fenced by more backticks than it has itself."""
    parts = []
    for name, text in files:
        fence = "`" * max(3, *(len(run) + 1 for run in _FENCES.findall(text)), 3)
        parts.append(f"{name}:\n{fence}\n{text.rstrip(chr(10))}\n{fence}")
    return "\n\n".join([*parts, *([message] if message else [])])
