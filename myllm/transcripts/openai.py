"""OpenAI's messages, as fine-tuning files and chat requests have them: `{"messages": […]}` lines.

Also plain lines of `{"role", "content"}`, which are one conversation. Holds the path to the head and no
dates, models or reasoning. Source: platform.openai.com/docs/guides/supervised-fine-tuning and the API
reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from myllm.conversation import Message, Session, State
from myllm.errors import BadDataError
from myllm.transcripts.json_lines import Line, dumps, loads
from myllm.transcripts.transcript import Notes, Transcript, clean

SOURCE: Final = "openai"
SYSTEM: Final = ("system", "developer")
_KEPT: Final = ("tool_calls", "tool_call_id", "name")


def export(transcript: Transcript) -> Iterator[bytes]:
    """One line in pieces, newline included: the system prompt and the path, without turns that got no answer.

    Raises BadDataError for text that UTF-8 cannot carry.
    """
    yield b'{"messages":['
    separator = b""
    for wire in _sent(transcript):
        try:
            yield separator + orjson.dumps(wire)
        except TypeError as error:
            id_ = transcript.session.id
            raise BadDataError(f"session {id_!r:.80}: cannot be exported as JSON: {error}") from error
        separator = b","
    yield b"]}\n"


def _sent(transcript: Transcript) -> Iterator[dict[str, Any]]:
    if system := transcript.session.system:
        yield {"role": "system", "content": system}
    for message in transcript.path():
        if message.state is not State.FAILED:
            yield message.to_wire()


def parse(lines: Iterable[Line], notes: Notes, now: float) -> Iterator[Transcript]:
    """A session for each line of messages, or one of all plain lines, made at `now`.

    Raises BadDataError naming the line.
    """
    plain = _Conversation(now, "1")
    for line in lines:
        try:
            record = loads(line.data)
            if not isinstance(record, dict):
                raise BadDataError("not a JSON object")
            if isinstance(messages := record.pop("messages", None), list):
                for key in record:
                    notes.add(f"{key!r:.40} beside messages")
                whole = _Conversation(now, str(line.number))
                for message in messages:
                    whole.add(message, notes)
                yield whole.transcript()
            else:
                plain.add(record, notes)
        except BadDataError as error:
            raise BadDataError(f"line {line.number:,}: {error}") from error
    if plain.messages or plain.system:
        yield plain.transcript()


@dataclass
class _Conversation:
    created: float
    id: str
    system: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def add(self, wire: Any, notes: Notes) -> None:
        """The next message as it came. Raises BadDataError."""
        role = wire.get("role") if isinstance(wire, dict) else None
        if role not in (*SYSTEM, "user", "assistant", "tool"):
            raise BadDataError(f"expected a message with a role, not {wire!r:.80}")
        content = _content(wire.get("content"), notes)
        if role in SYSTEM:
            if self.messages:
                notes.add("system message inside a conversation, now part of the system prompt")
            self.system.append(content)
            return
        for key in wire.keys() - {"role", "content", *_KEPT}:
            notes.add(f"{key!r:.40} of a message")
        extra = {key: _checked(key, wire[key]) for key in _KEPT if wire.get(key) is not None}
        parent = self.messages[-1].id if self.messages else None
        number = str(len(self.messages) + 1)
        self.messages.append(
            Message(id=number, parent=parent, role=role, content=content, created=self.created, extra=extra)
        )

    def transcript(self) -> Transcript:
        session = Session(
            id=self.id,
            name=None,
            created=self.created,
            updated=self.created,
            head=self.messages[-1].id if self.messages else None,
            system="\n\n".join(self.system) or None,
            n_messages=len(self.messages),
            extra={"source": SOURCE},
        )
        return Transcript(session, self.messages)


def _content(content: Any, notes: Notes) -> str:
    """A message's text, which may come in parts, or be null beside tool calls."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadDataError(f"content: expected a text or parts, not {content!r:.80}")
    return "".join(_part(part, notes) for part in content)


def _part(part: Any, notes: Notes) -> str:
    if not isinstance(part, dict):
        raise BadDataError(f"content: expected a part with a type, not {part!r:.80}")
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    return notes.mark(str(part.get("type")).removesuffix("_url"))


def _checked(key: str, value: Any) -> Any:
    if key == "tool_calls":
        if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
            raise BadDataError(f"tool_calls: expected a list of objects, not {value!r:.80}")
        dumps(value)
        return value
    if not isinstance(value, str) or value != clean(value):
        raise BadDataError(f"{key}: expected printable characters, not {value!r:.80}")
    return value
