"""A transcript: a session and its messages as one value; what an import could not keep.

Values only. Must not know any format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from myllm.conversation import Message, Session

LONGEST_TITLE: Final = 200
"""In characters."""
LAST_MOMENT: Final = 253_402_300_799.0
"""The end of the year 9999, in seconds since the epoch: the last that dates can be written of."""
MAX_KINDS: Final = 100
"""Kinds of notes told apart: a hostile file could make up one a line."""


class Transcript(NamedTuple):
    """A session with its messages, each after its parent: all of its tree, or the newest of its path."""

    session: Session
    messages: Collection[Message]
    """Gone through once or twice, so they may be read as they are taken."""

    def path(self) -> Iterator[Message]:
        """The conversation itself, from its first message to the head; holds no message, only ids."""
        parents = {message.id: message.parent for message in self.messages}
        on_path = set()
        place = self.session.head
        while place in parents:
            on_path.add(place)
            place = parents[place]
        return (message for message in self.messages if message.id in on_path)

    def title(self) -> str:
        """What the conversation goes by: its name, what the program it comes from called it, or its id."""
        return clean(self.session.name or str(self.session.extra.get("title") or "")) or self.session.id


class Call(NamedTuple):
    """A tool call of an answer, as it is shown."""

    id: str
    name: str
    arguments: str


def calls(message: Message) -> list[Call]:
    """The calls of a message, which should have OpenAI's shape but may come from anywhere."""
    found = message.extra.get("tool_calls")
    return [_call(call) for call in found] if isinstance(found, list | tuple) else []


def _call(call: Any) -> Call:
    match call:
        case {"function": {"name": name, "arguments": arguments}}:
            return Call(clean(str(call.get("id", ""))), clean(str(name)), str(arguments))
    return Call("", "", str(call))


class Notes:
    """What an import could not keep, counted by what it was."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, what: str) -> None:
        """One more of `what`, a phrase in the singular."""
        what = clean(what)
        self._counts[what if what in self._counts or len(self._counts) < MAX_KINDS else "other things"] += 1

    def mark(self, kind: object) -> str:
        """What stands in a content for a part that is not text: `[image]` and the like."""
        named = f"[{clean(str(kind), 40) or 'part'}]"
        self.add(f"part that is not text; {named} stands for it")
        return named

    def lines(self) -> list[str]:
        """The notes, most frequent first, as `12 × line of type progress`."""
        return [f"{count:,} × {what}" for what, count in self._counts.most_common()]


def clean(text: str, longest: int = LONGEST_TITLE) -> str:
    """`text` on one line, without what cannot be printed, cut to `longest` characters."""
    head = text[: longest * 4]  # so that a huge one costs nothing
    return " ".join("".join(char if char.isprintable() else " " for char in head).split())[:longest]


def date(seconds: float) -> str:
    """A moment, in seconds since the epoch, as `2026-11-28 22:10:05Z`."""
    moment = datetime.fromtimestamp(min(max(seconds, 0.0), LAST_MOMENT), UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S}Z"


def moment(value: object) -> float | None:
    """Seconds since the epoch of a number or an ISO 8601 text, UTC where it has no zone; None for others."""
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            return None
        value = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= LAST_MOMENT else None
