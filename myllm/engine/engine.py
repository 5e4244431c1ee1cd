"""The engine: one thread that owns a context and loops: take in, plan, decode, sample, emit.

Knows requests, tokens and vectors, not models' names, templates, sessions, sockets or processes. What a step
does is decided in scheduler.py; how llama.cpp is told, in llama.py and context.py.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from myllm.engine import llama
from myllm.engine.context import Batch, Context
from myllm.engine.counters import Counters
from myllm.engine.embed_queue import EmbedQueue
from myllm.engine.embedder import LONGEST_WINDOW, Embedder
from myllm.engine.embedding import TextWindow
from myllm.engine.generation import Generation
from myllm.engine.layout import choose_layout
from myllm.engine.llama import Model
from myllm.engine.logprobs import log_probabilities
from myllm.engine.new_generation import Capabilities, new_generation
from myllm.engine.scheduler import Chunk, Plan, Scheduler
from myllm.engine.sequence import Sequence
from myllm.engine.space import round_up
from myllm.engine.text import ReasoningSplitter
from myllm.errors import BadDataError, InternalError, MyllmError
from myllm.events import failed
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest, GenRequest, LoadOptions

Emit = Callable[[list[Message]], None]

BATCH = 512
"""Tokens in a step at most; more does not prefill faster on a CPU and delays cancellations."""
EMBED_BESIDE = 128
"""Tokens embedded between two steps of running sequences, so that these keep about their pace."""
MAX_FAILURES = 2
"""Steps that may fail under a request before it is given up instead of started again."""


class LlamaEngine:
    """Runs requests on one model with continuous batching; see `myllm.engine.Engine` for the interface."""

    def __init__(
        self,
        model: Model,
        options: LoadOptions,
        emit: Emit,
        *,
        recommended: Mapping[str, float] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the thread on a loaded model, which is the engine's own from now on.

        `recommended` are the sampling parameters that the model's file asks for. Raises BadDataError
        for a model that translates (T5).
        """
        if model.has_encoder or not model.has_decoder:
            raise BadDataError("model: it has an encoder apart, which is not supported; use another model")
        self._model, self._options, self._emit, self._clock = model, options, emit, clock
        self._layout = choose_layout(options, model)
        self.tokenizer = model.tokenizer
        self.window = self._layout.window
        self._capabilities = Capabilities(model, self.window, recommended)
        self._batch = Batch(BATCH)
        self._context: Context | None = None
        self._scheduler = Scheduler(self._layout.space, BATCH)
        self._generations: dict[int, Generation] = {}
        self.embed_window = min(model.n_ctx_train, LONGEST_WINDOW)
        self._embeddings = EmbedQueue(
            self._open_embedder, self.embed_window, clock, normalizes=model.normalizes
        )
        self._arrivals = 0
        self._device = "gpu" if llama.lib.llama_supports_gpu_offload() else "cpu"
        asked = -1 if options.gpu_layers is None else options.gpu_layers
        self._gpu_layers = asked if self._device == "gpu" else 0
        self._counters = Counters()
        self._inbox: queue.SimpleQueue[Callable[[], list[Message]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ── called from other threads ───────────────────────────────────────────────────────────

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
        """Queues a request. Returns at once."""

        def start() -> list[Message]:
            events = self._start(request, prompt, arrival, dropped_tokens, dropped_messages, in_reasoning)
            self._pause(arrival.id, arrival.paused)
            return events

        self._inbox.put(start)

    def embed(
        self,
        request: EmbedRequest,
        texts: list[list[TextWindow]],
        arrival: Arrival,
    ) -> None:
        """Queues texts. Returns at once."""
        self._inbox.put(lambda: self._embeddings.start(request, texts, arrival))

    def pause(self, request_id: int, paused: bool) -> None:
        """Keeps a request from the next step on out of all, or lets it go on; an unknown id is no error."""
        self._inbox.put(lambda: self._pause(request_id, paused))

    def cancel(self, request_id: int) -> None:
        """Ends a request at the next step with finish_reason `cancelled`; an unknown id is no error."""
        self._inbox.put(
            lambda: (
                self._finish_by_id(request_id, "cancelled") + self._embeddings.end(request_id, "cancelled")
            )
        )

    def status(self) -> Message:
        """For people and benchmarks; `context` and `cells_free` are cells, times are seconds."""
        scheduler = self._scheduler
        embedded, queued, paused = self._embeddings.counts()
        return {
            "busy": len(scheduler.active) + embedded,
            "waiting": len(scheduler.waiting) + queued,
            "paused": len(scheduler.paused) + paused,
            "cached": scheduler.cache.n_reusable,
            "context": scheduler.cache.n_cells,
            "cells_free": scheduler.cache.n_free,
            "window": self.window,
            "row_limit": scheduler.row_limit.limit,
            "layout": type(scheduler.space).__name__,
            "threads": self._layout.n_threads,
            "device": self._device,
            "gpu_layers": self._gpu_layers,
            **self._counters.as_message(self._clock()),
        }

    def close(self) -> None:
        """Ends the thread after its step and frees the model; requests in flight get no more events."""
        self._inbox.put(None)
        self._thread.join()
        self._close_context()
        self._embeddings.close()
        self._model.close()

    # ── the engine's thread ─────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        self._prepare()
        while True:
            try:
                if not self._take_in():
                    return
                self._emit_all(self._expire() + self._embeddings.expire())
                plan = self._scheduler.plan()
                if plan.operations or plan.chunks or plan.grow_to:
                    self._emit_all(self._step(plan))
                if self._embeddings:
                    self._emit_all(self._embeddings.step(EMBED_BESIDE if plan.chunks else None))
            except MyllmError as error:
                self._fail_all(error)
            except Exception as error:  # noqa: BLE001 - a bug costs the requests in flight, not the worker
                traceback.print_exc(file=sys.stderr)
                self._fail_all(InternalError(f"engine: {type(error).__name__}: {error}; please report it"))

    def _prepare(self) -> None:
        if self._model.is_encoder:
            return
        with suppress(MyllmError):  # for a first prompt of usual length, made while that is still rendered
            self._grow(self._scheduler.space.target([BATCH]))

    def _take_in(self) -> bool:
        """Handles what came in; waits only while there is nothing to do. False ends the thread."""
        events: list[Message] = []
        patience = self._patience()
        while True:
            try:
                action = self._inbox.get(timeout=patience)
            except queue.Empty:
                break
            if action is None:
                return False
            events += action()
            patience = 0
        self._emit_all(events)
        return True

    def _patience(self) -> float | None:
        """Seconds until there is something to do unasked: none with work at hand, else to the first
        deadline of a paused request."""
        if self._scheduler.active or self._scheduler.waiting or self._embeddings:
            return 0
        due = min([self._embeddings.due, *(g.due for g in self._generations.values())])
        return None if math.isinf(due) else max(due - self._clock(), 0)

    def _step(self, plan: Plan) -> list[Message]:
        """Does what the plan says: 1. admit, 2. memory, 3. decode and sample, 4. report how long it took."""
        started = self._clock()
        for sequence, n_cached in plan.admitted:
            self._admitted(self._generation(sequence), n_cached, started)
        if plan.space:
            self._close_context()
        if self._context:
            for operation in plan.operations:
                self._context.apply(operation)
        if plan.grow_to:
            self._grow(plan.grow_to)
            return []
        events: list[Message] = []
        for chunks in self._batches(plan):
            code, produced = self._decode(chunks)
            if code:
                return events + self._recover(plan, code)
            events += produced
        ended = self._clock()
        self._counters.stepped(started, ended, plan.prompt_tokens)
        self._scheduler.observe(plan, ended - started)
        return events

    def _batches(self, plan: Plan) -> list[list[Chunk]]:
        """All chunks in one batch; where sequences are isolated, each prompt chunk in a batch of its own."""
        if not plan.chunks:
            return []
        if not self._scheduler.space.isolates:
            return [plan.chunks]
        rows = [chunk for chunk in plan.chunks if chunk.end - chunk.start == 1]
        return ([rows] if rows else []) + [[c] for c in plan.chunks if c.end - c.start > 1]

    def _decode(self, chunks: list[Chunk]) -> tuple[int, list[Message]]:
        """One batch through llama.cpp: its return code and, where that is 0, what was sampled."""
        if self._context is None:
            raise ValueError("a batch needs a context")
        self._batch.clear()
        due = [(chunk, index) for chunk, index in self._fill(chunks) if chunk.sample]
        started = self._clock()
        code = self._context.decode(self._batch)
        decoded = self._clock()
        self._counters.decoded(decoded - started)
        return code, [] if code else self._sample(self._context, due, decoded)

    def _fill(self, chunks: list[Chunk]) -> Iterator[tuple[Chunk, int]]:
        """Adds the chunks to the batch; yields each with the index of its last token."""
        for chunk in chunks:
            sequence, start, end, sample = chunk
            if sequence.slot is None:
                raise ValueError("a planned sequence has a slot")
            tokens = sequence.tokens[start:end]
            yield chunk, self._batch.add(tokens, start, sequence.slot.id, output=sample)

    def _sample(self, context: Context, due: list[tuple[Chunk, int]], now: float) -> list[Message]:
        """Samples the next token of every sequence that is due, and says what came of it."""
        if not due:
            return []
        events: list[Message] = []
        for (chunk, index), logits in zip(due, context.logits(len(due)), strict=True):
            generation = self._generation(chunk.sequence)
            token = generation.sampler.sample(context, index, logits)
            events += self._take_token(generation, token, logits, now)
        return events

    def _take_token(
        self, generation: Generation, token: int, logits: NDArray[np.float32], now: float
    ) -> list[Message]:
        """Appends a sampled token and makes its events, the done event too where it was the last."""
        if self.tokenizer.is_end(token):
            return self._finish(generation, "stop")
        times, sequence = generation.times, generation.sequence
        times.first_token = now if times.first_token is None else times.first_token
        times.last_token = now
        sequence.tokens.append(token)
        self._counters.generated()
        extra = self._logprobs(logits, token, generation.request.logprobs)
        events = generation.token_events(self.tokenizer.piece(token), extra)
        if generation.text.stopped:
            return events + self._finish(generation, "stop")
        if len(sequence.tokens) >= sequence.limit:
            return events + self._finish(generation, "length")
        return events

    def _logprobs(self, logits: NDArray[np.float32], token: int, top: int | None) -> Message:
        if top is None:
            return {}
        logprob, ranked = log_probabilities(logits, token, top)
        named = [{"token": self.tokenizer.decode([t]), "logprob": round(value, 6)} for t, value in ranked]
        return {"logprob": round(logprob, 6), "top_logprobs": named}

    # ── a request's life ────────────────────────────────────────────────────────────────────

    def _start(
        self,
        request: GenRequest,
        prompt: list[int],
        arrival: Arrival,
        dropped_tokens: int,
        dropped_messages: int,
        in_reasoning: bool,
    ) -> list[Message]:
        if arrival.id in self._generations:
            raise ValueError("the worker gives every request an id of its own")
        try:
            self._arrivals += 1
            generation = new_generation(request, prompt, arrival, self._capabilities, self._arrivals)
        except MyllmError as error:
            return [tagged(failed(error), arrival.id)]
        except Exception as error:  # noqa: BLE001 - not in flight yet, so nobody else would tell its client
            traceback.print_exc(file=sys.stderr)
            bug = InternalError(f"engine: {type(error).__name__}: {error}; please report it")
            return [tagged(failed(bug), arrival.id)]
        generation.dropped_tokens = dropped_tokens
        generation.dropped_messages = dropped_messages
        generation.reasoning = ReasoningSplitter(inside=in_reasoning)
        self._generations[arrival.id] = generation
        if request.max_tokens == 0:
            return self._finish(generation, "length")
        self._scheduler.submit(generation.sequence)
        return []

    def _admitted(self, generation: Generation, n_cached: int, now: float) -> None:
        if generation.times.admitted is None:  # else it was preempted, and comes back
            generation.times.admitted = now
            generation.n_cached = n_cached
            self._counters.admitted(generation.n_prompt, n_cached)

    def _pause(self, request_id: int, paused: bool) -> list[Message]:
        if generation := self._generations.get(request_id):
            change = self._scheduler.pause if paused else self._scheduler.resume
            change(generation.sequence)
        self._embeddings.pause(request_id, paused)
        return []

    def _finish_by_id(self, request_id: int, finish_reason: str) -> list[Message]:
        generation = self._generations.get(request_id)
        return self._finish(generation, finish_reason) if generation else []

    def _finish(self, generation: Generation, finish_reason: str) -> list[Message]:
        self._forget(generation)
        return generation.closing_events(finish_reason, self._clock())

    def _fail(self, generation: Generation, error: MyllmError) -> Message:
        self._forget(generation)
        return tagged(failed(error), generation.id)

    def _forget(self, generation: Generation) -> None:
        self._scheduler.remove(generation.sequence)
        del self._generations[generation.sequence.id]
        if generation.sampler:
            generation.sampler.close()

    def _expire(self) -> list[Message]:
        """Ends the requests whose deadline has passed, running or queued."""
        now = self._clock()
        late = [generation for generation in self._generations.values() if now >= generation.due]
        return [event for generation in late for event in self._finish(generation, "deadline")]

    def _recover(self, plan: Plan, code: int) -> list[Message]:
        """After a failed decode nothing of the step can be trusted: its sequences start again, once."""
        llama.explain()
        sys.stderr.write(f"llama_decode: {code} with {plan.rows} rows, {plan.prompt_tokens} prompt tokens\n")
        events = []
        # Who finished in an earlier batch of the same step is none of them any more.
        for generation in [g for c in plan.chunks if (g := self._generations.get(c.sequence.id))]:
            generation.failures += 1
            self._scheduler.restart(generation.sequence)
            if generation.failures >= MAX_FAILURES:
                events.append(self._fail(generation, InternalError(f"llama.cpp: decode failed with {code}")))
        return events

    def _fail_all(self, error: MyllmError) -> None:
        """Everything in flight fails and the engine starts from an empty cache."""
        failed = [self._fail(generation, error) for generation in list(self._generations.values())]
        self._emit_all(failed + self._embeddings.fail_all(error))
        self._close_context()
        self._scheduler = Scheduler(self._layout.space, BATCH)

    def _open_embedder(self, window: int) -> Embedder:
        return Embedder(self._model, window, self._layout.n_threads)

    def _close_context(self) -> None:
        if self._context:
            self._context.close()
            self._context = None

    # ── parts ───────────────────────────────────────────────────────────────────────────────

    def _grow(self, n_cells: int) -> None:
        """A context of `n_cells` in place of the present one; running sequences move, idle ones go."""
        n_cells = round_up(max(n_cells, BATCH))
        moving: list[tuple[Sequence, NDArray[np.uint8]]] = []
        if self._context:
            for sequence in self._scheduler.active:
                if sequence.slot and sequence.n_cached:
                    moving.append((sequence, self._context.read_state(sequence.slot.id)))
        self._close_context()
        self._context = Context(
            self._model,
            n_ctx=n_cells,
            n_seq_max=self._scheduler.space.n_slots,
            n_batch=BATCH,
            unified=not self._scheduler.space.isolates,
            n_threads=self._layout.n_threads,
            kv_type=self._options.kv_type or "f16",
            flash_attn=self._options.flash_attn != "off",
        )
        self._scheduler.grown(n_cells)
        for sequence, state in moving:
            if sequence.slot and not self._context.write_state(sequence.slot.id, state):
                self._scheduler.restart(sequence)

    def _generation(self, sequence: Sequence) -> Generation:
        return self._generations[sequence.id]

    def _emit_all(self, events: list[Message]) -> None:
        if events:
            self._emit(events)
