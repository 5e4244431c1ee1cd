"""Text files that go along with a prompt, each under its name.

Owns what a file must be like, and how it is set into a prompt. Must not know requests.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import Final

from myllm.cli.inputs import MAX_INPUT, Given
from myllm.errors import BadDataError, IOFailureError, NotFoundError, PermissionDeniedError, UsageError

FENCES: Final = re.compile("`{3,}")


def attach(paths: Sequence[str], given: Given) -> Given:
    """What came on stdin, behind the texts of the files. Raises as `attachment`, and UsageError where a
    conversation came.
    """
    if given.messages is not None:
        raise UsageError("--file: stdin is a conversation, and has its own messages; give one of them")
    texts = [attachment(path) for path in paths]
    return Given(text="\n\n".join([*texts, *([given.text] if given.text else [])]))


def attachment(path: str) -> str:
    """A file's text between fences, its name before them.

    Raises BadDataError for what is no text or too large, NotFoundError, PermissionDeniedError and
    IOFailureError.
    """
    text = _read(path)
    fence = "`" * (max(map(len, FENCES.findall(text)), default=2) + 1)
    name = os.path.basename(path)  # noqa: PTH119 — no pathlib on the warm path
    return f"{name}:\n{fence}\n{text.removesuffix(chr(10))}\n{fence}"


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadDataError(f"{path}: not a file; give a text file")
            data = file.read(MAX_INPUT + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{path}: permission denied") from error
    except OSError as error:
        raise IOFailureError(f"{path}: {error.strerror or error}") from error
    if len(data) > MAX_INPUT:
        raise BadDataError(f"{path}: larger than {MAX_INPUT:,} bytes, which no request can hold")
    if b"\0" in data:
        raise BadDataError(f"{path}: binary, not text")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 at byte {error.start:,}; convert it first") from error
