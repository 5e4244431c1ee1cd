"""Requests, parsed once at the door: a wire message in, who is asked for what out.

A leaf. Owns what each operation may hold and what is wrong with it; every key is known or refused. Must not
know who asks or answers. Apart from `protocol.py`, as a warm command only passes requests on, and making
these classes takes it 3 ms. A table of its own and no validation library: importing one is a cost to every
cold command (about 0.03 s for msgspec and 0.1 s for pydantic, three runs), and the messages would change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from myllm.errors import UsageError
from myllm.protocol import (
    EMBED_OVERFLOW,
    KV_TYPES,
    MAX_SEED,
    MAX_TEXTS,
    OVERFLOW,
    POOLS,
    PURPOSES,
    ROLES,
    SAMPLING,
    Message,
    Parameter,
    checked_number,
)


@dataclass(eq=False, repr=False)
class GenRequest:
    """One generation. Exactly one of `prompt` and `messages` is given; None means "the default".

    `messages` hold `role` and `content`, and `name` where given, all strings. `sampling` holds only what
    the caller set, by the names in `SAMPLING`. `logit_bias` maps a token id, or a text that is one token,
    to a bias in nats (-inf bans it). `deadline_ms` counts from the request's arrival. `priority` 0 is
    interactive, higher is more patient (batch). Without `stream` there are no token events, and
    log-probabilities come in the done event. `template` is a chat template's name, or the absolute path of
    its file.
    """

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
    stream: bool = True
    name_snapshot: bool = False
    sampling: dict[str, float] = field(default_factory=dict)
    logit_bias: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, message: Message) -> GenRequest:
        """Checks a wire message field by field. Raises UsageError naming the first bad or unknown one."""
        _refuse_unknown(message, GEN_KEYS)
        _fill(request := cls(), message, _CHECKS)
        for name, parameter in SAMPLING.items():
            if message.get(name) is not None:
                request.sampling[name] = checked_number(name, message[name], parameter)
        if (request.prompt is None) == (request.messages is None):
            raise UsageError("request: give either prompt or messages")
        if request.raw and request.messages is not None:
            raise UsageError("request: raw goes with prompt, not with messages")
        if request.raw and request.template is not None:
            raise UsageError("request: raw is without a template; leave one of them out")
        return request

    def conversation(self) -> list[dict[str, str]]:
        """The messages to render: `system` first where given, and a bare prompt as one user message."""
        messages = self.messages or [{"role": "user", "content": self.prompt or ""}]
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages


@dataclass(eq=False, repr=False)
class EmbedRequest:
    """Texts to turn into vectors; None means "the model's own".

    `window` is the most tokens of a text that one vector stands for, the model's own tokens around it
    included; a longer text is cut into windows that share `overlap` tokens, each an `item` event with
    `chunk` 0, 1, …, or is refused where `on_overflow` is `error`. `pool` `mean` gives one vector a
    text: the mean of its windows' vectors, weighted by their tokens. `purpose` puts the prefix in
    front that the model wants for a query or a document. Without `cache` nothing is looked up or kept.
    `priority` is as in GenRequest.

    Events, in any order of items:
    `{"item":0,"chunk":0,"start":0,"end":812,"tokens":201,"embedding":"<base64>","cached":false,"model":"m"}`
    with `item` an index into `texts`, `start` and `end` in characters of the text, `embedding` float32
    little-endian of norm 1; `{"item":1,"error":{…}}` for a text that has none; then a done event.
    """

    texts: list[str] = field(default_factory=list)
    window: int | None = None
    overlap: int = 0
    pool: str = "none"
    purpose: str | None = None
    on_overflow: str = "split"
    cache: bool = True
    deadline_ms: float | None = None
    priority: int = 0

    @classmethod
    def parse(cls, message: Message) -> EmbedRequest:
        """Checks a wire message field by field. Raises UsageError naming the first bad or unknown one."""
        _refuse_unknown(message, EMBED_KEYS)
        _fill(request := cls(), message, _EMBED_CHECKS)
        if not request.texts:
            raise UsageError("texts: expected a list of strings")
        if request.window is not None and request.overlap >= request.window:
            raise UsageError(f"overlap: {request.overlap} tokens, and the window holds {request.window}")
        return request


def _checked(message: Message, checks: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of the keys of `checks`. Raises UsageError."""
    return {
        name: check(name, message[name]) for name, check in checks.items() if message.get(name) is not None
    }


def _fill(request: object, message: Message, checks: Mapping[str, Any]) -> None:
    for name, value in _checked(message, checks).items():
        setattr(request, name, value)


def _refuse_unknown(message: Message, known: frozenset[str]) -> None:
    """Raises UsageError for a key that is not known, naming the nearest that is."""
    for key in message:
        if key not in known:
            from difflib import get_close_matches  # 2 ms, which only the mistaken pay

            # Of a key of megabytes it would make an index, for seconds in which nobody else is served.
            near = get_close_matches(key, known, 1) if len(key) <= LONGEST_KEY else []
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"request: unknown key {key!r:.80}{hint}")


def _integer(low: int, high: int) -> Any:
    parameter = Parameter(int, low, high, low)
    return lambda name, value: int(checked_number(name, value, parameter))


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
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(name: str, message: Any) -> dict[str, str]:
    """What a template needs of a message; what it would not get is refused, never dropped."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UsageError(f"{name}: expected a role, one of {', '.join(ROLES)}")
    if unknown := [key for key in message if key not in ("role", "content", "name")]:
        raise UsageError(f"{name}.{unknown[0]}: not supported; a message has role, content and name")
    checked = {"role": message["role"], "content": _content(name, message.get("content"))}
    if (speaker := message.get("name")) is not None:
        if not isinstance(speaker, str) or not SPEAKER.fullmatch(speaker):
            raise UsageError(f"{name}.name: expected 1 to 64 letters, digits, _ or -, not {speaker!r:.80}")
        checked["name"] = speaker
    return checked


def _content(name: str, content: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise UsageError(f"{name}: expected content, a string or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise UsageError(f"{name}.content: expected parts of type text, not {kind!r:.80}")
        if not isinstance(part.get("text"), str) or len(part) > 2:
            raise UsageError(f"{name}.content: a text part has type and text, a string, and no more")
    return "".join(part["text"] for part in content)


def _logit_bias(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise UsageError(f"{name}: expected an object of at most 1024 biases")
    parameter = Parameter(float, -1e9, 1e9, 0)
    return {str(token): checked_number(f"{name}[{token}]", bias, parameter) for token, bias in value.items()}


LONGEST_KEY: Final = max(map(len, (*SAMPLING, "on_overflow"))) * 2
"""Characters up to which an unknown key may be a known one mistyped."""
SPEAKER: Final = re.compile("[A-Za-z0-9_-]{1,64}")
"""A speaker's name, as OpenAI's API has it."""
_DEADLINE: Final = Parameter(float, 0, 1e12, 0)
_CHECKS: Final[Mapping[str, Any]] = {
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
    "deadline_ms": lambda name, value: checked_number(name, value, _DEADLINE),
    "priority": _integer(0, 19),
    "stream": _flag,
    "name_snapshot": _flag,
    "logit_bias": _logit_bias,
}

_EMBED_CHECKS: Final[Mapping[str, Any]] = {
    "texts": _texts,
    "window": _integer(1, 2**24),
    "overlap": _integer(0, 2**24),
    "pool": _one_of(POOLS),
    "purpose": _one_of(PURPOSES),
    "on_overflow": _one_of(EMBED_OVERFLOW),
    "cache": _flag,
    "deadline_ms": _CHECKS["deadline_ms"],
    "priority": _CHECKS["priority"],
}

GEN_KEYS: Final = frozenset((*_CHECKS, *SAMPLING))
EMBED_KEYS: Final = frozenset(_EMBED_CHECKS)


class LoadOptions(NamedTuple):
    """How a model is loaded; None leaves the choice to the engine, which sizes by need.

    `context` is the window in tokens, `parallel` the most sequences at once, `threads` CPU
    threads, `gpu_layers` how many layers go to a GPU (-1: all). `template` is the chat template of requests
    that name none, as in GenRequest.
    """

    context: int | None = None
    parallel: int | None = None
    kv_type: str | None = None
    flash_attn: str | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    template: str | None = None

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
        if value.get("template") is not None:
            checked["template"] = _text("template", value["template"])
        return cls(**checked)

    def to_wire(self) -> dict[str, Any]:
        """The options that were given, as the `options` object of a request."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Wishes(NamedTuple):
    """How long a model shall stay from now on; None leaves it as it is."""

    keep_alive: float | None = None
    """Seconds; infinity is for ever."""
    pin: bool | None = None


class Wanted(NamedTuple):
    """The model that a request wants, by name or path, and how; None is the default model."""

    name: str | None = None
    options: LoadOptions = LoadOptions()
    offline: bool = False
    wishes: Wishes = Wishes()

    @classmethod
    def parse(cls, message: Message) -> Wanted:
        """Checks the keys of `WANTED`. Raises UsageError."""
        given = _checked(message, WANTED)
        return cls(
            given.get("model"),
            LoadOptions.parse(given.get("options", {})),
            given.get("offline", False),
            Wishes(given.get("keep_alive"), given.get("pin")),
        )


def _keep_alive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= -1:
        raise UsageError(f"{name}: expected seconds, or -1 for ever, not {value!r:.80}")
    return math.inf if value < 0 else float(value)


WANTED: Final[Mapping[str, Any]] = {
    "model": _text,
    "options": lambda name, value: value,
    "offline": _flag,
    "keep_alive": _keep_alive,
    "pin": _flag,
}


class InSession(NamedTuple):
    """The session that a turn is taken in: by name, which is made where there is none, or by id; or the
    `last` one, of this `directory` first; else a new one. It remembers the directory that it was begun in.
    `default_model` is for a session that has none.
    """

    session: str | None = None
    last: bool = False
    directory: str | None = None
    default_model: str | None = None

    @classmethod
    def parse(cls, message: Message) -> InSession:
        """Checks the keys of `IN_SESSION`. Raises UsageError."""
        given = _checked(message, IN_SESSION)
        if given.get("last") and "session" in given:
            raise UsageError("request: give a session, or last")
        return cls(**given)


IN_SESSION: Final[Mapping[str, Any]] = {
    "session": _text,
    "last": _flag,
    "directory": _text,
    "default_model": _text,
}


@dataclass(eq=False, repr=False, slots=True)
class Request:
    """One request as it came in: the operation, the model it wants, and what it asks of that.

    `asked` is None where the operation asks nothing of a model; `wire` are its keys as they came, which
    is what a worker gets. `all` goes with `unload`, `turn` with `chat`.
    """

    op: str
    model: Wanted
    asked: GenRequest | EmbedRequest | None = None
    wire: Message = field(default_factory=dict)
    all: bool = False
    turn: InSession = field(default_factory=InSession)

    @classmethod
    def parse(cls, message: Message) -> Request:
        """Checks a whole message without its `id`. Raises UsageError naming the first bad or unknown key."""
        op = message.get("op")
        if not isinstance(op, str) or op not in OPERATIONS:
            raise UsageError(f"request: no operation {op!r:.80}")
        asked, known = OPERATIONS[op]
        _refuse_unknown(message, known)
        if asked is None:
            return cls(op, Wanted.parse(message), all=_flag("all", message.get("all", False)))
        about = {"op", *WANTED, *(IN_SESSION if op == "chat" else ())}
        wire = {key: value for key, value in message.items() if key not in about}
        turn = InSession.parse(message) if op == "chat" else InSession()
        return cls(op, Wanted.parse(message), asked.parse(wire), wire, turn=turn)


def _operation(asked: type[GenRequest | EmbedRequest] | None, *keys: str) -> tuple[Any, frozenset[str]]:
    return asked, frozenset(("op", *keys))


OPERATIONS: Final = {
    "gen": _operation(GenRequest, *WANTED, *GEN_KEYS),
    "chat": _operation(GenRequest, *WANTED, *GEN_KEYS, *IN_SESSION),
    "count": _operation(GenRequest, *WANTED, *GEN_KEYS),
    "embed": _operation(EmbedRequest, *WANTED, *EMBED_KEYS),
    "load": _operation(None, *WANTED),
    "unload": _operation(None, *WANTED, "all"),
    "status": _operation(None),
    "shutdown": _operation(None),
}
"""Each operation's class of what is asked of a model, if any, and the keys that its messages may have."""


class Arrival(NamedTuple):
    """What an engine must know of how a request came: its number, when, and whose it is.

    `id` is unique in the worker; `at` is a moment of `time.monotonic`, in seconds; `client` is the
    Runtime's number of the asker: clients share an engine evenly, whatever each has waiting. One that is
    `paused` does not begin yet.
    """

    id: int
    at: float
    client: int = 0
    paused: bool = False
