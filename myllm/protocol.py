"""Requests, sampling parameters and events as JSONL lines: bytes ⇄ messages, without any I/O.

Owns the wire format that the CLI, the daemon, the workers and `myllm serve` share. Must not
know sockets, click, asyncio or llama.cpp. A message is one JSON object. Normally it is one
line; one longer than `MAX_LINE` travels as several `{"part": …}` lines (see `encode`).

A connection opens with one hello line each way. A request names its operation in `op`; one
with an integer `id` may be one of many in flight and its events carry that id. Exactly one
event with `"done": true` ends each request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson

from myllm.errors import BadDataError, UsageError

PROTOCOL: Final = 1
MAX_LINE: Final = 16 * 1024 * 1024
"""Bytes in one line, newline included (DESIGN.md §3)."""
MAX_MESSAGE: Final = 256 * 1024 * 1024
"""Bytes in one message put together from parts: what a receiver is ready to hold in memory."""
MAX_IN_FLIGHT: Final = 64
"""Requests a connection may have running at once; more wait on the client's side."""
PART_CHARS: Final = 3_500_000
"""Characters in a part: at most 4 bytes each, so that with its escapes a part stays a legal line."""

Message = dict[str, Any]


def hello(version: str) -> Message:
    """The first line each way: protocol and program versions and this side's limits."""
    return {
        "hello": {
            "protocol": PROTOCOL,
            "version": version,
            "max_line": MAX_LINE,
            "max_in_flight": MAX_IN_FLIGHT,
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

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes. Raises BadDataError; the connection is then unusable."""
        for line in self._lines.feed(data):
            message = parse(line)
            if "part" not in message:
                yield message
            elif (whole := self._assemble(message)) is not None:
                yield parse(whole)

    def feed_lines(self, data: bytes) -> Iterator[bytes]:
        """The same messages as lines without newline, not parsed, for who only passes them on."""
        for line in self._lines.feed(data):
            if not line.startswith(b'{"part":'):
                yield line
            elif (whole := self._assemble(parse(line))) is not None:
                yield whole

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


# ── requests ────────────────────────────────────────────────────────────────────────────────


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

OVERFLOW: Final = ("error", "head", "tail", "middle")
ROLES: Final = ("system", "user", "assistant", "tool", "developer")
MAX_SEED: Final = 2**32 - 2
"""llama.cpp's seeds are uint32, and the largest one means "random" there."""


@dataclass(eq=False, repr=False)
class GenRequest:
    """One generation. Exactly one of `prompt` and `messages` is given; None means "the default".

    `messages` hold `role` and `content` strings. `sampling` holds only what the caller set, by the
    names in `SAMPLING`. `logit_bias` maps a token id, or a text that is one token, to a bias in
    nats (-inf bans it). `deadline_ms` counts from the request's arrival. `priority` 0 is
    interactive, higher is more patient (batch). `client` is the Runtime's number of the connection:
    clients share the engine evenly, whatever each has waiting. Without `stream` there are no token
    events, and log-probabilities come in the done event.
    """

    id: int | None = None
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    system: str | None = None
    raw: bool = False
    template: str | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    on_overflow: str = "error"
    deadline_ms: float | None = None
    priority: int = 0
    client: int = 0
    stream: bool = True
    sampling: dict[str, float] = field(default_factory=dict)
    logit_bias: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, message: Message) -> GenRequest:
        """Checks a wire message field by field. Raises UsageError naming the first bad one.

        Keys that belong to the Runtime (`op`, `model`, `options`, …) are passed over.
        """
        request = cls()
        for name, check in _CHECKS.items():
            if message.get(name) is not None:
                setattr(request, name, check(name, message[name]))
        for name, parameter in SAMPLING.items():
            if message.get(name) is not None:
                request.sampling[name] = _number(name, message[name], parameter)
        if (request.prompt is None) == (request.messages is None):
            raise UsageError("request: give either prompt or messages")
        if request.raw and request.messages is not None:
            raise UsageError("request: raw goes with prompt, not with messages")
        return request

    def conversation(self) -> list[dict[str, str]]:
        """The messages to render: `system` first where given, and a bare prompt as one user message."""
        messages = self.messages or [{"role": "user", "content": self.prompt or ""}]
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages


POOLS: Final = ("none", "mean")
EMBED_OVERFLOW: Final = ("split", "error")
PURPOSES: Final = ("query", "document")
MAX_TEXTS: Final = 256
"""Texts in one embed request."""


@dataclass(eq=False, repr=False)
class EmbedRequest:
    """Texts to turn into vectors; None means "the model's own".

    `window` is the most tokens of a text that one vector stands for, the model's own tokens around it
    included; a longer text is cut into windows that share `overlap` tokens, each an `item` event with
    `chunk` 0, 1, …, or is refused where `on_overflow` is `error`. `pool` `mean` gives one vector a
    text: the mean of its windows' vectors, weighted by their tokens. `purpose` puts the prefix in
    front that the model wants for a query or a document. Without `cache` nothing is looked up or kept.
    `priority` and `client` are as in GenRequest.

    Events, in any order of items:
    `{"item":0,"chunk":0,"start":0,"end":812,"tokens":201,"embedding":"<base64>","cached":false}`
    with `item` an index into `texts`, `start` and `end` in characters of the text, `embedding` float32
    little-endian of norm 1; `{"item":1,"error":{…}}` for a text that has none; then a done event.
    """

    id: int | None = None
    texts: list[str] = field(default_factory=list)
    window: int | None = None
    overlap: int = 0
    pool: str = "none"
    purpose: str | None = None
    on_overflow: str = "split"
    cache: bool = True
    deadline_ms: float | None = None
    priority: int = 0
    client: int = 0

    @classmethod
    def parse(cls, message: Message) -> EmbedRequest:
        """Checks a wire message field by field. Raises UsageError naming the first bad one."""
        request = cls()
        for name, check in _EMBED_CHECKS.items():
            if message.get(name) is not None:
                setattr(request, name, check(name, message[name]))
        if not request.texts:
            raise UsageError("texts: expected a list of strings")
        if request.window is not None and request.overlap >= request.window:
            raise UsageError(f"overlap: {request.overlap} tokens, and the window holds {request.window}")
        return request


def _number(name: str, value: Any, parameter: Parameter) -> float:
    expected = f"{name}: expected {'a whole number' if parameter.kind is int else 'a number'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{expected}, not {value!r:.80}")
    if parameter.kind is int and value != int(value):
        raise UsageError(f"{expected}, not {value!r:.80}")
    if not parameter.low <= value <= parameter.high:
        raise UsageError(f"{expected} from {parameter.low:g} to {parameter.high:g}, not {value!r:.80}")
    return parameter.kind(value)


def _integer(low: int, high: int) -> Any:
    parameter = Parameter(int, low, high, low)
    return lambda name, value: int(_number(name, value, parameter))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected a string, not {value!r:.80}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: expected true or false, not {value!r:.80}")
    return value


def _one_of(choices: tuple[str, ...]) -> Any:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise UsageError(f"{name}: expected one of {', '.join(choices)}, not {value!r:.80}")
        return str(value)

    return check


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TEXTS:
        raise UsageError(f"{name}: expected a list of 1 to {MAX_TEXTS} strings")
    return [_text(f"{name}[{index}]", text) for index, text in enumerate(value)]


def _stop(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 64 or not all(isinstance(t, str) for t in texts):
        raise UsageError(f"{name}: expected at most 64 strings")
    if not all(0 < len(text) <= 1024 for text in texts):
        raise UsageError(f"{name}: a stop string has 1 to 1024 characters")
    return texts


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{name}: expected a list of messages")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UsageError(f"{name}[{index}]: expected a role, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UsageError(f"{name}[{index}]: expected content, a string")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _logit_bias(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise UsageError(f"{name}: expected an object of at most 1024 biases")
    parameter = Parameter(float, -1e9, 1e9, 0)
    return {str(token): _number(f"{name}[{token}]", bias, parameter) for token, bias in value.items()}


_DEADLINE: Final = Parameter(float, 0, 1e12, 0)
_CHECKS: Final[Mapping[str, Any]] = {
    "id": _integer(0, 2**53),
    "prompt": _text,
    "messages": _messages,
    "system": _text,
    "raw": _flag,
    "template": _text,
    "max_tokens": _integer(0, 2**31 - 1),
    "seed": _integer(0, MAX_SEED),
    "stop": _stop,
    "ignore_eos": _flag,
    "logprobs": _integer(0, 20),
    "on_overflow": _one_of(OVERFLOW),
    "deadline_ms": lambda name, value: _number(name, value, _DEADLINE),
    "priority": _integer(0, 19),
    "client": _integer(0, 2**53),
    "stream": _flag,
    "logit_bias": _logit_bias,
}

_EMBED_CHECKS: Final[Mapping[str, Any]] = {
    "id": _CHECKS["id"],
    "texts": _texts,
    "window": _integer(1, 2**24),
    "overlap": _integer(0, 2**24),
    "pool": _one_of(POOLS),
    "purpose": _one_of(PURPOSES),
    "on_overflow": _one_of(EMBED_OVERFLOW),
    "cache": _flag,
    "deadline_ms": _CHECKS["deadline_ms"],
    "priority": _CHECKS["priority"],
    "client": _CHECKS["client"],
}


KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


class LoadOptions(NamedTuple):
    """How a model is loaded; None leaves the choice to the engine, which sizes by need.

    `context` is the window in tokens, `parallel` the most sequences at once, `threads` CPU
    threads, `gpu_layers` how many layers go to a GPU (-1: all).
    """

    context: int | None = None
    parallel: int | None = None
    kv_type: str | None = None
    flash_attn: str | None = None
    threads: int | None = None
    gpu_layers: int | None = None

    @classmethod
    def parse(cls, value: Any) -> LoadOptions:
        """Checks the `options` object of a request or of `[model.NAME]`. Raises UsageError."""
        if not isinstance(value, dict):
            raise UsageError("options: expected an object")
        if unknown := sorted(set(value) - set(cls._fields)):
            known = ", ".join(sorted(cls._fields))
            raise UsageError(f"options: unknown {', '.join(map(repr, unknown))}; known: {known}")
        ranges = {"context": (1, 2**24), "parallel": (1, 256), "threads": (1, 1024), "gpu_layers": (-1, 9999)}
        checked: dict[str, Any] = {
            name: _integer(*limits)(name, value[name])
            for name, limits in ranges.items()
            if value.get(name) is not None
        }
        for name, choices in (("kv_type", KV_TYPES), ("flash_attn", ("auto", "off"))):
            if value.get(name) is not None:
                if value[name] not in choices:
                    raise UsageError(f"{name}: expected one of {', '.join(choices)}, not {value[name]!r:.80}")
                checked[name] = value[name]
        return cls(**checked)

    def to_wire(self) -> dict[str, Any]:
        """The options that were given, as the `options` object of a request."""
        return {name: value for name, value in self._asdict().items() if value is not None}


# ── events ──────────────────────────────────────────────────────────────────────────────────


def tagged(event: Message, request_id: int | None) -> Message:
    """The event with its request's id in front, where the request had one."""
    return event if request_id is None else {"id": request_id, **event}


def error_event(error: Any) -> Message:
    """The done event of a request that failed; `error` is a MyllmError."""
    return {"done": True, "error": error.to_wire()}
