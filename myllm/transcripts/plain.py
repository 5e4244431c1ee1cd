"""A conversation as text to read in a terminal: who said what, and when.

Must not know terminals: contents are as they are, and who prints them escapes control characters.
"""

from __future__ import annotations

from collections.abc import Iterator

from myllm.conversation import Message, State
from myllm.transcripts.transcript import Transcript, calls, clean, date


def render(transcript: Transcript) -> Iterator[str]:
    """The text in pieces, each with its newline: the session, then a message each, blank lines between."""
    session = transcript.session
    about = (transcript.title(), session.id, session.model, date(session.updated))
    yield " · ".join(dict.fromkeys(filter(None, about))) + "\n"
    if session.system:
        yield f"\n[system]\n{_ended(session.system)}"
    for message in transcript.path():
        yield f"\n[{' · '.join(_heading(message))}]\n{_ended(message.content)}"
        for call in calls(message):
            yield f"→ {call.name}({call.arguments})\n"


def _heading(message: Message) -> Iterator[str]:
    name, model = message.extra.get("name"), message.answer.get("model")
    yield f"{message.role} {clean(str(name))}" if name else message.role
    if model:
        yield clean(str(model))
    yield date(message.created)
    yield message.id
    if message.state is not State.WHOLE:
        yield str(message.state)


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"
