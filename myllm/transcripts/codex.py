"""Codex's rollouts (`~/.codex/sessions/**/rollout-*.jsonl`): `{"timestamp", "type", "payload"}` a line.

A conversation is what was sent to and came from OpenAI's Responses API, in order: `response_item` lines.
Source: github.com/openai/codex, codex-rs/protocol/src/models.rs (`ResponseItem`) and protocol.rs
(`RolloutItem`). Until September 2025 items came without envelope, after a first line of `{"id", "timestamp",
"instructions"}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from myllm.transcripts.json_lines import Line, objects
from myllm.transcripts.transcript import Notes, Transcript, moment
from myllm.transcripts.tree import About, Draft, assemble, chain

SOURCE: Final = "codex"
ENVELOPES: Final = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
TEXTS: Final = ("input_text", "output_text", "summary_text", "reasoning_text", "text")


def parse(lines: Iterable[Line], notes: Notes, now: float) -> Iterator[Transcript]:
    """The conversation of a file; what has no date is of `now`. Raises BadDataError."""
    reader = _Reader(notes, now)
    for line in objects(lines, notes):
        reader.take(line)
    if drafts := [draft for draft in reader.drafts if draft]:
        yield assemble(reader.about, chain(drafts), None)


class _Reader:
    """The lines of a file so far."""

    def __init__(self, notes: Notes, now: float) -> None:
        self.about = About(source=SOURCE, id="", created=now)
        self.drafts: list[Draft] = []
        self._notes = notes
        self._model: str | None = None

    def take(self, line: Mapping[str, Any]) -> None:
        """The next line."""
        kind, payload = line.get("type"), line.get("payload")
        at = moment(line.get("timestamp"))
        at = self.about.created if at is None else at
        match kind, payload:
            case "session_meta", dict():
                self._begin(payload, at)
            case None, None if "timestamp" in line:
                self._begin(line, at)
            case "turn_context", dict():
                self._model = model if isinstance(model := payload.get("model"), str) else self._model
            case "response_item", dict():
                self._item(payload, at)
            case str(), None:
                self._item(line, at)
            case _:
                self._notes.add(f"line of type {kind!s:.40}")

    def _begin(self, meta: Mapping[str, Any], at: float) -> None:
        if self.about.id:  # a fork repeats the one that it comes from
            self._notes.add("beginning of the conversation that this one was forked from")
            return
        self.about.id = str(meta.get("id") or "")
        self.about.created = at
        self.about.directory = meta.get("cwd")
        match meta:
            case {"base_instructions": {"text": str(text)}} | {"instructions": str(text)}:
                self.about.system[text] = None

    def _item(self, item: Mapping[str, Any], at: float) -> None:
        answer = Draft(role="assistant", created=at)
        match item:
            case {"type": "message", "role": "user", "content": content}:
                self.drafts.append(Draft(role="user", created=at, content=[self._text(content)]))
            case {"type": "message", "role": "developer" | "system", "content": content}:
                self._add_system(self._text(content))
            case {"type": "message", "role": "assistant", "content": content}:
                answer.content.append(self._text(content))
            case {"type": "reasoning"}:
                answer.reasoning += [self._text(item.get("summary")), self._text(item.get("content"))]
                if not any(answer.reasoning):
                    self._notes.add("reasoning that is encrypted or empty")
            case {"type": "function_call", "call_id": id_, "name": name, "arguments": str(arguments)}:
                answer.call(id_, name, arguments)
            case {"type": "custom_tool_call", "call_id": id_, "name": name, "input": str(text)}:
                answer.call(id_, name, {"input": text})  # not JSON, which arguments are
            case {"type": "function_call_output" | "custom_tool_call_output", "call_id": id_}:
                text = self._text(item.get("output"))
                extra = {"tool_call_id": str(id_)}
                self.drafts.append(Draft(role="tool", created=at, content=[text], extra=extra))
            case _:
                self._notes.add(f"item of type {item.get('type')!s:.40}")
        if answer:
            answer.answer = {} if self._model is None else {"model": self._model}
            self.drafts.append(answer)

    def _add_system(self, text: str) -> None:
        if self.drafts and text not in self.about.system:
            self._notes.add("system message inside a conversation, now part of the system prompt")
        self.about.system[text] = None

    def _text(self, content: Any) -> str:
        """The text of a content: one, parts, or what a tool that failed gave."""
        match content:
            case str():
                return content
            case {"content": str(text)}:
                return text
            case list():
                return "\n\n".join(map(self._part, content))
        return ""

    def _part(self, part: Any) -> str:
        match part:
            case {"type": kind, "text": str(text)} if kind in TEXTS:
                return text
            case {"type": str(kind)}:
                return self._notes.mark(kind.removeprefix("input_"))
        return self._notes.mark("part")
