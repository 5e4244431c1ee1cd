"""The logs of Simon Willison's `llm` (logs.db): conversations of responses, as before its message store.

What newer versions write is `llm_threads.py`'s; a database may hold both. Source: `llm/migrations.py` of
0.36. A response is a turn: the prompt with its fragments and attachments, the results of the tools that the
response before called, the answer and its calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from myllm.transcripts import llm_threads
from myllm.transcripts.foreign_database import ForeignDatabase, Row, text
from myllm.transcripts.transcript import Notes, Transcript, moment
from myllm.transcripts.tree import About, Draft, assemble, chain

SOURCE: Final = "llm"
TABLES: Final = ("conversations", "responses", "tool_calls", "tool_results", "fragments", "attachments")
LINKS: Final = ("prompt_fragments", "system_fragments", "prompt_attachments", "logs")
_RESPONSES: Final = "SELECT * FROM responses ORDER BY conversation_id, id"


def parse(path: Path, notes: Notes, now: float) -> Iterator[Transcript]:
    """The conversations of a database; what has no date is of `now`. Raises BadDataError.

    Reads the file while `llm` may write to it, and changes nothing.
    """
    with ForeignDatabase(path, (*TABLES, *LINKS, *llm_threads.TABLES)) as database:
        threads: set[str] = set()
        if database.has("threads", "turns", "messages", "parts"):
            for transcript in llm_threads.parse(database, notes, now):
                threads.add(transcript.session.id)
                yield transcript
        for _ in database.rows("SELECT id FROM logs") if database.has("logs") else ():
            notes.add("row of the table `logs`, of llm's first versions")
        if database.has("conversations", "responses"):
            # A conversation that went on in a newer version is repeated there, from its beginning.
            yield from _conversations(database, threads, notes, now)


def _conversations(
    database: ForeignDatabase, known: set[str], notes: Notes, now: float
) -> Iterator[Transcript]:
    names = {row["id"]: text(row["name"]) for row in database.rows("SELECT id, name FROM conversations")}
    turns = _Turns(database, notes)
    for id_, responses in groupby(
        database.rows(_RESPONSES), key=lambda row: row["conversation_id"] or row["id"]
    ):
        if text(id_) in known:
            continue
        about = About(source=SOURCE, id=text(id_), created=now, title=names.get(id_, ""))
        drafts: list[Draft] = []
        for number, row in enumerate(responses):
            at = moment(row["datetime_utc"])
            if number == 0 and at is not None:
                about.created = at
            about.system[turns.system(row)] = None
            drafts += turns.drafts(row, about.created if at is None else at)
        yield assemble(about, chain(filter(None, drafts)), None)


class _Turns:
    """What belongs to responses in other tables, by the ids of responses."""

    def __init__(self, database: ForeignDatabase, notes: Notes) -> None:
        self._notes = notes
        self._calls = self._by_response(database, "tool_calls", "SELECT * FROM tool_calls ORDER BY id")
        self._results = self._by_response(database, "tool_results", "SELECT * FROM tool_results ORDER BY id")
        self._fragments, self._system_fragments = (
            self._by_response(
                database,
                table,
                f"SELECT l.response_id, f.content FROM {table} l JOIN fragments f ON f.id = l.fragment_id"  # noqa: S608 — one of two names
                ' ORDER BY l."order"',
            )
            for table in ("prompt_fragments", "system_fragments")
        )
        self._attachments = self._by_response(
            database,
            "prompt_attachments",
            "SELECT l.response_id, a.type FROM prompt_attachments l"
            ' JOIN attachments a ON a.id = l.attachment_id ORDER BY l."order"',
        )

    def system(self, row: Row) -> str:
        fragments = [text(fragment["content"]) for fragment in self._system_fragments[row["id"]]]
        return "\n\n".join(filter(None, (*fragments, text(row["system"]))))

    def drafts(self, row: Row, at: float) -> Iterator[Draft]:
        """The messages of a turn."""
        for result in self._results[row["id"]]:
            extra = {"tool_call_id": text(result["tool_call_id"])}
            yield Draft(role="tool", created=at, content=[text(result["output"])], extra=extra)
        fragments = [text(fragment["content"]) for fragment in self._fragments[row["id"]]]
        # llm puts a newline between fragments and prompt (`Prompt.prompt`).
        prompt = "\n".join(filter(None, (*fragments, text(row["prompt"]))))
        marks = [self._notes.mark(attachment["type"]) for attachment in self._attachments[row["id"]]]
        yield Draft(role="user", created=at, content=[prompt, *marks])
        answer = Draft(role="assistant", created=at, answer=llm_threads.answered(row))
        answer.content.append(text(row["response"]))
        answer.reasoning.append(text(row["reasoning"]))
        for call in self._calls[row["id"]]:
            answer.call(text(call["tool_call_id"]), text(call["name"]), text(call["arguments"]))
        if text(row["options_json"]) not in ("", "{}"):
            self._notes.add("response's options")
        yield answer

    @staticmethod
    def _by_response(database: ForeignDatabase, table: str, query: str) -> Mapping[Any, list[Row]]:
        found: dict[Any, list[Row]] = defaultdict(list)
        for row in database.rows(query) if database.has(table) else ():
            found[row["response_id"]].append(row)
        return found
