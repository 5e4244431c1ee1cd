"""Lines of a file, and JSON as other programs write it.

Owns the limits of both. Must not know what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final, NamedTuple

import orjson

from myllm.errors import BadDataError
from myllm.protocol import MAX_MESSAGE
from myllm.transcripts.transcript import Notes

LONGEST_LINE: Final = MAX_MESSAGE
"""Bytes: what MyLLM takes as one message, it can also export and import."""
BOM: Final = b"\xef\xbb\xbf"
_ESCAPES: Final = (
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
"""A backslash, a surrogate pair, or half of one, which is what alone has six bytes."""


class Line(NamedTuple):
    """A line that is not blank, and its number in the file, from 1."""

    number: int
    data: bytes


def lines(file: BinaryIO, longest: int = LONGEST_LINE) -> Iterator[Line]:
    """The lines of a file that are not blank, one in memory at a time.

    Raises BadDataError at one of more than `longest` bytes.
    """
    number = 0
    while data := file.readline(longest + 1):
        number += 1
        if len(data) > longest:
            raise BadDataError(f"line {number:,}: longer than {longest:,} bytes")
        if number == 1:
            data = data.removeprefix(BOM)
        if data.strip():
            yield Line(number, data)


def loads(data: bytes) -> Any:
    r"""What JSON says. Raises BadDataError.

    Halves of surrogate pairs (`\ud83d`), which JavaScript writes where it cut a text, become U+FFFD.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        mended = re.sub(_ESCAPES, lambda match: rb"\ufffd" if len(match[0]) == 6 else match[0], data)
        if mended == data:
            raise BadDataError(f"not JSON: {error}") from error
        return loads(mended)


def dumps(value: Any) -> str:
    """`value` as JSON. Raises BadDataError where it is nested too deeply (orjson: 254)."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise BadDataError(f"cannot be written as JSON: {error}") from error


def objects(source: Iterable[Line], notes: Notes) -> Iterator[dict[str, Any]]:
    """The JSON objects that lines are; others are noted: programs that die leave half a line."""
    for line in source:
        try:
            value = loads(line.data)
        except BadDataError:
            value = None
        if isinstance(value, dict):
            yield value
        else:
            notes.add("line that is not a JSON object")
