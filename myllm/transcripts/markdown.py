"""A conversation as a Markdown page: all that was said along the path, and what is known of it.

Contents stand in block quotes, so that they are rendered, and no heading, fence or HTML in one reaches beyond
it (CommonMark §5.1: a container's end ends what is in it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from myllm.conversation import Message, Session, State
from myllm.transcripts.json_lines import dumps
from myllm.transcripts.transcript import Transcript, calls, clean, date

_SPECIAL: Final = r"([\\`*_{}\[\]<>()#+!|~&-])"
_LINE_END: Final = r"\r\n|\r|\n"
"""What ends a line in CommonMark."""


def render(transcript: Transcript) -> Iterator[str]:
    """The page in pieces, newline at the end."""
    session = transcript.session
    yield f"# {_escaped(transcript.title())}\n"
    yield "\n{}\n".format("\n".join(_facts(session)))
    if session.system:
        yield f"\n## System\n\n{_quoted(session.system)}\n"
    for message in transcript.path():
        for block in _blocks(message):
            yield f"\n{block}\n"


def _facts(session: Session) -> Iterator[str]:
    yield f"- Session: {_code(session.id)}"
    for what, value in (("Model", session.model), ("Directory", session.directory)):
        if value:
            yield f"- {what}: {_code(value)}"
    if source := session.extra.get("source"):
        yield f"- Imported from: {_code(str(source))}"
    yield f"- Begun: {date(session.created)}"
    yield f"- Changed: {date(session.updated)}"
    if session.settings:
        yield f"- Settings: {_code(dumps(dict(session.settings)))}"


def _blocks(message: Message) -> Iterator[str]:
    yield f"## {' · '.join(_heading(message))}"
    if message.reasoning:
        yield "### Reasoning"
        yield _quoted(message.reasoning)
        if message.content:
            yield "### Answer"
    if message.content:
        yield _quoted(message.content)
    for call in calls(message):
        yield " ".join(filter(None, ("### Calls", _code(call.name), _code(call.id))))
        yield _fenced(call.arguments)


def _heading(message: Message) -> Iterator[str]:
    yield message.role.capitalize()
    for key in ("name", "tool_call_id"):
        if value := message.extra.get(key):
            yield _code(str(value))
    if model := message.answer.get("model"):
        yield _code(str(model))
    yield date(message.created)
    if message.state is not State.WHOLE:
        yield str(message.state)
    if (reason := message.answer.get("finish_reason", "stop")) != "stop":
        yield f"finish reason: {_escaped(clean(str(reason)))}"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" if line else ">" for line in re.split(_LINE_END, text))


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}json\n{text}\n{fence}"


def _code(text: str) -> str:
    """A text on one line as a code span; the spaces are not shown (CommonMark §6.1)."""
    shown = clean(text)
    if not shown:
        return ""
    ticks = "`" * (_longest_run(shown) + 1)
    return f"{ticks}{shown}{ticks}" if "`" not in shown else f"{ticks} {shown} {ticks}"


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _escaped(text: str) -> str:
    return re.sub(_SPECIAL, r"\\\1", text)
