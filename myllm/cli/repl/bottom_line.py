"""The line below the prompt: model, session, how full the window is, what was dropped, how fast it went.

Pure. Must not know what draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from myllm.cli.repl.chat import Chat
from myllm.cli.table import on_one_line
from myllm.conversation import Session

_SEPARATOR: Final = " · "
_UNIT: Final = " tokens"


def bottom_line(chat: Chat, columns: int) -> str:
    """At most `columns` characters; what matters least goes first where they are few."""
    usage = chat.last.get("usage", {})
    window = window_used(usage)
    others = (  # in the order of their worth
        model_name(chat),
        session_name(chat.session),
        files_waiting(chat),
        messages_dropped(usage),
        speed(chat.last.get("timings", {})),
    )
    shown = [part for part in (window, *others) if part]
    if window and len(_SEPARATOR.join(shown)) > columns:
        shown[0] = window.removesuffix(_UNIT)
    while len(shown) > 1 and len(_SEPARATOR.join(shown)) > columns:
        shown.pop()
    return _SEPARATOR.join(shown)[:columns]


def window_used(usage: Mapping[str, Any]) -> str:
    """Tokens in the window after the last answer, of those it holds."""
    if not (window := usage.get("window")):
        return ""
    used = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    return f"{used:,}/{window:,}{_UNIT}"


def model_name(chat: Chat) -> str:
    """The model that answers next, or, where none was named, the one that did."""
    name = on_one_line(chat.model or str(chat.last.get("model", "")))
    return name.rpartition("/")[2]


def session_name(session: Session | None) -> str:
    """As people call it."""
    if session is None:
        return "new session"
    return on_one_line(session.name) if session.name else session.id


def files_waiting(chat: Chat) -> str:
    """How many go with the next message."""
    n_files = len(chat.files)
    return f"{n_files} file{'s' if n_files > 1 else ''} waiting" if n_files else ""


def messages_dropped(usage: Mapping[str, Any]) -> str:
    """How many of the conversation's beginning the model does not see any more."""
    dropped = usage.get("dropped_messages", 0)
    return f"{dropped:,} message{'s' if dropped > 1 else ''} dropped" if dropped else ""


def speed(timings: Mapping[str, Any]) -> str:
    """Of the last answer."""
    per_second = timings.get("tokens_per_second")
    return f"{per_second:.1f} tokens/s" if per_second else ""
