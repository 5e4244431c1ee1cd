"""The records of a batch as bytes for stdout: JSONL, or the texts alone.

Owns their layout: `index` first, the record's own keys, MyLLM's, which win, then `input_hash`.
`resume.py` reads what is made here. Must not know in which order they go out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import orjson

from myllm.cli.console import Streams, visible, visible_json
from myllm.cli.feeder import Job
from myllm.cli.in_flight import Answers
from myllm.errors import from_wire


@dataclass(frozen=True, slots=True)
class RecordJob(Job):
    """A record on its way."""

    input_hash: str


class BatchAnswers(Answers[RecordJob], ABC):
    """What both forms count."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.n_tokens = 0
        self._streams = streams
        self._escapes = streams.stdout_is_terminal

    def done(self, job: RecordJob, event: dict[str, Any]) -> bytes:
        """The record of one input; an answer that a deadline cut counts as failed."""
        self.n_tokens += event.get("usage", {}).get("completion_tokens", 0)
        error = event.get("error")
        if error is not None or event.get("finish_reason") == "deadline":
            self.tally.fail(from_wire(error) if error else None)
        else:
            self.tally.answered = True
        return self.record(job, event)

    @abstractmethod
    def record(self, job: RecordJob, event: dict[str, Any]) -> bytes:
        """One input's answer or error."""


class JsonlAnswers(BatchAnswers):
    """One line a done record; token lines only where they are wanted."""

    def __init__(self, streams: Streams, *, with_tokens: bool) -> None:
        super().__init__(streams)
        self.with_tokens = with_tokens

    def token(self, job: RecordJob, rest: bytes) -> bytes:
        return b'{"index":%d,%b\n' % (job.index, rest)

    def record(self, job: RecordJob, event: dict[str, Any]) -> bytes:
        record = {"index": job.index, **job.own, **event, "input_hash": job.input_hash}
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)

    def write(self, data: bytes) -> None:
        self._streams.write(visible_json(data) if self._escapes else data)


class TextAnswers(BatchAnswers):
    """Each answer's text, ending in exactly one newline; errors go to stderr."""

    def record(self, job: RecordJob, event: dict[str, Any]) -> bytes:
        """The text of one answer, or the number of tokens that were counted; nothing for an error."""
        if error := event.get("error"):
            self._streams.note(f"record {job.index}: {error.get('message')}")
            return b""
        if "full_text" not in event:
            return b"%d\n" % event["usage"]["prompt_tokens"]
        text = str(event["full_text"]).rstrip("\n") + "\n"
        return (visible(text) if self._escapes else text).encode()

    def write(self, data: bytes) -> None:
        self._streams.write(data)
