"""A conversation as data: a session, its messages as a tree, and what is known of each answer.

Values only, with their JSON form. Must not know where they are kept, how they are shown, or templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

LOCAL: Final = "local"
"""The owner of what the user of this machine makes; HTTP's are the names of its API keys."""
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
"""The default of a parameter; a field of a dataclass takes no mapping for one before Python 3.12."""


class State(StrEnum):
    """What became of a message."""

    WHOLE = "whole"
    OPEN = "open"
    """An answer that is being written; after a crash it is found so, and counts as cut."""
    CUT = "cut"
    """An answer that was stopped, or whose process died: what came until then."""
    FAILED = "failed"
    """A user's turn that got no answer; it is kept, and not sent later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, which follows `parent`: edits and retries are further children of the same one."""

    id: str
    parent: str | None
    """None for the first of a conversation."""
    role: str
    """`user`, `assistant` or `tool`; the system prompt is the session's."""
    content: str
    created: float
    """Seconds since the epoch."""
    state: State = State.WHOLE
    reasoning: str = ""
    """What an answer began with in `<think>`; not part of `content`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys as templates and OpenAI's format name them: `name`, `tool_calls`, `tool_call_id`."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """The length in tokens by tokenizer's fingerprint, as rendered in its place."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """Of an answer: `model`, `finish_reason`, `usage`, `timings`, `seed` of its done event, `fingerprint`."""

    def to_wire(self) -> dict[str, Any]:
        """As a template and OpenAI's format take it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A conversation: the path through the tree that ends at `head`, and what it is carried on with."""

    id: str
    name: str | None
    """Unique among its owner's."""
    created: float
    updated: float
    head: str | None = None
    """The newest message; None in an empty session."""
    model: str | None = None
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters by their wire names."""
    parent: str | None = None
    """The session that this was forked from, at `forked_at`."""
    forked_at: str | None = None
    owner: str = LOCAL
    directory: str | None = None
    """Where it was begun."""
    n_messages: int = 0
    """Along the path."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What an import knew beside: `source`, `title`."""
