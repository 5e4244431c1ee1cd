"""What `embed` makes of a Runtime's items: a record a vector, an error record a text that failed.

Owns what became of every text, and how far its input is done. Must not know options, formats or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from myllm.cli.documents import Text
from myllm.cli.feeder import Asked, Asking, Job, Refused
from myllm.cli.in_flight import NO_USE, Answers, Connected
from myllm.errors import from_wire
from myllm.protocol import parse

GROUP: Final = 64
"""Texts in one request."""


@dataclass(frozen=True, slots=True)
class TextJob(Job):
    """A text on its way."""

    n_chars: int


def asking(base: dict[str, Any]) -> Asking:
    """Texts in groups, each the request `base` with them."""
    return Asking(lambda texts: {**base, "texts": texts}, GROUP)


def jobs(texts: Iterable[Text]) -> Iterator[Asked[TextJob] | Refused[TextJob]]:
    """The texts as jobs, numbered."""
    for index, (own, size, text, error) in enumerate(texts):
        job = TextJob(index, index, own, size, len(text or ""))
        yield Refused(job, error or {}) if text is None else Asked(job, text)


def embed_one(side: Connected, base: dict[str, Any], text: str) -> list[str]:
    """The vectors of one text's windows, in base64; blocks. Nothing else may be in flight.

    Raises what the text failed with.
    """
    vectors = []
    for line in side.client.stream(base | {"texts": [text]}):
        event = parse(line)
        if error := event.get("error"):
            raise from_wire(error)
        if "embedding" in event:
            vectors.append(event["embedding"])
        else:
            side.tell(event)
    return vectors


class VectorRecords(Answers[TextJob]):
    """`shaped` makes bytes of a record, `write` takes them in the order of input."""

    no_use = NO_USE | {"usage"}  # which is here what all texts are asked with

    def __init__(self, shaped: Callable[[dict[str, Any]], bytes], write: Callable[[bytes], None]) -> None:
        super().__init__()
        self.n_cached = self.n_vectors = self.n_tokens = self.n_empty = 0
        self.n_bytes = 0
        """Of the input, about, that have vectors or never will."""
        self.model: str | None = None
        self._shaped = shaped
        self._write = write
        self._reached: dict[int, int] = {}
        """Of each text under way, the bytes that are done: all of them once it is."""

    def write(self, data: bytes) -> None:
        self._write(data)

    def item(self, job: TextJob, event: dict[str, Any]) -> bytes:
        if error := event.get("error"):
            return self._fail(job, error)
        self.tally.answered = True
        self.n_vectors += 1
        self.n_tokens += event.get("tokens", 0)
        self.n_empty += event["end"] == 0
        self._reach(job, event["end"])
        return self._shaped({"index": job.index, **job.own, **event})

    def totals(self, event: dict[str, Any]) -> None:
        self.model = event.get("model", self.model)
        self.n_cached += event.get("usage", {}).get("cached_texts", 0)

    def done(self, job: TextJob, event: dict[str, Any]) -> bytes:
        """Nothing more where the text has had all its vectors, or its error."""
        error = event.get("error")
        whole = self._reached.get(job.ticket) == job.size
        data = b"" if whole or error is None else self._fail(job, error)
        self._reach(job, job.n_chars)
        del self._reached[job.ticket]
        return data

    def _fail(self, job: TextJob, error: dict[str, str]) -> bytes:
        self.tally.fail(from_wire(error))
        self._reach(job, job.n_chars)
        return self._shaped({"index": job.index, **job.own, "done": True, "error": error})

    def _reach(self, job: TextJob, end: int) -> None:
        """A text is done up to its character `end`."""
        n_bytes = job.size if end >= job.n_chars else job.size * end // job.n_chars
        self.n_bytes += n_bytes - self._reached.get(job.ticket, 0)
        self._reached[job.ticket] = n_bytes
