"""`gen --batch` and `gen --map`: every record of stdin becomes one done record on stdout.

Owns which records are asked for and how, and what is said of them in the end. Must not know how lines
are parsed, put in order, resumed or sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from myllm.cli import options
from myllm.cli.answers import BatchAnswers, JsonlAnswers, RecordJob, TextAnswers
from myllm.cli.console import Streams
from myllm.cli.feeder import Asked, Asking, Refused
from myllm.cli.in_flight import InFlight, connected
from myllm.cli.input_records import Line, Record, RecordError, parsed_lines
from myllm.cli.inputs import fill, has_place
from myllm.cli.ordering import AsTheyEnd, InOrder
from myllm.cli.resume import Done, hash_of, read_done, repair_output
from myllm.errors import UsageError
from myllm.requests import Request

if TYPE_CHECKING:
    from myllm.settings import Settings

AWAITED: Final = "records on stdin, one a line"

Ask = Callable[[Record], dict[str, Any]]
"""A record → its request, without id. Raises RecordError."""


def run_batch(
    streams: Streams, settings: Settings, request: dict[str, Any], values: dict[str, Any], *, as_text: bool
) -> int:
    """Answers every record of stdin; returns the exit status. Raises what let none be answered."""
    Request.parse(request | {"prompt": ""})  # once, instead of an error for every record
    ask = _asker({"priority": options.PATIENT, **request, "stream": values["stream"]}, values["map"])
    if as_text and (values["resume"] or values["stream"]):
        raise UsageError(f"--{'resume' if values['resume'] else 'stream'}: it needs JSONL; give -o jsonl")
    done = Done()
    if values["resume"]:
        done = read_done(values["resume"])
        repair_output(streams, values["resume"], done)
    answers: BatchAnswers = (
        TextAnswers(streams) if as_text else JsonlAnswers(streams, with_tokens=values["stream"])
    )
    order = AsTheyEnd() if values["unordered"] else InOrder()
    lines = parsed_lines(
        streams.chunks(AWAITED), values["input_mode"], values["field"], "give it to a plain gen"
    )
    started = time.monotonic()
    with connected(streams, settings, values["progress"]) as side:
        run = InFlight(
            side,
            Asking(lambda requests: requests[0]),
            answers,
            order,
            lambda: side.progress.records(answers.tally.n_ended),
        )
        run.run(lambda idle: jobs(lines, ask, done))
    if values["verbose"]:
        streams.note(_statistics(answers, done, time.monotonic() - started))
    if done.changed:
        streams.note(
            f"{done.changed:,} records of the file to resume were of other input lines, and done again"
        )
    return answers.tally.conclude(streams, "records")


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


def jobs(
    lines: Iterable[tuple[Line, Record | RecordError]], ask: Ask, done: Done
) -> Iterator[Asked[RecordJob] | Refused[RecordJob]]:
    """What is to be asked of the records that are not done."""
    ticket = 0
    for index, (line, parsed) in enumerate(lines):
        input_hash = hash_of(line.data)
        if not done.has(index, input_hash):
            yield _job(RecordJob(ticket, index, parsed.own, len(line.data), input_hash), parsed, ask)
            ticket += 1


def _job(job: RecordJob, parsed: Record | RecordError, ask: Ask) -> Asked[RecordJob] | Refused[RecordJob]:
    if isinstance(parsed, Record) and parsed.upstream_error is not None:
        return Refused(job, parsed.upstream_error)
    try:
        if isinstance(parsed, RecordError):
            raise parsed
        return Asked(job, ask(parsed))
    except RecordError as error:
        return Refused(job, error.to_wire())


def _statistics(answers: BatchAnswers, done: Done, seconds: float) -> str:
    """`-v`'s one line."""
    tally = answers.tally
    return (
        f"{tally.n_ended:,} records, {tally.n_failed:,} failed, {done.skipped:,} done before; "
        f"{answers.n_tokens:,} tokens in {seconds:.1f} s, {answers.n_tokens / seconds:.1f}/s"
    )
