"""One run of `embed`: texts in groups to a Runtime, its items back as records in the order of input.

Two threads beside the main one: the feeder reads and sends, the listener takes event lines. Owns the
fate of every text, an error record at worst. Memory is bounded by the window of texts that are read
and not yet written. Must not know options, formats or files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from myllm.cli.documents import Text
from myllm.cli.feeder import Window
from myllm.cli.ordering import InOrder
from myllm.errors import InternalError, MyllmError, from_wire
from myllm.protocol import parse

if TYPE_CHECKING:
    from myllm.client.client import Client

GROUP: Final = 64
"""Texts in one request."""
GROUP_BYTES: Final = 1024 * 1024
"""Bytes of text after which a group is sent though it is not full."""
HELD_TEXTS: Final = 4 * GROUP
HELD_BYTES: Final = 64 * 1024 * 1024
NEWS: Final = 4
"""Times that the listener may be ahead; each brings what there was to read."""
AT_ONCE: Final = 256 * 1024
"""Bytes of records that are written as one, while there are more to come."""
NO_USE: Final = frozenset(
    {"not_found", "unavailable", "permission", "config", "cannot_create", "io", "usage"}
)
"""Codes that say that no text can be embedded."""


@dataclass(frozen=True, slots=True)
class Job:
    """A text on its way: its place in the input, and what of its record goes into the answers."""

    index: int
    own: dict[str, Any]
    size: int
    """Of its input, in bytes."""
    n_chars: int


class Failed(NamedTuple):
    """A text that is not sent."""

    job: Job
    error: dict[str, str]


class Finished(NamedTuple):
    """Nothing more will be sent: how many texts there were, and the reason if not the input's end."""

    n_texts: int
    error: MyllmError | None = None


class Lost(NamedTuple):
    error: MyllmError


def embed_one(
    client: Client,
    base: dict[str, Any],
    text: str,
    *,
    preparing: Callable[[dict[str, Any]], None],
    note: Callable[[str], None],
) -> list[str]:
    """The vectors of one text's windows, in base64; blocks. Nothing else may be in flight at `client`.

    Raises what the text failed with.
    """
    vectors = []
    for line in client.stream(base | {"texts": [text]}):
        event = parse(line)
        if error := event.get("error"):
            raise from_wire(error)
        if said := event.get("note"):
            note(said)
        elif "embedding" in event:
            vectors.append(event["embedding"])
        elif event.keys() & {"loading", "pulling"}:
            preparing(event)
    return vectors


class Run:
    """Embeds texts; `record` makes bytes of a record, `write` takes them in order."""

    def __init__(
        self, client: Client, record: Callable[[dict[str, Any]], bytes], write: Callable[[bytes], None]
    ) -> None:
        self.n_texts = self.n_failed = self.n_cached = self.n_vectors = self.n_tokens = 0
        self.n_empty = self.n_bytes = 0
        self.first_error: MyllmError | None = None
        self.model: str | None = None
        self._client = client
        self._record = record
        self._write = write
        self._ready: list[bytes] = []
        self._n_ready = 0
        self._window = Window(HELD_TEXTS, HELD_BYTES)
        self._order = InOrder()
        self._news: Queue[Any] = Queue(NEWS)
        self._groups: dict[int, list[Job]] = {}
        self._sizes: dict[int, int] = {}
        self._reached: dict[int, int] = {}
        """Of each text under way, the bytes that have vectors, or never will: all of them once it is done."""
        self._pending: list[tuple[Job, str]] = []
        self._pending_bytes = 0
        self._n_groups = 0

    def run(
        self,
        base: dict[str, Any],
        source: Callable[[Callable[[], None]], Iterable[Text]],
        *,
        preparing: Callable[[dict[str, Any]], None],
        note: Callable[[str], None],
        advanced: Callable[[int, int], None] = lambda n_texts, n_bytes: None,
    ) -> None:
        """Blocks until all is written. `source` is given what to call before it waits for input;
        `advanced` is told how many texts are done, and about how many bytes of the input.

        Raises what stopped the input, after the answers to what was read; what lets none be answered.
        """
        for name, action in (("feeder", lambda: self._feed(base, source)), ("listener", self._listen)):
            threading.Thread(target=action, name=name, daemon=True).start()
        finished: Finished | None = None
        try:
            while finished is None or self.n_texts < finished.n_texts:
                match self._news.get():
                    case list(lines):
                        for event in map(parse, lines):
                            self._tell(event, preparing, note)
                            self._take(event)
                            advanced(self.n_texts, self.n_bytes)
                    case Failed(job, error):
                        self._sizes[job.index] = job.size
                        self._fail(job, error)
                        self._end(job)
                        advanced(self.n_texts, self.n_bytes)
                    case Finished() as finished:
                        pass
                    case Lost(error):
                        raise error
                if self._news.empty() or self._n_ready > AT_ONCE:
                    self._write_ready()
        finally:
            self._write_ready()
        if finished.error:
            raise finished.error

    # ── the feeder's thread ─────────────────────────────────────────────────────────────────

    def _feed(self, base: dict[str, Any], source: Callable[[Callable[[], None]], Iterable[Text]]) -> None:
        n_texts = 0
        error: MyllmError | None = None
        try:
            for text in source(lambda: self._flush(base)):
                if not self._window.has_room(text.size):
                    self._flush(base)
                self._window.acquire(text.size)
                job = Job(n_texts, text.own, text.size, len(text.text or ""))
                n_texts += 1
                if text.text is None:
                    self._news.put(Failed(job, text.error or {}))
                    continue
                self._pending.append((job, text.text))
                self._pending_bytes += text.size
                if len(self._pending) >= GROUP or self._pending_bytes >= GROUP_BYTES:
                    self._flush(base)
            self._flush(base)
        except MyllmError as failure:
            error = failure
            self._flush(base)
        except Exception as bug:  # noqa: BLE001 — the main thread would wait for ever
            error = InternalError(f"embed: {type(bug).__name__}: {bug}")
            error.__cause__ = bug
        self._news.put(Finished(n_texts, error))

    def _flush(self, base: dict[str, Any]) -> None:
        """Sends what has been gathered."""
        if not self._pending:
            return
        group, self._pending, self._pending_bytes = self._pending, [], 0
        number = self._n_groups
        self._n_groups += 1
        self._groups[number] = [job for job, _ in group]
        try:
            self._client.send(base | {"id": number, "texts": [text for _, text in group]})
        except MyllmError as error:
            if error.code != "unavailable" and self._groups.pop(number, []):
                for job, _ in group:
                    self._news.put(Failed(job, error.to_wire()))
            # else the listener sees that the connection is gone, after the answers that came before

    def _listen(self) -> None:
        """Runs on the listener's thread."""
        try:
            for lines in self._client.batches():
                self._news.put(lines)
        except MyllmError as error:
            self._news.put(Lost(error))
        except Exception as bug:  # noqa: BLE001 — the main thread would wait for ever
            self._news.put(Lost(InternalError(f"embed: {type(bug).__name__}: {bug}")))

    # ── the main thread ─────────────────────────────────────────────────────────────────────

    def _tell(
        self, event: dict[str, Any], preparing: Callable[[dict[str, Any]], None], note: Callable[[str], None]
    ) -> None:
        """What of an event is for stderr."""
        if text := event.get("note"):
            note(text)
        elif not self.n_texts and event.keys() & {"loading", "pulling"}:
            preparing(event)

    def _take(self, event: dict[str, Any]) -> None:
        number: int | None = event.pop("id", None)
        if "item" in event and number is not None:
            self._item(self._groups[number][event.pop("item")], event)
        elif event.get("done") is True:
            if number is None:  # the other side gives up on the connection as a whole
                raise from_wire(event.get("error") or {})
            self._done(self._groups.pop(number), event)

    def _item(self, job: Job, event: dict[str, Any]) -> None:
        if error := event.get("error"):
            self._fail(job, error)
            return
        self.n_vectors += 1
        self.n_tokens += event.get("tokens", 0)
        self.n_empty += event["end"] == 0
        self._reach(job, event["end"])
        self._release(job, self._record({"index": job.index, **job.own, **event}), last=False)

    def _done(self, jobs: list[Job], event: dict[str, Any]) -> None:
        if error := event.get("error"):
            if error.get("code") in NO_USE and not self.n_vectors:
                raise from_wire(error)
            for job in jobs:
                if self._reached.get(job.index) != job.size:
                    self._fail(job, error)
        self.model = event.get("model", self.model)
        self.n_cached += event.get("usage", {}).get("cached_texts", 0)
        for job in jobs:
            self._end(job)

    def _fail(self, job: Job, error: dict[str, str]) -> None:
        self.n_failed += 1
        self.first_error = self.first_error or from_wire(error)
        self._reach(job, job.n_chars)
        self._release(
            job, self._record({"index": job.index, **job.own, "done": True, "error": error}), last=False
        )

    def _end(self, job: Job) -> None:
        self.n_texts += 1
        self._sizes[job.index] = job.size
        self._reach(job, job.n_chars)
        del self._reached[job.index]
        self._release(job, b"", last=True)

    def _reach(self, job: Job, end: int) -> None:
        """A text is done up to its character `end`."""
        n_bytes = job.size if end >= job.n_chars else job.size * end // job.n_chars
        self.n_bytes += n_bytes - self._reached.get(job.index, 0)
        self._reached[job.index] = n_bytes

    def _release(self, job: Job, data: bytes, *, last: bool) -> None:
        ready, ended = self._order.add(job.index, data, last=last)
        if ready:
            self._ready.append(ready)
            self._n_ready += len(ready)
        for index in ended:
            self._window.release(self._sizes.pop(index))

    def _write_ready(self) -> None:
        ready, self._ready, self._n_ready = self._ready, [], 0
        if ready:
            self._write(b"".join(ready))
