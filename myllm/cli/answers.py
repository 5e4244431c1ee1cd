"""The records of a batch as bytes for stdout: JSONL, or the texts alone.

Owns their layout: `index` first, the record's own keys, MyLLM's, which win, then `input_hash`.
`resume.py` reads what is made here. Must not know in which order they go out.
"""

from __future__ import annotations

from typing import Any

import orjson

from myllm.cli.console import Streams, visible, visible_json
from myllm.cli.feeder import Job


class JsonlAnswers:
    """One line a done record; token lines only where they are wanted."""

    def __init__(self, streams: Streams, *, with_tokens: bool) -> None:
        self.with_tokens = with_tokens
        self._streams = streams
        self._escapes = streams.stdout_is_terminal

    def token(self, job: Job, rest: bytes) -> bytes:
        """A token line, of which `rest` is what follows its id."""
        return b'{"index":%d,%b\n' % (job.index, rest)

    def done(self, job: Job, event: dict[str, Any]) -> bytes:
        """The record of one input."""
        record = {"index": job.index, **job.own, **event, "input_hash": job.input_hash}
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)

    def write(self, data: bytes) -> None:
        """Raises BrokenPipeError, IOFailureError."""
        self._streams.write(visible_json(data) if self._escapes else data)


class TextAnswers:
    """Each answer's text, ending in exactly one newline; errors go to stderr."""

    with_tokens = False

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._escapes = streams.stdout_is_terminal

    def token(self, job: Job, rest: bytes) -> bytes:
        """Not printed: the done event has the whole text."""
        return b""

    def done(self, job: Job, event: dict[str, Any]) -> bytes:
        """The text of one answer, or the number of tokens that were counted; nothing for an error."""
        if error := event.get("error"):
            self._streams.note(f"record {job.index}: {error.get('message')}")
            return b""
        if "full_text" not in event:
            return b"%d\n" % event["usage"]["prompt_tokens"]
        text = str(event["full_text"]).rstrip("\n") + "\n"
        return (visible(text) if self._escapes else text).encode()

    def write(self, data: bytes) -> None:
        """Raises BrokenPipeError, IOFailureError."""
        self._streams.write(data)
