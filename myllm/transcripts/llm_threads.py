"""The logs of `llm` since its message store: messages shared by threads, each named by a hash with its
parent's.

Owns the tables `threads`, `turns`, `messages` and `parts`. Source: `llm/logs.py` and `llm/parts.py` of 0.36.
A thread is a session; its tree is what its turns end in. Rows of messages know no time: their turn does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from myllm.errors import BadDataError
from myllm.transcripts.foreign_database import MAX_ROWS, ForeignDatabase, Row, text
from myllm.transcripts.json_lines import loads
from myllm.transcripts.transcript import Notes, Transcript, moment
from myllm.transcripts.tree import About, Draft, Node, assemble

SOURCE: Final = "llm"
TABLES: Final = ("threads", "turns", "messages", "parts")
_TURNS: Final = "SELECT * FROM turns WHERE thread_id = ? ORDER BY id"
_MESSAGE: Final = "SELECT parent_hash, role FROM messages WHERE hash = ?"
_PARTS: Final = "SELECT * FROM parts WHERE message_hash = ? ORDER BY position"
_FRAGMENT: Final = "SELECT content FROM fragments WHERE id = ?"


def parse(database: ForeignDatabase, notes: Notes, now: float) -> Iterator[Transcript]:
    """The threads of a database; what has no date is of `now`. Raises BadDataError."""
    budget = MAX_ROWS  # all threads may share one long chain, and each is written out
    for row in list(database.rows("SELECT * FROM threads ORDER BY id")):
        created = moment(row["datetime_utc"])
        about = About(
            source=SOURCE,
            id=text(row["id"]),
            created=now if created is None else created,
            title=text(row["name"]),
        )
        if row["forked_from"]:
            notes.add("mark of a thread as the fork of another")
        thread = _Thread(database, notes, about)
        for turn in list(database.rows(_TURNS, (row["id"],))):
            thread.take(text(turn["tip_message_hash"]), turn)
        thread.take(text(row["tip_message_hash"]), Row())
        budget -= len(thread.nodes)
        if budget < 0:
            raise BadDataError(f"its threads hold more than {MAX_ROWS:,} messages")
        yield assemble(about, thread.nodes, text(row["tip_message_hash"]))


@dataclass
class _Thread:
    database: ForeignDatabase
    notes: Notes
    about: About
    nodes: dict[str, Node] = field(default_factory=dict)

    def take(self, tip: str, turn: Row) -> None:
        """Adds what leads to `tip` and is not there yet; it came with `turn`."""
        at = moment(turn["datetime_utc"])
        at = self.about.created if at is None else at
        if text(turn["options_json"]) not in ("", "{}"):
            self.notes.add("response's options")
        place = tip
        while place and place not in self.nodes:
            row = next(self.database.rows(_MESSAGE, (place,)), None)
            if row is None:
                self.notes.add("message that is missing in the database")
                return
            self.nodes[place] = Node(text(row["parent_hash"]) or None, self._drafts(place, row, at, turn))
            place = text(row["parent_hash"])

    def _drafts(self, hash_: str, row: Row, at: float, turn: Row) -> list[Draft]:
        draft = Draft(role=text(row["role"]), created=at)
        results: list[Draft] = []
        for part in list(self.database.rows(_PARTS, (hash_,))):
            self._part(draft, results, part)
        if draft.role == "system":
            self.about.system["".join(draft.content)] = None
            return []
        if draft.role == "assistant" and turn:
            draft.answer = answered(turn)
        if draft.role not in ("user", "assistant", "tool"):
            self.notes.add(f"message of role {draft.role:.40}")
            return []
        return [*results, draft] if any(draft.content) or draft.role != "tool" else results

    def _part(self, draft: Draft, results: list[Draft], row: Row) -> None:
        """Adds a part to its message; a tool's result is a message of its own."""
        payload = self._payload(row)
        match row["type"], payload:
            case "text", {"text": str(given)}:
                draft.content.append(given)
            case "reasoning", {"text": str(given)}:
                draft.reasoning.append(given)
                if payload.get("redacted"):
                    self.notes.add("reasoning that was withheld")
            case "tool_call", {"name": name, "arguments": arguments}:
                draft.call(payload.get("tool_call_id") or "", name, arguments)
            case "tool_result", {"output": str(output)}:
                extra = {"tool_call_id": str(payload.get("tool_call_id") or "")}
                marks = [self.notes.mark("attachment") for _ in payload.get("attachments") or ()]
                content = [output, *marks]
                results.append(Draft(role="tool", created=draft.created, content=content, extra=extra))
            case kind, _:
                draft.content.append(self.notes.mark(kind))

    def _payload(self, row: Row) -> dict[str, Any]:
        """What a part holds, its literal text and fragments put back."""
        payload = loads(text(row["payload"]).encode() or b"{}")
        if not isinstance(payload, dict):
            return {}
        if isinstance(pieces := payload.pop("text_ref", None), list):
            payload["text"] = "".join(map(self._piece, pieces))
        return {**payload, "text": row["text"]} if row["text"] is not None else payload

    def _piece(self, piece: Any) -> str:
        match piece:
            case {"literal": str(given)}:
                return given
            case {"fragment": int(id_)} if self.database.has("fragments"):
                row = next(self.database.rows(_FRAGMENT, (id_,)), None)
                if row is not None:
                    return text(row["content"])
        return self.notes.mark("fragment")


def answered(row: Row) -> dict[str, Any]:
    """What a row of `turns`, or of `responses`, knows of its answer, as in MyLLM's done events."""
    prompt, made = row["input_tokens"], row["output_tokens"]
    answer: dict[str, Any] = {"model": text(row["resolved_model"]) or text(row["model"])}
    if isinstance(prompt, int) and isinstance(made, int):
        answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": made}
    return answer
