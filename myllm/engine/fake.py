"""A scripted engine with the interface of the real one: exact answers at a set pace, faults on order.

What it says is in a file, see fake_script.py. Daemon, HTTP and CLI tests run on it in milliseconds.
Must not know sockets, templates or llama.cpp.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm.engine import Emit, Progress
from myllm.engine.counters import Counters
from myllm.engine.embed_queue import EmbedQueue
from myllm.engine.embedding import TextWindow
from myllm.engine.fake_embedder import FakeEmbedder
from myllm.engine.fake_script import Script
from myllm.engine.generation import Generation, Times
from myllm.engine.sequence import Sequence as SequenceOfTokens
from myllm.engine.sequence import in_turn
from myllm.engine.text import ReasoningSplitter, TextStream
from myllm.errors import BadDataError, InternalError
from myllm.events import failed
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest, GenRequest, LoadOptions

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Control tokens; a token's id is its place here."""
PIECE = re.compile(r"\s?[^\s<]{1,16}|\s?<|\s")
"""A word with the space before it is one token; long ones break up, and `<` stands alone."""
EMBED_BESIDE = 16
"""Tokens embedded between two steps of running requests."""


class WordTokenizer:
    """Words as tokens; ids are given out as words are met. Implements Tokenizer."""

    special_tokens: Sequence[str] = SPECIAL
    bos, eos = 1, 2
    bos_text, eos_text = SPECIAL[bos], SPECIAL[eos]
    max_piece_bytes = 4 * 17
    closing: int | None = None

    def __init__(self, *, add_bos: bool = False) -> None:
        self.add_bos = add_bos
        self._pieces: list[str] = list(SPECIAL)
        self._ids: dict[str, int] = {}
        self._lock = threading.Lock()
        self._specials = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")

    def encode(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            if not special:
                return self._words(text)
            tokens: list[int] = []
            for index, part in enumerate(self._specials.split(text)):
                tokens += [SPECIAL.index(part)] if index % 2 else self._words(part)
            return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._pieces[token] for token in tokens)

    def _words(self, text: str) -> list[int]:
        return [self._id(piece) for piece in PIECE.findall(text)]

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


@dataclass(slots=True, eq=False)
class Answer:
    """One request on its way: the pieces it will say, and the generation that turns them into events."""

    number: int
    pieces: list[str]
    generation: Generation

    @property
    def said(self) -> int:
        return self.generation.n_generated


class FakeEngine:
    """Runs a Script. Implements Engine; one thread, no compute."""

    def __init__(self, script: Script, options: LoadOptions, emit: Emit) -> None:
        self.tokenizer = WordTokenizer(add_bos=script.add_bos)
        self.window = min(options.context or script.window, script.window)
        self._script = script
        self._ballast = b"\1" * script.memory_bytes
        self._parallel = options.parallel or script.parallel
        self._threads = options.threads or 1
        self._counters = Counters()
        self._emit = emit
        self._waiting: list[Answer] = []
        self._running: list[Answer] = []
        self._paused: list[Answer] = []
        self._cancelled: set[int | None] = set()
        self._embeddings = EmbedQueue(self._open_embedder, self.window, time.monotonic)
        self._actions: list[Callable[[], list[Message]]] = []
        """What is asked besides new requests, in order of arrival; done by the thread."""
        self._count = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: GenRequest,
        prompt: list[int],
        arrival: Arrival,
        *,
        dropped_tokens: int = 0,
        dropped_messages: int = 0,
        in_reasoning: bool = False,
    ) -> None:
        limit = self.window if request.max_tokens is None else len(prompt) + request.max_tokens
        sequence = SequenceOfTokens(arrival.id, list(prompt), min(limit, self.window), request.priority)
        sequence.client = arrival.client
        generation = Generation(
            request,
            sequence,
            Times(arrival.at),
            n_prompt=len(prompt),
            seed=request.seed or 0,
            dropped_tokens=dropped_tokens,
            dropped_messages=dropped_messages,
            text=TextStream(request.stop),
            reasoning=ReasoningSplitter(inside=in_reasoning),
        )
        with self._changed:
            self._count += 1
            sequence.order = self._count
            answer = Answer(self._count, self._pieces(request, prompt), generation)
            (self._paused if arrival.paused else self._waiting).append(answer)
            self._changed.notify()

    @property
    def embed_window(self) -> int:
        return self.window

    def embed(
        self,
        request: EmbedRequest,
        texts: list[list[TextWindow]],
        arrival: Arrival,
    ) -> None:
        self._ask(lambda: self._embeddings.start(request, texts, arrival))

    def pause(self, request_id: int, paused: bool) -> None:
        self._ask(lambda: self._set_paused(request_id, paused))

    def cancel(self, request_id: int) -> None:
        with self._changed:
            if any(answer.generation.id == request_id for answer in self._answers):
                self._cancelled.add(request_id)
        self._ask(lambda: self._embeddings.end(request_id, "cancelled"))

    def status(self) -> dict[str, Any]:
        embedded, queued, held = self._embeddings.counts()
        with self._changed:
            busy, waiting, paused = map(len, (self._running, self._waiting, self._paused))
        return {
            "busy": busy + embedded,
            "waiting": waiting + queued,
            "paused": paused + held,
            "cached": 0,
            "context": self.window,
            "cells_free": self.window,
            "window": self.window,
            "row_limit": self._parallel,
            "layout": "Fake",
            "threads": self._threads,
            "device": "cpu",
            "gpu_layers": 0,
            **self._counters.as_message(time.monotonic()),
        }

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _pieces(self, request: GenRequest, prompt: Sequence[int]) -> list[str]:
        pieces = self._script.tokens
        if pieces is None:
            pieces = [self.tokenizer.decode([token]) for token in prompt if token >= len(SPECIAL)]
        return pieces * (self.window // len(pieces) + 1) if request.ignore_eos and pieces else pieces

    def _ask(self, action: Callable[[], list[Message]]) -> None:
        with self._changed:
            self._actions.append(action)
            self._changed.notify()

    @property
    def _answers(self) -> list[Answer]:
        return [*self._running, *self._waiting, *self._paused]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, self._until_deadline())
                if self._closing:
                    return
                admitted = self._admit()
                actions, self._actions = self._actions, []
            started = time.monotonic()
            n_prompt = self._take_time(admitted)
            events = [event for action in actions for event in action()] + self._step()
            self._counters.stepped(started, time.monotonic(), n_prompt)
            if events := events + self._embed():
                self._emit(events)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running or self._actions or self._embeddings or self._closing)

    def _until_deadline(self) -> float | None:
        """Seconds to the first deadline; None where there is none."""
        due = min([self._embeddings.due, *(answer.generation.due for answer in self._answers)])
        return None if math.isinf(due) else max(due - time.monotonic(), 0)

    def _set_paused(self, request_id: int, paused: bool) -> list[Message]:
        self._embeddings.pause(request_id, paused)
        with self._changed:
            answer = next((a for a in self._answers if a.generation.id == request_id), None)
            if answer and paused != (answer in self._paused):
                self._keep(lambda other: other is not answer)
                (self._paused if paused else self._waiting).append(answer)
        return []

    def _admit(self) -> list[Answer]:
        """Moves answers to the running ones; returns those that were not among them before."""
        room = self._parallel - len(self._running)
        waiting = {answer.generation.sequence: answer for answer in self._waiting}
        queue = sorted(waiting, key=lambda sequence: sequence.urgency)
        turns = in_turn(queue, [answer.generation.sequence for answer in self._running])
        admitted = [waiting[sequence] for sequence in turns[:room]]
        self._waiting = [answer for answer in self._waiting if answer not in admitted]
        self._running += admitted
        new = [answer for answer in admitted if answer.generation.times.admitted is None]
        now = time.monotonic()
        for answer in new:
            answer.generation.times.admitted = now
            self._counters.admitted(answer.generation.n_prompt, 0)
        return new

    def _take_time(self, admitted: list[Answer]) -> int:
        """Takes the time of a step; returns the prompt tokens that it took in."""
        n_prompt = sum(answer.generation.n_prompt for answer in admitted)
        pause_ms = self._script.ms_per_token + n_prompt * self._script.prompt_ms_per_token
        if pause_ms:
            time.sleep(pause_ms / 1000)
        return n_prompt

    def _step(self) -> list[Message]:
        """One token of every running request, or its end; and the end of others that must."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            answers = self._answers
        events: list[Message] = []
        ended: set[int] = set()
        now = time.monotonic()
        for answer in answers:
            reason = "cancelled" if answer.generation.id in cancelled else None
            news = self._advance(answer, now, reason)
            events += news
            if news and news[-1]["done"]:
                ended.add(answer.number)
        with self._changed:
            self._keep(lambda answer: answer.number not in ended)
        return events

    def _keep(self, wanted: Callable[[Answer], bool]) -> None:
        self._running = list(filter(wanted, self._running))
        self._waiting = list(filter(wanted, self._waiting))
        self._paused = list(filter(wanted, self._paused))

    def _advance(self, answer: Answer, now: float, reason: str | None) -> list[Message]:
        generation = answer.generation
        if reason is None and generation.due <= now:
            reason = "deadline"
        if reason is None and answer not in self._running:
            return []
        try:
            self._strike(answer)
        except RuntimeError as error:
            return [tagged(failed(InternalError(f"fake engine: {error}")), generation.id)]
        if reason is None and len(generation.sequence.tokens) >= generation.sequence.limit:
            reason = "length"
        if reason is None and answer.said >= len(answer.pieces):
            reason = "stop"
        if reason is not None:
            return generation.closing_events(reason, now)
        return self._speak(answer, now)

    def _speak(self, answer: Answer, now: float) -> list[Message]:
        generation = answer.generation
        piece = answer.pieces[answer.said]
        generation.sequence.tokens.append(0)
        self._counters.generated()
        generation.times.first_token = generation.times.first_token or now
        generation.times.last_token = now
        extra: Message = {}
        if (count := generation.request.logprobs) is not None:
            extra = {"logprob": 0.0, "top_logprobs": [{"token": piece, "logprob": 0.0}][:count]}
        events = generation.token_events(piece.encode(), extra)
        return events + generation.closing_events("stop", now) if generation.text.stopped else events

    def _embed(self) -> list[Message]:
        return self._embeddings.expire() + self._embeddings.step(EMBED_BESIDE if self._running else None)

    def _open_embedder(self, window: int) -> FakeEmbedder:
        script = self._script
        return FakeEmbedder(
            self.window,
            script.dimensions,
            script.prompt_ms_per_token,
            self.tokenizer.decode,
            self._strike_vector,
        )

    def _strike_vector(self, n_vectors: int) -> None:
        fault = self._script.fault
        if fault and fault.at == "vector" and n_vectors == fault.after_tokens:
            fault.strike()

    def _strike(self, answer: Answer) -> None:
        fault = self._script.fault
        if fault is None or fault.at != "token" or fault.request not in (None, answer.number):
            return
        if answer.said == fault.after_tokens:
            fault.strike()


def open_fake(path: Path, options: LoadOptions, emit: Emit, progress: Progress) -> FakeEngine:
    """Reads the script and takes `load_ms` over it. Raises BadDataError, NotFoundError."""
    script = Script.read(path)
    for tenth in range(10):
        progress(tenth / 10)
        if script.load_ms:
            time.sleep(script.load_ms / 10_000)
    if script.fault and script.fault.at == "load":
        if script.fault.kind == "error":
            raise BadDataError(f"{path}: the script says that it cannot be loaded")
        script.fault.strike()
    progress(1.0)
    return FakeEngine(script, options, emit)
