"""Many in flight: jobs go out in groups over one connection, and what comes back goes to stdout.

Three threads: the feeder reads and sends, the listener takes event lines, the main thread has bytes
made of them and writes. Owns the fate of every job, an error record at worst, and what all of them
together mean for the exit status. Memory is bounded by the window of jobs that are read and not yet
written. Must not know what a job asks for, nor what its answer looks like.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from queue import Queue
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple

from myllm.cli.console import Streams
from myllm.cli.feeder import Asking, Feeder, Finished, J, NotSent, Refused, Source, Window, bug
from myllm.cli.ordering import Ordering
from myllm.cli.progress import Progress
from myllm.errors import MyllmError, from_wire
from myllm.events import failed
from myllm.protocol import TOKEN_LINE, parse

if TYPE_CHECKING:
    from myllm.client.client import Client
    from myllm.settings import Settings

NEWS: Final = 4
"""Times that the listener may be ahead, each with what there was to read; more stays in the socket,
which slows the model down instead."""
AT_ONCE: Final = 256 * 1024
"""Bytes that are written as one, while there are more to come."""
NO_USE: Final = frozenset({"not_found", "unavailable", "permission", "config", "cannot_create", "io"})
"""Codes that say that no job can be answered: the first ends a run that has no answer yet."""
ABOUT_A_JOB: Final = frozenset({"usage", "context_overflow", "deadline"})
"""Codes that say nothing of other jobs, even where all failed with them."""


class Lost(NamedTuple):
    """The listener's last news: the connection is gone."""

    error: MyllmError


class Connected(NamedTuple):
    """A client, and where what it says beside answers is shown."""

    client: Client
    progress: Progress
    note: Callable[[str], None]

    def tell(self, event: dict[str, Any]) -> None:
        """What of an event is for stderr; details, which each of many would have, are not."""
        if text := event.get("note"):
            if not event.get("detail"):
                self.note(text)
        else:
            self.progress.preparing(event)


@contextmanager
def connected(
    streams: Streams, settings: Settings, bars: bool | None, *, spare: bool = True
) -> Iterator[Connected]:
    """The one connection of a run; `bars` is `--progress`'s, for `spare` see `connect`, which this raises."""
    from myllm.client import connect

    with (
        connect(settings, streams.note, spare=spare) as client,
        closing(Progress(streams, bars)) as progress,
    ):
        yield Connected(client, progress, cache(streams.note))  # each note once


@dataclass(slots=True)
class Tally:
    """What became of the jobs so far."""

    n_ended: int = 0
    n_failed: int = 0
    n_refused: int = 0
    answered: bool = False
    """Whether there is any answer, or a part of one."""
    errors: dict[str, MyllmError] = field(default_factory=dict)
    """The first error of each code, in the order in which they came."""
    stopped: MyllmError | None = None
    """What ended the input, if not its end."""

    def fail(self, error: MyllmError | None) -> None:
        """One job has failed; without an error where it says so itself."""
        self.n_failed += 1
        if error:
            self.errors.setdefault(error.code, error)

    def reason(self) -> MyllmError | None:
        """Why nothing at all could be done, where all failed for one reason that is not theirs."""
        if self.answered or self.n_refused or len(self.errors) != 1:
            return None
        (code, error), *_ = self.errors.items()
        return None if code in ABOUT_A_JOB else error

    def conclude(self, streams: Streams, what: str) -> int:
        """The exit status; `what` the jobs were, in the plural. Raises what stopped the input, or let
        nothing be done.
        """
        if self.stopped:
            raise self.stopped
        if not self.n_failed:
            return 0
        if reason := self.reason():
            raise reason
        streams.note(f"{self.n_failed:,} of {self.n_ended:,} {what} failed; each says why in its error")
        return 1


class Answers(ABC, Generic[J]):
    """What a command makes of events: bytes for stdout. It counts what fails in `tally`."""

    no_use = NO_USE
    with_tokens = False

    def __init__(self) -> None:
        self.tally = Tally()

    def token(self, job: J, rest: bytes) -> bytes:
        """A token line, of which `rest` is what follows its id."""
        return b""

    def item(self, job: J, event: dict[str, Any]) -> bytes:
        """A part of a job's answer that is not the last."""
        return b""

    def totals(self, event: dict[str, Any]) -> None:
        """What the done event of a request says of all its jobs, before `done` for each."""

    @abstractmethod
    def done(self, job: J, event: dict[str, Any]) -> bytes:
        """The end of a job, by the done event of its request, or by one of its own where it was refused."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Bytes whose turn it is. Raises BrokenPipeError, IOFailureError."""


class InFlight(Generic[J]):
    """One run. `advanced` is called whenever a job is further than before."""

    def __init__(
        self,
        side: Connected,
        asking: Asking,
        answers: Answers[J],
        order: Ordering,
        advanced: Callable[[], None] = lambda: None,
    ) -> None:
        self._side = side
        self._answers = answers
        self._tally = answers.tally
        self._order = order
        self._advanced = advanced
        self._window = Window()
        self._news: Queue[Any] = Queue(NEWS)
        self._feeder: Feeder[J] = Feeder(side.client, asking, self._window, self._news)
        self._unwritten: dict[int, int] = {}
        """Sizes of jobs that have ended, by ticket, until their turn comes."""
        self._ready: list[bytes] = []
        self._n_ready = 0

    def run(self, source: Source[J]) -> None:
        """Blocks until every job has ended and is written. Raises what lets none be answered."""
        self._feeder.start(source)
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        finished: Finished | None = None
        try:
            while finished is None or self._tally.n_ended < finished.n_jobs:
                if isinstance(news := self._news.get(), Finished):
                    finished = news
                else:
                    self._take(news)
                if self._news.empty() or self._n_ready > AT_ONCE:
                    self._write_ready()
        finally:
            self._write_ready()
            self._side.progress.close()
        self._tally.stopped = finished.error

    def _listen(self) -> None:
        """Runs on the listener's thread."""
        with_tokens = self._answers.with_tokens
        try:
            for lines in self._side.client.batches():
                if kept := [line for line in lines if with_tokens or not TOKEN_LINE.match(line)]:
                    self._news.put(kept)
        except MyllmError as error:
            self._news.put(Lost(error))
        except Exception as error:  # noqa: BLE001 — the main thread would wait for ever
            self._news.put(bug(error))

    def _take(self, news: Any) -> None:
        match news:
            case list(lines):
                for line in lines:
                    self._take_line(line)
            case Refused(job, error):
                self._tally.n_refused += 1
                self._last(job, {"done": True, "error": error})
            case NotSent(jobs, error):
                self._end(jobs, failed(error))
            case Lost(error):
                self._end(self._feeder.give_up(error), failed(error))
            case MyllmError():
                raise news

    def _take_line(self, line: bytes) -> None:
        groups = self._feeder.groups
        if token := TOKEN_LINE.match(line):
            (job,) = groups[int(token[1])]
            self._put(job, self._answers.token(job, line[token.end() :]))
            return
        event = parse(line)
        number: int | None = event.pop("id", None)
        if event.get("done") is True:
            if number is None:  # the other side gives up on the connection as a whole
                raise from_wire(event.get("error") or {})
            self._end(groups.pop(number), event)
        elif number is not None and "item" in event:
            job = groups[number][event.pop("item")]
            self._put(job, self._answers.item(job, event))
        elif "note" in event or not self._tally.n_ended:
            self._side.tell(event)

    def _end(self, jobs: list[J], event: dict[str, Any]) -> None:
        error = event.get("error")
        if error and error.get("code") in self._answers.no_use and not self._tally.answered:
            raise from_wire(error)
        self._answers.totals(event)
        for job in jobs:
            self._last(job, event)

    def _last(self, job: J, event: dict[str, Any]) -> None:
        self._tally.n_ended += 1
        self._unwritten[job.ticket] = job.size
        self._put(job, self._answers.done(job, event), last=True)

    def _put(self, job: J, data: bytes, *, last: bool = False) -> None:
        ready, ended = self._order.add(job.ticket, data, last=last)
        if ready:
            self._ready.append(ready)
            self._n_ready += len(ready)
        for ticket in ended:
            self._window.release(self._unwritten.pop(ticket))
        self._advanced()

    def _write_ready(self) -> None:
        ready, self._ready, self._n_ready = b"".join(self._ready), [], 0
        if ready:
            self._answers.write(ready)
