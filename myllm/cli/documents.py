"""What `embed` reads: bytes of one input → its texts, one a document, line or record.

Owns what `auto` means there and which keys a text's record keeps. Must not know requests or vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Final, NamedTuple

from myllm.cli.input_records import (
    BOM,
    Line,
    Record,
    RecordError,
    looks_like_jsonl,
    parsed_lines,
)
from myllm.cli.inputs import MAX_INPUT
from myllm.errors import BadDataError
from myllm.protocol import MAX_LINE

OURS: Final = frozenset({"embedding", "chunk", "start", "end", "tokens", "dimensions", "cached", "row"})
"""Keys of our own records that are not passed on from an input record."""


class Input(NamedTuple):
    """One of what is read, by its `name` in messages; `own` goes into the records of all its texts.
    `size` in bytes, where it is known beforehand.
    """

    name: str
    own: dict[str, Any]
    chunks: Iterable[bytes]
    size: int | None = None


class Text(NamedTuple):
    """A text to embed, or why there is none; `size` in bytes of its input, a line's end included."""

    own: dict[str, Any]
    size: int
    text: str | None = None
    error: dict[str, str] | None = None


def all_texts(
    inputs: Iterable[Input], mode: str, field: str | None, idle: Callable[[], None]
) -> Iterator[Text]:
    """The texts of all inputs, one input after the other. Raises BadDataError."""
    for name, own, chunks, _ in inputs:
        for text in texts(chunks, mode, field, name, idle):
            yield text._replace(own=text.own | own)


def texts(
    chunks: Iterable[bytes], mode: str, field: str | None, name: str, idle: Callable[[], None]
) -> Iterator[Text]:
    """The texts of one input. `idle` is called before each wait for more of it. Raises BadDataError."""
    chunks = iter(_announced(chunks, idle))
    if mode == "auto":
        chunks, first = first_line(chunks)
        mode = "jsonl" if first.data and looks_like_jsonl(first) else "text"
    if mode == "text":
        yield _document(chunks, name)
        return
    for line, parsed in parsed_lines(chunks, mode, field, "give --input text"):
        yield _text(parsed, len(line.data) + 1)


def _announced(chunks: Iterable[bytes], idle: Callable[[], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        idle()  # all that the chunk completed has been taken


def first_line(chunks: Iterator[bytes]) -> tuple[Iterator[bytes], Line]:
    """The same input, and its first line that is not blank, as far as a line may be long."""
    held = bytearray()
    begun = False
    for chunk in chunks:
        rest = chunk if held else chunk.removeprefix(BOM)
        held += chunk
        if not begun:
            rest = rest.lstrip()
            begun = bool(rest)
        if b"\n" in rest or len(held) > MAX_LINE:  # not in `held`: a long line would be read n² times
            break
    first = bytes(held).removeprefix(BOM).lstrip().partition(b"\n")[0]
    return chain([bytes(held)], chunks), Line(first, len(first) > MAX_LINE)


def _document(chunks: Iterable[bytes], name: str) -> Text:
    """All of an input as one text, unchanged but for a byte order mark. Raises BadDataError."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        if len(held) > MAX_INPUT:
            raise BadDataError(f"{name}: more than {MAX_INPUT:,} bytes in one document; split it first")
    data = bytes(held)
    try:
        return Text({}, len(data), data.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        raise BadDataError(
            f"{name}: not UTF-8 at byte {error.start:,}; convert it first, say with iconv"
        ) from error


def _text(parsed: Record | RecordError, size: int) -> Text:
    own = {key: value for key, value in parsed.own.items() if key not in OURS}
    if isinstance(parsed, Record) and parsed.upstream_error is not None:
        return Text(own, size, error=parsed.upstream_error)
    try:
        return Text(own, size, _spoken(parsed))
    except RecordError as error:
        return Text(own, size, error=error.to_wire())


def _spoken(record: Record | RecordError) -> str:
    """The record's text, or what is said in its conversation, a line a message. Raises RecordError."""
    if isinstance(record, RecordError):
        raise record
    if record.text is not None:
        return record.text
    contents = []
    for index, message in enumerate(record.messages or []):
        if not isinstance(message, dict) or not isinstance(content := message.get("content"), str):
            raise RecordError(f"messages[{index}]: expected content, a string")
        contents.append(content)
    return "\n".join(contents)
