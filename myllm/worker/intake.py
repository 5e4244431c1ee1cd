"""What a worker does with each message: load, prepare, submit, pause, cancel.

Owns the requests between their arrival and the engine, on one thread that loads, renders and
tokenises in order of arrival. Must not know sockets, nor how an engine or a template works.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from myllm import events
from myllm.engine import Engine, open_engine
from myllm.errors import BadDataError, InternalError, MyllmError, UnavailableError, UsageError
from myllm.protocol import Message, encode, tagged
from myllm.requests import Arrival, EmbedRequest, GenRequest, LoadOptions
from myllm.worker.frames import windows_of
from myllm.worker.outbox import Outbox
from myllm.worker.snapshots import where_kept
from myllm.worker.templates import ModelFile, Preparer, read_model_file

DEEP_STACK: Final = 256 * 1024 * 1024
"""llama.cpp's tokenizer recurses on long runs (its issue 27783); only what is touched takes memory."""
PROGRESS_EVERY: Final = 0.1
"""Seconds between two `loading` events: each wakes the Runtime, and a small model loads in one."""


class Expected(NamedTuple):
    """A request on its way to the engine: what it asks for, and how it came."""

    op: str
    arrival: Arrival


class Intake:
    """The messages of one connection, each answered by exactly one done event."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._engine: Engine | None = None
        self._preparer: Preparer | None = None
        self._about = ModelFile()
        self._name = "model"
        self._expected: dict[int, Expected] = {}
        """Requests not yet with the engine; a cancelled one is missing."""
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[tuple[Callable[[Message], None], Message]] = SimpleQueue()
        before = threading.stack_size(DEEP_STACK)
        threading.Thread(target=self._work, name="prepare", daemon=True).start()
        threading.stack_size(before)

    def take(self, message: Message) -> None:
        """One message, in order of arrival; returns at once. Raises BadDataError for a senseless one."""
        match message.get("op"):
            case "load":
                self._jobs.put((self._load, message))
            case "gen" | "count" | "embed" as op:
                arrival = Arrival(_id(message), time.monotonic(), message.pop("client", 0))
                with self._lock:
                    self._expected[arrival.id] = Expected(op, arrival)
                jobs = {"gen": self._generate, "count": self._count, "embed": self._embed}
                self._jobs.put((jobs[op], message))
            case "cancel":
                self._cancel(_id(message))
            case "pause" | "resume" as op:
                self._pause(_id(message), op == "pause")
            case "status":
                status = self._engine.status() if self._engine else {}
                self._send([tagged(events.done(status=status), message.get("id"))])
            case None if "hello" in message:
                pass
            case op:
                raise BadDataError(f"worker: no operation {op!r:.80}")

    def settle(self, seconds: float) -> None:
        """Waits until what was computed is on disk, at most so long."""
        if self._engine:
            self._engine.settle(seconds)

    def _work(self) -> None:
        while True:
            job, message = self._jobs.get()
            try:
                job(message)
            except MyllmError as error:
                self._fail(message, error)
            except Exception as error:  # noqa: BLE001 — one bad request fails alone, and says where in stderr
                traceback.print_exc()
                self._fail(message, InternalError(f"worker: {type(error).__name__}: {error}"))

    def _fail(self, message: Message, error: MyllmError) -> None:
        request_id = message.get("id")
        if request_id is not None:
            with self._lock:
                if self._expected.pop(request_id, None) is None:  # cancelled, and said so
                    return
        self._send([tagged(events.failed(error), request_id)])

    # ── jobs ────────────────────────────────────────────────────────────────────────────────

    def _load(self, message: Message) -> None:
        options = LoadOptions.parse(message.get("options") or {})
        path = Path(message["path"])
        about = self._about = read_model_file(path)
        self._name = message["name"]
        # First, so that the template's renderer starts beside the loading.
        self._preparer = Preparer(about, self._name, options.template, start=about.writes)
        self._engine = open_engine(
            path, options, self._send, self._progress(), about.sampling, where_kept(path)
        )
        self._send([events.done(window=self._engine.window)])

    def _progress(self) -> Callable[[float], None]:
        due: float | None = None

        def progress(part: float) -> None:
            nonlocal due
            now = time.monotonic()
            if due is not None and now >= due:
                self._send([events.loading(part)])
            if due is None or now >= due:  # counted from the first, as what comes before is imports
                due = now + PROGRESS_EVERY

        return progress

    def _generate(self, message: Message) -> None:
        engine, preparer = self._loaded()
        request_id = message["id"]
        if request_id not in self._expected:  # cancelled while it waited
            return
        request = GenRequest.parse(_asked(message))
        prepared = preparer.prepare(request, engine.tokenizer, engine.window)
        with self._lock:
            if (expected := self._expected.pop(request_id, None)) is None:  # cancelled while it was prepared
                return
            if prepared.joined_messages:
                self._send([tagged(_joined(prepared.joined_messages), request_id)])
            engine.submit(
                request,
                prepared.tokens,
                expected.arrival,
                dropped_tokens=prepared.dropped_tokens,
                dropped_messages=prepared.dropped_messages,
                in_reasoning=prepared.in_reasoning,
            )

    def _embed(self, message: Message) -> None:
        engine, _ = self._loaded()
        request_id = message["id"]
        if request_id not in self._expected:  # cancelled while it waited
            return
        request = EmbedRequest.parse(_asked(message))
        texts, failures = windows_of(request, engine, self._about)
        if self._about.is_made_for_text:
            note = f"{self._name} is made for text; its vectors are the mean of its last layer"
            failures.insert(0, events.note(note))
        with self._lock:
            if (expected := self._expected.pop(request_id, None)) is None:  # cancelled while it was cut
                return
            self._send([tagged(event, request_id) for event in failures])
            engine.embed(request, texts, expected.arrival)

    def _count(self, message: Message) -> None:
        engine, preparer = self._loaded()
        request = GenRequest.parse(_asked(message))
        n_prompt = preparer.count(request, engine.tokenizer)
        with self._lock:
            wanted = self._expected.pop(message["id"], None) is not None
        if wanted:
            self._send([tagged(events.counted(n_prompt, engine.window), message["id"])])

    def _cancel(self, request_id: int) -> None:
        with self._lock:
            waiting = self._expected.pop(request_id, None)
        if waiting:
            self._send([tagged(events.ended_early(waiting.op, "cancelled"), request_id)])
        elif self._engine:
            self._engine.cancel(request_id)

    def _pause(self, request_id: int, paused: bool) -> None:
        with self._lock:
            if expected := self._expected.get(request_id):
                arrival = expected.arrival._replace(paused=paused)
                self._expected[request_id] = expected._replace(arrival=arrival)
        if not expected and self._engine:
            self._engine.pause(request_id, paused)

    def _loaded(self) -> tuple[Engine, Preparer]:
        if self._engine is None or self._preparer is None:
            raise UnavailableError("worker: no model is loaded")
        return self._engine, self._preparer

    def _send(self, messages: list[Message]) -> None:
        self._outbox.send(b"".join(map(encode, messages)))


def _joined(n: int) -> Message:
    """What is said where the chat template wants roles in turn."""
    return events.note(f"prompt: {n:,} of the messages joined to the one before", detail=True)


def _asked(message: Message) -> Message:
    """The part of a message that is asked of the model."""
    return {key: value for key, value in message.items() if key not in ("op", "id")}


def _id(message: Message) -> int:
    request_id: Any = message.get("id")
    if not isinstance(request_id, int):
        raise UsageError("worker: a request needs an id")
    return request_id
