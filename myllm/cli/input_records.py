"""Records, one a line: bytes → lines → what each asks for, and what of it goes into its answer.

Pure: no streams, no click, no requests in flight. Owns which keys of a record mean what, the same for
every command that reads records, as each reads what another wrote. Blank lines are nothing, and count
for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from myllm.errors import BadDataError
from myllm.protocol import MAX_LINE, SAMPLING

BOM: Final = "\ufeff".encode()
"""The byte order mark that some editors put first."""
TEXT_FIELDS: Final = ("text", "prompt", "content", "full_text", "input")
"""Where a record's text is looked for, in this order."""
NOT_PASSED_ON: Final = frozenset(
    {"model", "done", "usage", "timings", "finish_reason", "session_id", "index", "input_hash", "error"}
)
"""Keys that are MyLLM's own: neither obeyed nor copied to the answer."""
_OURS_WHEN_DONE: Final = frozenset({"full_text", "reasoning_text", "seed"})
"""Keys that are MyLLM's in a record of MyLLM's, and the user's in any other."""
PARAMETERS: Final = frozenset(
    {
        *SAMPLING,
        *("max_tokens", "seed", "stop", "ignore_eos", "logprobs", "logit_bias"),
        *("system", "raw", "on_overflow", "deadline_ms"),
    }
)
"""Keys of a record that `--batch` obeys."""


NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Line(NamedTuple):
    """A line without its newline; of one over the limit only the beginning is kept."""

    data: bytes
    too_long: bool = False


class LineSplitter:
    """Bytes in, lines out; holds one line at most, and of one over `limit` bytes only the beginning."""

    KEPT: Final = 256
    """Bytes kept of a line that is too long."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._chunks: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that `data` completes."""
        *heads, tail = data.split(b"\n")
        for head in heads:
            self._hold(head)
            yield self._take()
        self._hold(tail)

    def finish(self) -> Iterator[Line]:
        """The last line, where it had no newline."""
        if self._size:
            yield self._take()

    @property
    def pending(self) -> int:
        """Bytes of a line that has not ended."""
        return self._size

    def _hold(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            data = b"".join((*self._chunks, data))[: self.KEPT]
            self._chunks = []
        if data:
            self._chunks.append(data)

    def _take(self) -> Line:
        line = Line(
            b"".join(self._chunks)[: None if self._size <= self._limit else self.KEPT],
            self._size > self._limit,
        )
        self._chunks, self._size = [], 0
        return line


class Skipped(NamedTuple):
    """A line that is no record: a token or progress line of MyLLM's own stream."""


class Record(NamedTuple):
    """One record: its text or messages, the parameters it asks for, its own keys.

    `upstream_error` is set where it is an error line of the MyLLM command before.
    """

    text: str | None = None
    messages: list[dict[str, str]] | None = None
    parameters: Mapping[str, Any] = NOTHING
    own: Mapping[str, Any] = NOTHING
    upstream_error: dict[str, str] | None = None


class RecordError(BadDataError):
    """A line that cannot be asked for; `own` holds the keys that could be read of it."""

    def __init__(self, message: str, own: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.own = own or {}


def parse_text(line: bytes) -> Record:
    """A line as the text of a record. Raises RecordError where it is not UTF-8."""
    try:
        return Record(text=line.decode().removesuffix("\r"))
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start:,} of the line") from error


def parse_jsonl(line: bytes, text_field: str | None = None) -> Record | Skipped:
    """A line of JSON as a record. Raises RecordError for one that is none, or has no text.

    `text_field` is where the text is; None looks in `TEXT_FIELDS`, then for `messages`.
    """
    values = loads(line)
    ours = values.get("done") is True and isinstance(values.get("full_text", values.get("error")), str | dict)
    if is_passing(values):
        return Skipped()
    hidden = NOT_PASSED_ON | _OURS_WHEN_DONE if ours else NOT_PASSED_ON
    own = {key: value for key, value in values.items() if key not in hidden}
    if ours and isinstance(error := values.get("error"), dict):
        return Record(own=own, upstream_error=error)
    parameters = {key: own[key] for key in PARAMETERS & own.keys() if own[key] is not None}
    messages = values.get("messages")
    fields = (text_field,) if text_field else (("full_text",) if ours else TEXT_FIELDS)
    for name in fields:
        if name in values:
            if not isinstance(text := values[name], str):
                raise RecordError(f"{name}: expected a string, not {type(text).__name__}", own)
            return Record(text=text, parameters=parameters, own=own)
    if messages is None or text_field:
        raise RecordError(
            f"no text: expected one of {', '.join((*fields, *(() if text_field else ('messages',))))}", own
        )
    if not isinstance(messages, list):
        raise RecordError("messages: expected a list", own)
    return Record(messages=messages, parameters=parameters, own=own)


def is_passing(message: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a line of MyLLM's own stream before the last: a token, or progress."""
    is_token = message.get("done") is False and "token" in message
    return is_token or bool(message.keys() & {"loading", "pulling"})


def looks_like_jsonl(line: Line) -> bool:
    """Whether a first line says that all are JSON: a whole object, or too long and beginning like one."""
    if line.too_long:
        return line.data.lstrip().startswith(b"{")
    try:
        loads(line.data)
    except BadDataError:
        return False
    return True


def loads(line: bytes) -> dict[str, Any]:
    """The JSON object that a line is. Raises RecordError."""
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecordError(f"not a JSON object but {type(values).__name__}")
    return values


def record_lines(chunks: Iterable[bytes], limit: int = MAX_LINE) -> Iterator[Line]:
    """The lines of an input that are not blank, without byte order mark; holds one at most."""
    splitter = LineSplitter(limit)
    lines = chain(chain.from_iterable(map(splitter.feed, chunks)), _last(splitter))
    for number, line in enumerate(lines):
        if number == 0 and line.data.startswith(BOM):
            line = line._replace(data=line.data.removeprefix(BOM))
        if line.data.strip():
            yield line


def parsed_lines(
    chunks: Iterable[bytes], mode: str, text_field: str | None, instead: str
) -> Iterator[tuple[Line, Record | RecordError]]:
    """The records of an input with their lines, or why a line is none. `mode` and `text_field` are those
    of `--input` and `--field`; `auto` is jsonl where the first line is an object, else lines. `instead`
    says what else to do with a line that is too long.
    """
    for line in record_lines(chunks):
        if mode == "auto":
            mode = "jsonl" if looks_like_jsonl(line) else "lines"
        parsed: Record | Skipped | RecordError
        try:
            if line.too_long:
                raise RecordError(f"line: longer than {MAX_LINE:,} bytes; split it, or {instead}")
            parsed = parse_jsonl(line.data, text_field) if mode == "jsonl" else parse_text(line.data)
        except RecordError as error:
            parsed = error
        if not isinstance(parsed, Skipped):
            yield line, parsed


def _last(splitter: LineSplitter) -> Iterator[Line]:
    yield from splitter.finish()
