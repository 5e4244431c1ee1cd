"""The feeder of a batch: reads records from stdin and sends them as requests, on a thread of its own.

Owns how far reading may be ahead of writing (`Window`). Must not know answers, nor what stdout looks
like. Everything it has to tell goes into one queue, in order.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from myllm.cli.records import (
    Line,
    Record,
    RecordError,
    Skipped,
    looks_like_jsonl,
    parse_jsonl,
    parse_text,
    record_lines,
)
from myllm.errors import InternalError, MyllmError, UnavailableError
from myllm.protocol import MAX_LINE

if TYPE_CHECKING:
    from myllm.cli.resume import Done
    from myllm.client.client import Client

HELD_RECORDS: Final = 256
"""Records read and not yet written: four times what is in flight, so that one long answer at the
head of the order does not starve the model."""
HELD_BYTES: Final = 64 * 1024 * 1024
"""Bytes of input lines read and not yet written."""

Ask = Callable[[Record], dict[str, Any]]
"""A record → its request, without id. Raises RecordError."""


@dataclass(frozen=True, slots=True)
class Job:
    """A record on its way. `ticket` counts what is to be answered, `index` what was read; both from 0."""

    ticket: int
    index: int
    input_hash: str
    size: int
    own: Mapping[str, Any]


class BadLine(NamedTuple):
    """A line that asks for nothing that can be sent, and why, as a done event's `error`."""

    job: Job
    error: dict[str, str]


class NotSent(NamedTuple):
    """A request that could not be sent."""

    job: Job
    error: MyllmError


class Finished(NamedTuple):
    """Nothing more will be sent: how many jobs there were, how many were done before, and what, if
    not the end of stdin, was the reason.
    """

    n_jobs: int
    n_skipped: int
    error: MyllmError | None = None


class Window:
    """Room for what is read and not yet written; `acquire` blocks while there is none."""

    def __init__(self, records: int = HELD_RECORDS, size: int = HELD_BYTES) -> None:
        self._records, self._size = records, size
        self._held_records = self._held_size = 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        """Waits for room for a record of `size` bytes; one alone always has room."""
        with self._changed:
            self._changed.wait_for(lambda: self.has_room(size))
            self._held_records += 1
            self._held_size += size

    def release(self, size: int) -> None:
        """Gives a record's room back."""
        with self._changed:
            self._held_records -= 1
            self._held_size -= size
            self._changed.notify()

    def has_room(self, size: int) -> bool:
        """Whether `acquire` would not wait."""
        if not self._held_records:
            return True
        return self._held_records < self._records and self._held_size + size <= self._size


class Feeder:
    """Sends what `lines` ask for; `jobs` holds those in flight by ticket, for who takes the answers."""

    def __init__(self, client: Client, ask: Ask, window: Window, news: Queue[Any], done: Done) -> None:
        self.jobs: dict[int, Job] = {}
        self._client = client
        self._ask = ask
        self._window = window
        self._news = news
        self._done = done
        self._n_jobs = self._n_skipped = 0
        self._lost: MyllmError | None = None

    def start(self, chunks: Iterable[bytes], mode: str, text_field: str | None) -> None:
        """Begins to read; `mode` is `--input`'s, `text_field` `--field`'s. Ends with a `Finished`."""
        threading.Thread(
            target=self._run, args=(chunks, mode, text_field), name="feeder", daemon=True
        ).start()

    def _run(self, chunks: Iterable[bytes], mode: str, text_field: str | None) -> None:
        error: MyllmError | None = None
        try:
            self._feed(record_lines(chunks), mode, text_field)
        except MyllmError as failure:
            error = failure
        except Exception as bug:  # noqa: BLE001 — the main thread would wait for ever
            error = InternalError(f"batch: {type(bug).__name__}: {bug}")
            error.__cause__ = bug
        self._news.put(Finished(self._n_jobs, self._n_skipped, error))

    def _feed(self, lines: Iterable[Line], mode: str, text_field: str | None) -> None:
        index = 0
        for line in lines:
            if mode == "auto":
                mode = "jsonl" if looks_like_jsonl(line) else "lines"
            parsed: Record | Skipped | RecordError
            try:
                parsed = _parse(line, mode, text_field)
            except RecordError as error:
                parsed = error
            if not isinstance(parsed, Skipped):
                self._take(parsed, index, line)
                index += 1

    def _take(self, parsed: Record | RecordError, index: int, line: Line) -> None:
        input_hash = hash_of(line.data)
        if self._done.has(index, input_hash):
            self._n_skipped += 1
            return
        self._window.acquire(len(line.data))
        job = Job(self._n_jobs, index, input_hash, len(line.data), parsed.own)
        self._n_jobs += 1
        if isinstance(parsed, Record) and parsed.upstream_error is not None:
            self._news.put(BadLine(job, parsed.upstream_error))
            return
        try:
            if isinstance(parsed, RecordError):
                raise parsed
            request = self._ask(parsed)
        except RecordError as error:
            self._news.put(BadLine(job, error.to_wire()))
        else:
            self._send(request | {"id": job.ticket}, job)

    def _send(self, request: dict[str, Any], job: Job) -> None:
        self.jobs[job.ticket] = job
        try:
            if self._lost:
                raise self._lost
            self._client.send(request)
        except MyllmError as error:
            if isinstance(error, UnavailableError) and self._lost is None:
                return  # the listener will see it too, after the answers that came before: see give_up
            if self.jobs.pop(job.ticket, None):  # else it has been given up already
                self._news.put(NotSent(job, error))

    def give_up(self, error: MyllmError) -> list[Job]:
        """Called where the connection is gone: takes back what was sent; the rest becomes `NotSent`."""
        self._lost = error  # first: what is sent from now on finds it
        tickets = list(self.jobs)
        return [job for ticket in tickets if (job := self.jobs.pop(ticket, None))]


def hash_of(line: bytes) -> str:
    """The `input_hash` of a record: 16 hexadecimal digits of the SHA-256 of its line."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def _parse(line: Line, mode: str, text_field: str | None) -> Record | Skipped:
    if line.too_long:
        raise RecordError(f"line: longer than {MAX_LINE:,} bytes; split it, or give it to a plain gen")
    return parse_jsonl(line.data, text_field) if mode == "jsonl" else parse_text(line.data)
