"""`gen --batch` and `gen --map`: every record of stdin becomes one done record on stdout.

Three threads: the feeder reads and sends, the listener takes event lines, the main thread makes
records of them and writes. Owns the fate of every record, an error record at worst, and the exit
status of all. Must not know how lines are parsed, put in order, resumed or sent.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from queue import Queue
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from myllm.cli.answers import JsonlAnswers, TextAnswers
from myllm.cli.console import Streams
from myllm.cli.feeder import Ask, BadLine, Feeder, Finished, Job, NotSent, Window
from myllm.cli.inputs import fill, has_place
from myllm.cli.ordering import AsTheyEnd, InOrder, Ordering
from myllm.cli.progress import Progress
from myllm.cli.records import Record, RecordError
from myllm.cli.resume import Done, read_done, repair_output
from myllm.errors import InternalError, MyllmError, UsageError, from_wire
from myllm.protocol import TOKEN_LINE, error_event, parse
from myllm.requests import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from myllm.client.client import Client
    from myllm.settings import Settings

AWAITED: Final = "records on stdin, one a line"
PATIENT: Final = 1
"""The priority of a batch's requests: whoever waits at a terminal comes first."""
NEWS: Final = 1024
"""Events that may wait for stdout; more stay in the socket, which slows the model down instead."""
NO_USE: Final = frozenset({"not_found", "unavailable", "permission", "config", "cannot_create", "io"})
"""Codes that say that no record can be answered: the first ends a batch that has no answer yet."""
ABOUT_A_RECORD: Final = frozenset({"usage", "context_overflow", "deadline"})
"""Codes that say nothing of other records, even where all failed with them."""


class Lost(NamedTuple):
    """The listener's last news: the connection is gone."""

    error: MyllmError


@dataclass(slots=True)
class Tally:
    """What became of the records so far."""

    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    bad_lines: int = 0
    errors: dict[str, MyllmError] = field(default_factory=dict)
    """The first error of each code among those that were not the line's own fault."""

    @property
    def n_records(self) -> int:
        return self.succeeded + self.failed

    def count(self, event: dict[str, Any]) -> None:
        """Takes a done event in; an answer that a deadline cut counts as failed."""
        self.tokens += event.get("usage", {}).get("completion_tokens", 0)
        error = event.get("error")
        if error is None and event.get("finish_reason") != "deadline":
            self.succeeded += 1
            return
        self.failed += 1
        if error:
            self.errors.setdefault(error["code"], from_wire(error))

    def count_bad_line(self) -> None:
        """Takes a line in that never became a request."""
        self.failed += 1
        self.bad_lines += 1

    def reason(self) -> MyllmError | None:
        """Why nothing at all could be done, where all failed for one reason that is not theirs."""
        if self.succeeded or self.bad_lines or len(self.errors) != 1:
            return None
        (code, error), *_ = self.errors.items()
        return None if code in ABOUT_A_RECORD else error


def run_batch(
    streams: Streams, settings: Settings, request: dict[str, Any], values: dict[str, Any], *, as_text: bool
) -> int:
    """Answers every record of stdin; returns the exit status. Raises what let none be answered."""
    Request.parse(request | {"prompt": ""})  # once, instead of an error for every record
    ask = _asker({"priority": PATIENT, **request, "stream": values["stream"]}, values["template"])
    if as_text and (values["resume"] or values["stream"]):
        raise UsageError(f"--{'resume' if values['resume'] else 'stream'}: it needs JSONL; give -o jsonl")
    done = Done()
    if values["resume"]:
        done = read_done(values["resume"])
        repair_output(streams, values["resume"], done)
    answers = TextAnswers(streams) if as_text else JsonlAnswers(streams, with_tokens=values["stream"])
    progress = Progress(streams, values["progress"])
    started = time.monotonic()

    from myllm.client import connect

    with connect(settings, streams.note) as client:
        batch = Batch(client, answers, AsTheyEnd() if values["unordered"] else InOrder(), progress)
        try:
            finished = batch.run(ask, done, streams.chunks(AWAITED), values["input_mode"], values["field"])
        finally:
            progress.close()
    if values["verbose"]:
        streams.note(_statistics(batch.tally, finished, time.monotonic() - started))
    return _conclude(streams, batch.tally, finished, done)


def _asker(base: dict[str, Any], template: str | None) -> Ask:
    """How a record becomes a request: with its parameters (`--batch`), or with its text in `template`."""

    def ask(record: Record) -> dict[str, Any]:
        content = {"prompt": record.text} if record.messages is None else {"messages": record.messages}
        return base | dict(record.parameters) | content

    def ask_template(record: Record) -> dict[str, Any]:
        if record.text is None:
            raise RecordError("messages: --map needs a text; give --batch for conversations")
        return base | {"prompt": fill(template or "", record.text)}

    if template is None:
        return ask
    if not has_place(template):
        raise UsageError(f"--map: no {{}} in it for the record's text; say {template + ' {}'!r}")
    return ask_template


class Batch:
    """One run over stdin. `tally` is what became of it."""

    def __init__(
        self, client: Client, answers: JsonlAnswers | TextAnswers, order: Ordering, progress: Progress
    ) -> None:
        self.tally = Tally()
        self._client = client
        self._answers = answers
        self._order = order
        self._progress = progress
        self._window = Window()
        self._news: Queue[Any] = Queue(NEWS)
        self._unwritten: dict[int, int] = {}
        """Sizes of records that have their answer, by ticket, until it is written."""

    def run(
        self, ask: Ask, done: Done, chunks: Iterable[bytes], mode: str, text_field: str | None
    ) -> Finished:
        """Blocks until every record has been answered and written. Raises what lets none be answered."""
        feeder = Feeder(self._client, ask, self._window, self._news, done)
        feeder.start(chunks, mode, text_field)
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        finished: Finished | None = None
        while finished is None or self.tally.n_records < finished.n_jobs:
            match self._news.get():
                case bytes(line):
                    self._take(line, feeder.jobs)
                case BadLine(job, error):
                    self.tally.count_bad_line()
                    self._write(job, {"done": True, "error": error})
                case NotSent(job, error):
                    self._end(job, error_event(error))
                case Lost(error):
                    for job in feeder.give_up(error):
                        self._end(job, error_event(error))
                case Finished() as finished:
                    pass
        return finished

    def _listen(self) -> None:
        """Runs on the listener's thread."""
        try:
            for line in self._client.events():
                if self._answers.with_tokens or not TOKEN_LINE.match(line):
                    self._news.put(line)
        except MyllmError as error:
            self._news.put(Lost(error))
        except Exception as bug:  # noqa: BLE001 — the main thread would wait for ever
            self._news.put(Lost(InternalError(f"batch: {type(bug).__name__}: {bug}")))

    def _take(self, line: bytes, jobs: dict[int, Job]) -> None:
        if token := TOKEN_LINE.match(line):
            job = jobs[int(token[1])]
            self._release(
                *self._order.add(job.ticket, self._answers.token(job, line[token.end() :]), last=False)
            )
            return
        event = parse(line)
        ticket = event.pop("id", None)
        if event.get("done") is not True:
            if not self.tally.n_records:
                self._progress.preparing(event)
        elif ticket is not None:
            self._end(jobs.pop(ticket), event)
        else:  # the other side gives up on the connection as a whole
            raise from_wire(event.get("error") or {})

    def _end(self, job: Job, event: dict[str, Any]) -> None:
        if (error := event.get("error")) and error["code"] in NO_USE and not self.tally.succeeded:
            raise from_wire(error)
        self.tally.count(event)
        self._write(job, event)

    def _write(self, job: Job, event: dict[str, Any]) -> None:
        self._unwritten[job.ticket] = job.size
        self._release(*self._order.add(job.ticket, self._answers.done(job, event), last=True))
        self._progress.records(self.tally.n_records)

    def _release(self, data: bytes, written: list[int]) -> None:
        self._answers.write(data)
        for ticket in written:
            self._window.release(self._unwritten.pop(ticket))


def _conclude(streams: Streams, tally: Tally, finished: Finished, done: Done) -> int:
    """Notes on stderr and the exit status. Raises what stopped the feeder, or let nothing be done."""
    if done.changed:
        streams.note(
            f"{done.changed:,} records of the file to resume were of other input lines, and done again"
        )
    if finished.error:
        raise finished.error
    if not tally.failed:
        return 0
    if reason := tally.reason():
        raise reason
    streams.note(f"{tally.failed:,} of {tally.n_records:,} records failed; each says why in its error")
    return 1


def _statistics(tally: Tally, finished: Finished, seconds: float) -> str:
    """`-v`'s one line."""
    return (
        f"{tally.n_records:,} records, {tally.failed:,} failed, {finished.n_skipped:,} done before; "
        f"{tally.tokens:,} tokens in {seconds:.1f} s, {tally.tokens / seconds:.1f}/s"
    )
