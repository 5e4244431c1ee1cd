"""Messages as JSONL lines: bytes ⇄ messages, without any I/O; the names and limits of what they hold.

Owns the wire format that the CLI, the daemon, the workers and `myllm serve` share; `requests.py` checks
what is asked. Must not know sockets, click, asyncio or llama.cpp. Every command imports it, so it makes
no dataclasses. A message is one JSON object. Normally it is one line; one longer than `MAX_LINE`
travels as several `{"part": …}` lines (see `encode`).

A connection opens with one hello line each way. A request names its operation in `op`; one
with an integer `id` may be one of many in flight and its events carry that id. Exactly one
event with `"done": true` ends each request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson

from myllm.errors import BadDataError, UsageError

PROTOCOL: Final = 1
MAX_LINE: Final = 16 * 1024 * 1024
"""Bytes in one line, newline included: longer ones are no request but a mistake, or come in parts."""
MAX_MESSAGE: Final = 256 * 1024 * 1024
"""Bytes in one message put together from parts: what a receiver is ready to hold in memory."""
MAX_IN_FLIGHT: Final = 64
"""Requests a connection may have running at once; more wait on the client's side."""
PART_CHARS: Final = 3_500_000
"""Characters in a part: at most 4 bytes each, so that with its escapes a part stays a legal line."""

Message = dict[str, Any]


def hello(version: str, **about: Any) -> Message:
    """The first line each way: protocol and program versions, this side's limits, and what else it is."""
    return {
        "hello": {
            "protocol": PROTOCOL,
            "version": version,
            "max_line": MAX_LINE,
            "max_in_flight": MAX_IN_FLIGHT,
            **about,
        }
    }


# ── bytes ⇄ messages ────────────────────────────────────────────────────────────────────────


def encode(message: Message) -> bytes:
    """The line(s) that carry `message`; over `MAX_LINE` it becomes `{"part": text, "more": bool}` lines.

    Raises BadDataError where the message is over `MAX_MESSAGE` or holds text that UTF-8 cannot carry.
    """
    try:
        line = orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    except (TypeError, ValueError) as error:
        raise BadDataError(f"request: cannot be sent as JSON: {error}") from error
    return divided(line)


def divided(line: bytes) -> bytes:
    """`line`, newline included, as it is or, over `MAX_LINE`, as part lines. Raises BadDataError."""
    if len(line) <= MAX_LINE:
        return line
    if len(line) > MAX_MESSAGE:
        raise BadDataError(
            f"input: {len(line):,} bytes in one request, the limit is {MAX_MESSAGE:,}; split it first"
        )
    text = line[:-1].decode()
    return b"".join(
        orjson.dumps(
            {"part": text[at : at + PART_CHARS], "more": at + PART_CHARS < len(text)},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for at in range(0, len(text), PART_CHARS)
    )


def parse(line: bytes) -> Message:
    """One line as a message; anything but a JSON object is a BadDataError."""
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadDataError(f"line: not JSON: {error}") from error
    if not isinstance(message, dict):
        raise BadDataError("line: not a JSON object")
    return message


class LineBuffer:
    """Bytes in, whole lines out; a line over the limit is an error, not a growing buffer."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._chunks: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines, without newline, that `data` completes. Raises BadDataError past the limit."""
        head, newline, rest = data.partition(b"\n")
        self._size += len(head)
        if self._size > self._limit:
            raise BadDataError(f"line: longer than {self._limit:,} bytes")
        self._chunks.append(head)
        if not newline:
            return []
        lines = [b"".join(self._chunks)]
        *whole, tail = rest.split(b"\n")
        lines += whole
        self._chunks, self._size = [tail], len(tail)
        if self._size > self._limit or any(len(line) > self._limit for line in whole):
            raise BadDataError(f"line: longer than {self._limit:,} bytes")
        return lines

    @property
    def pending(self) -> int:
        """Bytes held of a line that has not ended yet."""
        return self._size


class MessageReader:
    """Bytes in, messages out: lines parsed and parts put together."""

    def __init__(self) -> None:
        self._lines = LineBuffer()
        self._parts: list[str] = []
        self._parts_size = 0

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises BadDataError; the connection is then unusable."""
        messages = []
        for message in map(parse, self._lines.feed(data)):
            if "part" not in message:
                messages.append(message)
            elif (whole := self._assemble(message)) is not None:
                messages.append(parse(whole))
        return messages

    def feed_lines(self, data: bytes) -> list[bytes]:
        """The same messages as lines without newline, not parsed, for who only passes them on."""
        lines = []
        for line in self._lines.feed(data):
            if not line.startswith(b'{"part":'):
                lines.append(line)
            elif (whole := self._assemble(parse(line))) is not None:
                lines.append(whole)
        return lines

    def _assemble(self, part: Message) -> bytes | None:
        text = part["part"]
        if not isinstance(text, str):
            raise BadDataError("line: a part must be a string")
        self._parts_size += len(text)
        if self._parts_size > MAX_MESSAGE:
            raise BadDataError(f"message: longer than {MAX_MESSAGE:,} bytes")
        self._parts.append(text)
        if part.get("more"):
            return None
        whole = "".join(self._parts)
        self._parts, self._parts_size = [], 0
        return whole.encode("utf-8", "surrogatepass")


# ── what need not be parsed ─────────────────────────────────────────────────────────────────
# Token lines, by far the most, are passed on as bytes. Relies on how our own side writes events: compact
# JSON, `id` first, then `token` or `done`; anything else is parsed.

TOKEN_LINE: Final = re.compile(rb'\{"id":(\d{1,16}),(?="token":)')
"""The start of a token line with an id, up to its own keys."""


def with_id(line: bytes, start: int, request_id: int | None) -> bytes:
    """A line whose own keys begin at `start`, under another id or none; with newline."""
    if request_id is None:
        return b"{%b\n" % line[start:]
    return b'{"id":%d,%b\n' % (request_id, line[start:])


TOKEN_START: Final = b'{"token":'
"""The start of a token line without id."""


def is_done(line: bytes) -> bool:
    """Whether a line without id ends its request. Raises BadDataError where it is no message at all."""
    return not line.startswith(TOKEN_START) and parse(line).get("done") is True


# ── names and limits ────────────────────────────────────────────────────────────────────────────────


class Parameter(NamedTuple):
    """A sampling parameter's type and range; `default` is llama.cpp's neutral value or MyLLM's choice."""

    kind: type[int] | type[float]
    low: float
    high: float
    default: float


SAMPLING: Final[Mapping[str, Parameter]] = {
    "temperature": Parameter(float, 0, 100, 0.8),
    "top_k": Parameter(int, 0, 1_000_000, 40),
    "top_p": Parameter(float, 0, 1, 0.95),
    "min_p": Parameter(float, 0, 1, 0.05),
    "repeat_penalty": Parameter(float, 0.01, 100, 1.0),
    # The rest is set with `--set KEY=VALUE`; names and neutral values as in llama.cpp's common/common.h.
    "repeat_last_n": Parameter(int, -1, 1_000_000, 64),
    "frequency_penalty": Parameter(float, -100, 100, 0.0),
    "presence_penalty": Parameter(float, -100, 100, 0.0),
    "dry_multiplier": Parameter(float, 0, 100, 0.0),
    "dry_base": Parameter(float, 0, 100, 1.75),
    "dry_allowed_length": Parameter(int, 0, 1_000_000, 2),
    "dry_penalty_last_n": Parameter(int, -1, 1_000_000, -1),
    "top_n_sigma": Parameter(float, -1, 100, -1.0),
    "typical_p": Parameter(float, 0, 1, 1.0),
    "xtc_probability": Parameter(float, 0, 1, 0.0),
    "xtc_threshold": Parameter(float, 0, 1, 0.1),
    "dynatemp_range": Parameter(float, 0, 100, 0.0),
    "dynatemp_exponent": Parameter(float, 0, 100, 1.0),
    "mirostat": Parameter(int, 0, 2, 0),
    "mirostat_tau": Parameter(float, 0, 100, 5.0),
    "mirostat_eta": Parameter(float, 0, 1, 0.1),
}
"""Every numeric sampling parameter a request may carry, by its wire name."""

OVERFLOW: Final = ("error", "head", "tail", "middle", "turns")
"""What goes of a prompt over the window: nothing, a part of its longest text, or its oldest turns."""
ROLES: Final = ("system", "user", "assistant", "tool", "developer")
MAX_SEED: Final = 2**32 - 2
"""llama.cpp's seeds are uint32, and the largest one means "random" there."""
POOLS: Final = ("none", "mean")
EMBED_OVERFLOW: Final = ("split", "error")
PURPOSES: Final = ("query", "document")
MAX_TEXTS: Final = 256
"""Texts in one embed request."""
KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def checked_number(name: str, value: Any, parameter: Parameter) -> float:
    """A number of the parameter's type and in its range. Raises UsageError, which names it."""
    expected = f"{name}: expected {'a whole number' if parameter.kind is int else 'a number'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{expected}, not {value!r:.80}")
    if parameter.kind is int and value != int(value):
        raise UsageError(f"{expected}, not {value!r:.80}")
    if not parameter.low <= value <= parameter.high:
        raise UsageError(f"{expected} from {parameter.low:g} to {parameter.high:g}, not {value!r:.80}")
    return parameter.kind(value)


# ── events ──────────────────────────────────────────────────────────────────────────────────


def tagged(event: Message, request_id: int | None) -> Message:
    """The event with its request's id in front, where the request had one."""
    return event if request_id is None else {"id": request_id, **event}
