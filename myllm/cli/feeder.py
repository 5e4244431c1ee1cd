"""The feeder of many in flight: takes jobs from a source and sends them in groups, on a thread of its own.

Owns how far reading may be ahead of writing (`Window`), and when a group is sent. Must not know where
jobs come from, nor their answers. Everything it has to tell goes into one queue, in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from myllm.errors import InternalError, MyllmError, UnavailableError

if TYPE_CHECKING:
    from myllm.client.client import Client

HELD_JOBS: Final = 256
"""Jobs read and not yet written: four times what is in flight, so that one long answer at the head of
the order does not starve the model."""
HELD_BYTES: Final = 64 * 1024 * 1024
"""Bytes of input read and not yet written."""


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of input on its way. `ticket` counts what is to be answered, `index` what was read, both
    from 0; `own` are its keys for its answer, `size` its bytes of input.
    """

    ticket: int
    index: int
    own: Mapping[str, Any]
    size: int


J = TypeVar("J", bound=Job)


class Asked(NamedTuple, Generic[J]):
    """A job, and what of it goes into a request."""

    job: J
    content: Any


class Refused(NamedTuple, Generic[J]):
    """A job that asks for nothing that can be sent, and why, as a done event's `error`."""

    job: J
    error: dict[str, str]


class NotSent(NamedTuple, Generic[J]):
    """The jobs of a request that could not be sent."""

    jobs: list[J]
    error: MyllmError


class Finished(NamedTuple):
    """Nothing more will be sent: how many jobs there were, and the reason if not the input's end."""

    n_jobs: int
    error: MyllmError | None = None


Idle = Callable[[], None]
"""What a source may call before it waits for input: what has been gathered is sent."""
Source = Callable[[Idle], Iterable[Asked[J] | Refused[J]]]


class Asking(NamedTuple):
    """How contents become requests without id: up to `n_jobs` in one, or `n_bytes` of their input."""

    request: Callable[[list[Any]], dict[str, Any]]
    n_jobs: int = 1
    n_bytes: int = 1024 * 1024


class Window:
    """Room for what is read and not yet written; `acquire` blocks while there is none."""

    def __init__(self, n_jobs: int = HELD_JOBS, n_bytes: int = HELD_BYTES) -> None:
        self._n_jobs, self._n_bytes = n_jobs, n_bytes
        self._held_jobs = self._held_bytes = 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        """Waits for room for a job of `size` bytes; one alone always has room."""
        with self._changed:
            self._changed.wait_for(lambda: self.has_room(size))
            self._held_jobs += 1
            self._held_bytes += size

    def release(self, size: int) -> None:
        """Gives a job's room back."""
        with self._changed:
            self._held_jobs -= 1
            self._held_bytes -= size
            self._changed.notify()

    def has_room(self, size: int) -> bool:
        """Whether `acquire` would not wait."""
        if not self._held_jobs:
            return True
        return self._held_jobs < self._n_jobs and self._held_bytes + size <= self._n_bytes


class Feeder(Generic[J]):
    """Sends what a source asks for. `groups` holds the jobs of each request in flight by its id, for who
    takes the answers.
    """

    def __init__(self, client: Client, asking: Asking, window: Window, news: Queue[Any]) -> None:
        self.groups: dict[int, list[J]] = {}
        self._client = client
        self._asking = asking
        self._window = window
        self._news = news
        self._pending: list[Asked[J]] = []
        self._pending_bytes = 0
        self._n_jobs = self._n_groups = 0
        self._lost: MyllmError | None = None

    def start(self, source: Source[J]) -> None:
        """Begins to read. Ends with a `Finished`, or with the InternalError that a bug is."""
        threading.Thread(target=self._run, args=(source,), name="feeder", daemon=True).start()

    def give_up(self, error: MyllmError) -> list[J]:
        """Called where the connection is gone: takes back what was sent; the rest becomes `NotSent`."""
        self._lost = error  # first: what is sent from now on finds it
        return [job for number in list(self.groups) for job in self.groups.pop(number, [])]

    def _run(self, source: Source[J]) -> None:
        try:
            error = self._feed(source)
            self._flush()
            self._news.put(Finished(self._n_jobs, error))
        except Exception as error:  # noqa: BLE001 — the main thread would wait for ever
            self._news.put(bug(error))

    def _feed(self, source: Source[J]) -> MyllmError | None:
        """Takes all there is; returns what stopped the source."""
        try:
            for each in source(self._flush):
                self._take(each)
        except MyllmError as error:
            return error
        return None

    def _take(self, each: Asked[J] | Refused[J]) -> None:
        size = each.job.size
        if not self._window.has_room(size):
            self._flush()  # or what has been gathered would wait for room, and room for it
        self._window.acquire(size)
        self._n_jobs += 1
        if isinstance(each, Refused):
            self._news.put(each)
            return
        self._pending.append(each)
        self._pending_bytes += size
        if len(self._pending) >= self._asking.n_jobs or self._pending_bytes >= self._asking.n_bytes:
            self._flush()

    def _flush(self) -> None:
        """Sends what has been gathered."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        number = self._n_groups
        self._n_groups += 1
        self.groups[number] = [job for job, _ in pending]
        try:
            if self._lost:
                raise self._lost
            self._client.send(self._asking.request([content for _, content in pending]) | {"id": number})
        except MyllmError as error:
            if isinstance(error, UnavailableError) and self._lost is None:
                return  # the listener will see it too, after the answers that came before: see give_up
            if jobs := self.groups.pop(number, None):  # else they have been given up already
                self._news.put(NotSent(jobs, error))


def bug(error: Exception) -> InternalError:
    """What a thread tells of an exception that nobody foresaw."""
    found = InternalError(f"{threading.current_thread().name}: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
