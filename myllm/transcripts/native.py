"""MyLLM's own export: JSONL that holds all of a session, and comes back as it was.

Owns the format, and what is wrong with a file that claims to be of it: nothing in one is trusted. A session's
line is followed by its messages, each after its parent; then the next session may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any, Final

import orjson

from myllm.conversation import Message, Session, State
from myllm.errors import BadDataError
from myllm.transcripts.json_lines import Line, dumps, loads
from myllm.transcripts.transcript import Notes, Transcript, moment

FORMAT: Final = "myllm-session"
VERSION: Final = 1
ROLES: Final = ("user", "assistant", "tool")
GREATEST: Final = 2**53
"""Of counts: up to here all programs mean the same by a number in JSON (RFC 8259 §6)."""


def export(transcript: Transcript) -> Iterator[bytes]:
    """The lines of a session and all its messages in their order, newlines included.

    Raises BadDataError for text that UTF-8 cannot carry.
    """
    session, messages = transcript
    yield _line({"format": FORMAT, "version": VERSION, "messages": len(messages), **record(session)})
    for message in messages:
        yield _line(record(message))


def parse(lines: Iterable[Line], notes: Notes, now: float) -> Iterator[Transcript]:
    """The sessions of a file, one in memory at a time. Raises BadDataError naming the line.

    All is kept or refused, and dates are in the file: neither `notes` nor `now` is needed.
    """
    rest = iter(lines)
    seen: set[str] = set()
    for line in rest:
        session, length = _at(line, _session)
        if session.id in seen:
            raise BadDataError(f"line {line.number:,}: a second session with the id {session.id!r:.80}")
        seen.add(session.id)
        messages: dict[str | None, Message] = {}
        for below in islice(rest, length):
            message = _at(below, _message)
            if fault := _misplaced(message, messages):
                raise BadDataError(f"line {below.number:,}: message {message.id!r:.80}: {fault}")
            messages[message.id] = message
        if fault := _incomplete(session, length, messages):
            raise BadDataError(f"line {line.number:,}: session {session.id!r:.80}: {fault}")
        yield Transcript(session, list(messages.values()))


def record(value: Session | Message) -> dict[str, Any]:
    """A session or a message as the object of its line."""
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _line(record: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise BadDataError(f"{record['id']!r:.80}: cannot be exported as JSON: {error}") from error


def _at(line: Line, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """What `parse` makes of a line; its BadDataErrors name the line."""
    try:
        record = loads(line.data)
        if not isinstance(record, dict):
            raise BadDataError("not a JSON object")
        return parse(record)
    except BadDataError as error:
        raise BadDataError(f"line {line.number:,}: {error}") from error


def _session(record: dict[str, Any]) -> tuple[Session, int]:
    """A session, and how many messages follow it."""
    if record.pop("format", None) != FORMAT:
        raise BadDataError(f"expected the line of a session, with `format` {FORMAT}")
    if (version := record.pop("version", None)) != VERSION:
        raise BadDataError(f"version {version!r:.80} of the format; this MyLLM reads {VERSION}")
    length = _count("messages", record.pop("messages", None))
    return Session(**_checked(record, _SESSION)), length


def _message(record: dict[str, Any]) -> Message:
    if "format" in record:
        raise BadDataError("a session's line where messages of the one before were to follow")
    return Message(**_checked(record, _MESSAGE))


def _misplaced(message: Message, before: Mapping[str | None, Message]) -> str | None:
    """What is wrong with where a message comes; what comes after its parent can be in no circle."""
    if message.id in before:
        return "a second one with this id"
    if message.parent is not None and message.parent not in before:
        return f"its parent {message.parent!r:.80} does not come before it"
    return None


def _incomplete(session: Session, length: int, messages: Mapping[str | None, Message]) -> str | None:
    if len(messages) < length:
        return f"only {len(messages):,} of its {length:,} messages follow; the file was cut"
    for what, id_ in (("head", session.head), ("fork", session.forked_at)):
        if id_ is not None and id_ not in messages:
            return f"its {what} {id_!r:.80} is none of its messages"
    return None


# ── values ──────────────────────────────────────────────────────────────────────────────────


def _checked(record: dict[str, Any], checks: Mapping[str, Callable[[str, Any], Any]]) -> dict[str, Any]:
    """The values of a record that has exactly the keys of `checks`."""
    if missing := checks.keys() - record.keys():
        raise BadDataError(f"{', '.join(sorted(missing))}: missing")
    if unknown := record.keys() - checks.keys():
        raise BadDataError(f"{min(unknown)!r:.80}: unknown key")
    return {name: check(name, record[name]) for name, check in checks.items()}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadDataError(f"{name}: expected a text, not {value!r:.80}")
    return value


def _name(name: str, value: Any) -> str:
    """A text that is shown in tables and errors, and compared."""
    if not _text(name, value) or not value.isprintable():
        raise BadDataError(f"{name}: expected printable characters, not {value!r:.80}")
    return str(value)


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, str) or (seconds := moment(value)) is None:
        raise BadDataError(f"{name}: expected seconds since the epoch, not {value!r:.80}")
    return seconds


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= GREATEST:
        raise BadDataError(f"{name}: expected a count, not {value!r:.80}")
    return value


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadDataError(f"{name}: expected an object, not {value!r:.80}")
    dumps(value)  # what is nested too deeply to be written could not be kept
    return value


def _counts(name: str, value: Any) -> dict[str, int]:
    return {key: _count(f"{name}.{key:.80}", item) for key, item in _object(name, value).items()}


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise BadDataError(f"{name}: expected one of {', '.join(choices)}, not {value!r:.80}")
        return str(value)

    return check


_SESSION: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "id": _name,
    "name": _or_none(_name),
    "created": _seconds,
    "updated": _seconds,
    "head": _or_none(_name),
    "model": _or_none(_name),
    "system": _or_none(_text),
    "settings": _object,
    "parent": _or_none(_name),
    "forked_at": _or_none(_name),
    "owner": _name,
    "directory": _or_none(_name),
    "n_messages": _count,
    "extra": _object,
}
_MESSAGE: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "id": _name,
    "parent": _or_none(_name),
    "role": _one_of(*ROLES),
    "content": _text,
    "created": _seconds,
    "state": lambda name, value: State(_one_of(*State)(name, value)),
    "reasoning": _text,
    "extra": _object,
    "tokens": _counts,
    "answer": _object,
}
