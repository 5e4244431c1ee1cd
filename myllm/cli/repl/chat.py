"""What the next message is sent with: session, model, system message, settings, files that wait.

Owns how these become a request, and what `/set` may change. Pure: must not know the store, the client or
the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

from myllm.cli.attachments import Attachment
from myllm.conversation import Session
from myllm.errors import UsageError
from myllm.protocol import MAX_SEED, SAMPLING, Parameter, checked_number

SETTINGS: Final[Mapping[str, Parameter]] = {
    **SAMPLING,
    "max_tokens": Parameter(int, 0, 2**31 - 1, 0),
    "seed": Parameter(int, 0, MAX_SEED, 0),
}
"""What `/set` takes."""
_KEPT: Final = (*SETTINGS, "logit_bias", "stop", "ignore_eos")
"""What of a request is the session's to keep; the rest of it is this command's own."""


@dataclass(slots=True)
class Chat:
    """Where the conversation stands."""

    directory: str
    """Where a new session counts as begun."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What goes into every request as it is: loading options, deadline."""
    session: Session | None = None
    """None until the first message, and where nothing can be saved."""
    unsaved: str | None = None
    """The id that the Runtime gave a conversation that is not saved."""
    model: str | None = None
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    files: list[Attachment] = field(default_factory=list)
    """They go with the next message."""
    answer: str = ""
    """The last one's text."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the last answer, as its done event tells it."""

    def enter(self, session: Session) -> None:
        """Goes on with `session`, its model, system message and settings."""
        self.session = session
        self.model, self.system, self.settings = session.model, session.system, dict(session.settings)

    def request(self, prompt: str) -> dict[str, Any]:
        """The request of a turn."""
        request = {**self.fixed, **self.settings, "op": "chat", "prompt": prompt, "directory": self.directory}
        if self.model is not None:
            request["model"] = self.model
        if session := self.session.id if self.session else self.unsaved:
            request["session"] = session
        if self.session is None and self.system is not None:
            request["system"] = self.system
        return request


def begun(request: Mapping[str, Any], session: Session | None, directory: str) -> Chat:
    """The state at the start: what the command's options say goes before what the session has."""
    chat = Chat(directory)
    if session is not None:
        chat.enter(session)
    given = dict(request)
    chat.model = given.pop("model", None) or chat.model
    chat.system = given.pop("system", chat.system)
    chat.settings |= {name: given.pop(name) for name in _KEPT if name in given}
    chat.fixed = given
    return chat


def assigned(settings: Mapping[str, Any], argument: str) -> dict[str, Any]:
    """The settings after `/set NAME VALUE`, `NAME=VALUE` or, for the default, `NAME`. Raises UsageError."""
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    if name not in SETTINGS:
        near = get_close_matches(name, SETTINGS, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see /help set"
        raise UsageError(f"{name}: no such parameter; {hint}")
    others = {key: value for key, value in settings.items() if key != name}
    if not text.strip():
        return others
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name}: expected a number, not {text.strip()!r:.80}")
    return others | {name: checked_number(name, number, SETTINGS[name])}
