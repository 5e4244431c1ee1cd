"""The engine's loop: one thread that takes requests in, plans steps, has them run, and emits what came of it.

Owns the queue and the lives of requests: admission, pause, deadline, failure, end. What a step does is
decided in scheduler.py; how a model is run, in a `Runner`. Must not know llama.cpp, templates, sockets or
processes. (numpy comes with the embeddings: vectors are added and scaled here.)
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

from myllm.engine import Emit, TextWindow
from myllm.engine.counters import Counters
from myllm.engine.embeds_in_flight import EmbedsInFlight
from myllm.engine.generation import Generation
from myllm.engine.kv_cache import Slot
from myllm.engine.kv_layout import round_up
from myllm.engine.runner import Runner, Sampled, Vocabulary
from myllm.engine.scheduler import Plan, Scheduler
from myllm.engine.sequence import Chunk, Sequence
from myllm.engine.snapshot import NOT_FOUND, Archive, Found
from myllm.engine.text import ReasoningSplitter
from myllm.errors import InternalError, MyllmError
from myllm.events import failed
from myllm.protocol import Message, tagged
from myllm.requests import Arrival, EmbedRequest, GenRequest

MAX_FAILURES: Final = 2
"""Steps that may fail under a request before it is given up instead of started again."""


class BatchingEngine:
    """Runs requests on one runner with continuous batching; see `myllm.engine.Engine` for the interface."""

    def __init__(
        self,
        runner: Runner,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        archive: Archive | None = None,
    ) -> None:
        """Starts the thread; the runner and the archive are the engine's own from now on."""
        self._runner, self._emit, self._clock, self._archive = runner, emit, clock, archive
        self._scheduler = Scheduler(runner.layout, runner.device)
        self._generations: dict[int, Generation] = {}
        self._embeds = EmbedsInFlight(runner, clock)
        self._arrivals = 0
        self._ended: list[tuple[Slot, list[int], Found]] = []
        """Slots of requests that are over, with their tokens, and what of these was on disk before."""
        self._counters = Counters()
        self._inbox: queue.SimpleQueue[Callable[[], list[Message]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Vocabulary:
        return self._runner.tokenizer

    @property
    def window(self) -> int:
        return self._runner.window

    @property
    def embed_window(self) -> int:
        return self._runner.embed_window

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
        """Queues a request; its arrival is a time of the engine's clock. Returns at once."""
        stored = self._archive.find(prompt) if self._archive else NOT_FOUND
        dropped = dropped_tokens, dropped_messages
        self._inbox.put(lambda: self._start(request, prompt, arrival, dropped, in_reasoning, stored))

    def embed(self, request: EmbedRequest, texts: list[list[TextWindow]], arrival: Arrival) -> None:
        """Queues texts in windows. Returns at once."""
        self._inbox.put(lambda: self._embeds.start(request, texts, arrival))

    def pause(self, request_id: int, paused: bool) -> None:
        """Keeps a request from the next step on out of all, or lets it go on; an unknown id is no error."""
        self._inbox.put(lambda: self._pause(request_id, paused))

    def cancel(self, request_id: int) -> None:
        """Ends a request at the next step with finish_reason `cancelled`; an unknown id is no error."""
        self._inbox.put(
            lambda: self._finish_by_id(request_id, "cancelled") + self._embeds.end(request_id, "cancelled")
        )

    def status(self) -> Message:
        """For people and benchmarks; `context` and `cells_free` are cells, times are seconds."""
        scheduler = self._scheduler
        embedded, queued, paused = self._embeds.counts()
        return {
            "busy": len(scheduler.active) + embedded,
            "waiting": len(scheduler.waiting) + queued,
            "paused": len(scheduler.paused) + paused,
            "cached": scheduler.cache.n_reusable,
            "context": scheduler.cache.n_cells,
            "cells_free": scheduler.cache.n_free,
            "window": self.window,
            "row_limit": scheduler.row_limit.limit,
            "layout": type(scheduler.layout).__name__,
            **self._runner.facts(),
            **self._counters.as_message(self._clock()),
        }

    def settle(self, seconds: float) -> None:
        """Waits until what has ended is on disk, unless something still runs; at most about so long."""
        if self._archive is None or self._generations:
            return
        read = threading.Event()

        def tell() -> list[Message]:
            read.set()
            return []

        self._inbox.put(tell)
        if read.wait(seconds):
            self._archive.wait(seconds)

    def close(self) -> None:
        """Ends the thread after its step and frees the model; requests in flight get no more events."""
        self._inbox.put(None)
        self._thread.join()
        self._embeds.close()
        self._runner.close()
        if self._archive:
            self._archive.close()

    # ── the engine's thread ─────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        self._prepare()
        while True:
            try:
                self._keep_ended()
                if not self._take_in():
                    return
                self._emit_all(self._expire() + self._embeds.expire())
                plan = self._scheduler.plan()
                if plan.operations or plan.chunks or plan.grow_to or plan.restored:
                    self._emit_all(self._step(plan))
                if self._embeds:
                    most = self._runner.device.embed_tokens if plan.chunks else None
                    self._emit_all(self._embeds.step(most))
            except MyllmError as error:
                self._fail_all(error)
            except Exception as error:  # noqa: BLE001 - a bug costs the requests in flight, not the worker
                traceback.print_exc(file=sys.stderr)
                self._fail_all(InternalError(f"engine: {type(error).__name__}: {error}; please report it"))

    def _prepare(self) -> None:
        """A cache for a first prompt of usual length, made while that is still rendered."""
        if self._runner.writes:
            try:
                self._grow(self._scheduler.layout.target([self._runner.device.step_tokens]))
            except MyllmError:  # the first request asks for it again, and is told
                self._start_empty()

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
        if self._scheduler.active or self._scheduler.waiting or self._embeds:
            return 0
        due = min([self._embeds.due, *(g.due for g in self._generations.values())])
        return None if math.isinf(due) else max(due - self._clock(), 0)

    def _step(self, plan: Plan) -> list[Message]:
        """Does what the plan says: 1. admit, 2. memory, 3. decode and sample, 4. report how long it took."""
        started = self._clock()
        for sequence, n_cached in plan.admitted:
            self._admitted(self._generations[sequence.id], n_cached, started)
        if plan.layout:
            self._runner.drop()
        for operation in plan.operations:
            self._runner.apply(operation)
        if plan.grow_to:
            self._grow(plan.grow_to)
            return []
        if plan.restored:
            self._restore(*plan.restored)
            return []
        events: list[Message] = []
        for chunks in self._scheduler.layout.batches(plan.chunks):
            self._runner.fill(chunks)
            decoding = self._clock()
            code = self._runner.decode()
            decoded = self._clock()
            self._counters.decoded(decoded - decoding)
            if code:
                return events + self._recover(plan, code)
            events += self._sample([chunk for chunk in chunks if chunk.sample], decoded)
        ended = self._clock()
        self._counters.stepped(started, ended, plan.prompt_tokens)
        self._scheduler.observe(plan, ended - started)
        return events

    def _sample(self, due: list[Chunk], now: float) -> list[Message]:
        """Samples the next token of every sequence that is due, and says what came of it."""
        events: list[Message] = []
        for row, chunk in enumerate(due):
            generation = self._generations[chunk.sequence.id]
            try:
                sampled = self._runner.sample(row, generation.request.logprobs)
            except MyllmError as error:
                events.append(self._fail(generation, error))
            else:
                events += self._take_token(generation, sampled, now)
        return events

    def _take_token(self, generation: Generation, sampled: Sampled, now: float) -> list[Message]:
        """Appends a sampled token and makes its events, the done event too where it was the last."""
        token = sampled.token
        if self.tokenizer.is_end(token):
            return self._finish(generation, "stop")
        times, sequence = generation.times, generation.sequence
        times.first_token = now if times.first_token is None else times.first_token
        times.last_token = now
        sequence.tokens.append(token)
        self._counters.generated()
        extra = {} if generation.request.logprobs is None else self._logprobs(sampled)
        events = generation.token_events(self.tokenizer.piece(token), extra)
        if generation.text.stopped:
            return events + self._finish(generation, "stop")
        if len(sequence.tokens) >= sequence.limit:
            return events + self._finish(generation, "length")
        return events

    def _logprobs(self, sampled: Sampled) -> Message:
        decode = self.tokenizer.decode
        named = [{"token": decode([t]), "logprob": round(value, 6)} for t, value in sampled.top]
        return {"logprob": round(sampled.logprob, 6), "top_logprobs": named}

    # ── a request's life ────────────────────────────────────────────────────────────────────

    def _start(
        self,
        request: GenRequest,
        prompt: list[int],
        arrival: Arrival,
        dropped: tuple[int, int],
        in_reasoning: bool,
        stored: Found,
    ) -> list[Message]:
        if arrival.id in self._generations:
            raise ValueError("the worker gives every request an id of its own")
        try:
            self._arrivals += 1
            generation = Generation.begin(
                request,
                prompt,
                arrival,
                self._runner,
                order=self._arrivals,
                stored=stored,
            )
        except MyllmError as error:
            return [tagged(failed(error), arrival.id)]
        except Exception as error:  # noqa: BLE001 - not in flight yet, so nobody else would tell its client
            traceback.print_exc(file=sys.stderr)
            bug = InternalError(f"engine: {type(error).__name__}: {error}; please report it")
            return [tagged(failed(bug), arrival.id)]
        generation.dropped_tokens, generation.dropped_messages = dropped
        generation.sequence.last_alone = self._archive is not None and self._archive.keeps(prompt)
        generation.reasoning = ReasoningSplitter(inside=in_reasoning)
        self._generations[arrival.id] = generation
        if request.max_tokens == 0:
            return self._finish(generation, "length")
        self._scheduler.submit(generation.sequence)
        return self._pause(arrival.id, arrival.paused)

    def _admitted(self, generation: Generation, n_cached: int, now: float) -> None:
        if generation.times.admitted is None:  # else it was preempted, and comes back
            generation.times.admitted = now
            generation.n_cached = n_cached
            self._counters.admitted(generation.n_prompt, n_cached)

    def _pause(self, request_id: int, paused: bool) -> list[Message]:
        if generation := self._generations.get(request_id):
            change = self._scheduler.pause if paused else self._scheduler.resume
            change(generation.sequence)
        self._embeds.pause(request_id, paused)
        return []

    def _finish_by_id(self, request_id: int, finish_reason: str) -> list[Message]:
        generation = self._generations.get(request_id)
        return self._finish(generation, finish_reason) if generation else []

    def _finish(self, generation: Generation, finish_reason: str) -> list[Message]:
        sequence = generation.sequence
        if sequence.slot and not generation.request.priority:  # a batch's are many, and seldom wanted again
            self._ended.append((sequence.slot, list(sequence.slot.tokens), generation.stored))
        known = self._snapshot(generation)
        self._forget(generation)
        *events, done = generation.closing_events(finish_reason, self._clock())
        return [*events, done | known]

    def _snapshot(self, generation: Generation) -> Message:
        """What names the files in which a request's tokens are kept, where it asks for that."""
        slot = generation.sequence.slot
        if self._archive is None or slot is None or not generation.request.name_snapshot:
            return {}
        return {"snapshot": self._archive.name(slot.tokens)}

    def _fail(self, generation: Generation, error: MyllmError) -> Message:
        self._forget(generation)
        return tagged(failed(error), generation.sequence.id)

    def _forget(self, generation: Generation) -> None:
        self._scheduler.remove(generation.sequence)
        del self._generations[generation.sequence.id]
        self._runner.end(generation.sequence.id)

    def _expire(self) -> list[Message]:
        """Ends the requests whose deadline has passed, running or queued."""
        now = self._clock()
        late = [generation for generation in self._generations.values() if now >= generation.due]
        return [event for generation in late for event in self._finish(generation, "deadline")]

    def _recover(self, plan: Plan, code: int) -> list[Message]:
        """After a failed decode nothing of the step can be trusted: its sequences start again, once."""
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
        self._emit_all(failed + self._embeds.fail_all(error))
        self._start_empty()

    # ── the KV cache ────────────────────────────────────────────────────────────────────────

    def _grow(self, n_cells: int) -> None:
        """A cache of `n_cells` in place of the present one; running sequences move, idle ones go."""
        n_cells = round_up(max(n_cells, self._runner.device.step_tokens))
        self._scheduler.grown(n_cells)
        kept = {s.slot.id: s for s in self._scheduler.active if s.slot and s.n_cached}
        for slot in self._runner.grow(self._scheduler.layout, n_cells, list(kept)):
            self._scheduler.restart(kept[slot])

    def _keep_ended(self) -> None:
        """Has written to disk what those computed who have been told their last event."""
        ended, self._ended = self._ended, []
        if self._archive is None or self._scheduler.layout.isolates:
            return
        for slot, tokens, stored in ended:
            for start, end, within in self._archive.gaps(tokens, stored):
                if self._scheduler.cache.holds(slot, tokens[:end]):  # else somebody has the slot already
                    self._archive.put(tokens[:end], start, self._runner.read(slot.id, start, end), within)

    def _restore(self, sequence: Sequence, start: int) -> None:
        """Reads from disk what the books say is there from `start` on; where that fails, it starts again."""
        generation, end = self._generations[sequence.id], sequence.n_cached
        if self._archive is None or sequence.slot is None:
            raise ValueError("what is restored was found, and has a slot")
        for block in generation.stored.blocks:
            first, last = max(block.start, start), min(block.start + block.used, end)
            if first >= last:
                continue
            state = self._archive.read(block)
            if state is None or not self._runner.write(sequence.slot.id, first, last, state):
                generation.stored, generation.n_cached, sequence.n_stored = NOT_FOUND, 0, 0
                self._scheduler.restart(sequence)
                return

    def _start_empty(self) -> None:
        self._runner.drop()
        self._scheduler = Scheduler(self._runner.layout, self._runner.device)

    def _emit_all(self, events: list[Message]) -> None:
        if events:
            self._emit(events)
