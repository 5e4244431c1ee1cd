"""A generation: one request's way from sampled tokens to events, and its timings.

Owns what the scheduler must not see: text, clock times. Makes events, sends nothing. Must not know what else
is in flight.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

from myllm.engine.runner import Runner
from myllm.engine.sequence import Sequence
from myllm.engine.snapshot import NOT_FOUND, Found
from myllm.engine.text import ReasoningSplitter, TextStream
from myllm.errors import BadDataError, ContextOverflowError
from myllm.events import Timings, Usage, generated, token
from myllm.protocol import MAX_SEED, Message, tagged
from myllm.requests import Arrival, GenRequest


@dataclass(slots=True)
class Times:
    """Moments of a request's life, in seconds of one monotonic clock; None while not reached."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Generation:
    """A request that is being answered."""

    request: GenRequest
    sequence: Sequence
    times: Times
    n_prompt: int
    n_cached: int = 0
    seed: int = 0
    dropped_tokens: int = 0
    dropped_messages: int = 0
    stored: Found = NOT_FOUND
    """What of its prompt was on disk when it came."""
    failures: int = 0
    finish_reason: str | None = None
    text: TextStream = field(default_factory=TextStream)
    reasoning: ReasoningSplitter = field(default_factory=ReasoningSplitter)
    _answer: list[str] = field(default_factory=list)
    _logprobs: list[Message] = field(default_factory=list)
    _thought: list[str] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        request: GenRequest,
        prompt: list[int],
        arrival: Arrival,
        runner: Runner,
        *,
        order: int,
        stored: Found,
    ) -> Generation:
        """Checks once, before it waits, what the request asks for; `order` counts arrivals.

        Raises BadDataError where the model makes no text, ContextOverflowError, UsageError.
        """
        if not runner.writes:
            raise BadDataError("model: it makes embeddings, not text; use `myllm embed`, or give another -m")
        if len(prompt) >= runner.window:
            raise ContextOverflowError(
                f"prompt: {len(prompt):,} tokens do not fit the window of {runner.window:,}; shorten it"
            )
        answer = runner.window if request.max_tokens is None else request.max_tokens
        limit = min(len(prompt) + answer, runner.window)
        seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        runner.begin(arrival.id, request, prompt, seed)
        sequence = Sequence(arrival.id, list(prompt), limit, request.priority, order, arrival.client)
        sequence.n_stored = min(stored.length, len(prompt) - 1)  # the last is decoded again, for its logits
        return cls(
            request,
            sequence,
            Times(arrival.at),
            n_prompt=len(prompt),
            seed=seed,
            stored=stored,
            text=TextStream(request.stop),
        )

    @property
    def due(self) -> float:
        """When its deadline is, on the clock of its times."""
        limit = self.request.deadline_ms
        return math.inf if limit is None else self.times.arrived + limit / 1000

    @property
    def n_generated(self) -> int:
        return len(self.sequence.tokens) - self.n_prompt

    def token_events(self, piece: bytes, extra: Message) -> list[Message]:
        """Events for one token; `extra` (log-probabilities) makes one even where no text came free."""
        parts = self.reasoning.push(self.text.push(piece))
        events = [self._token_event(*part) for part in parts]
        if extra:
            events = events or [token("")]
            events[-1] |= extra
        if self.request.stream:
            return self._tag(events)
        if extra:
            self._logprobs.append({"token": events[-1]["token"], **extra})
        return []

    def closing_events(self, finish_reason: str, now: float) -> list[Message]:
        """What was held back, then the one done event."""
        parts = self.reasoning.push(self.text.flush()) + self.reasoning.flush()
        events = [self._token_event(*part) for part in parts]
        return self._tag([*(events if self.request.stream else []), self._done(finish_reason, now)])

    def _token_event(self, text: str, is_reasoning: bool) -> Message:
        (self._thought if is_reasoning else self._answer).append(text)
        return token(text, reasoning=is_reasoning)

    def _done(self, finish_reason: str, now: float) -> Message:
        usage = Usage(
            prompt_tokens=self.n_prompt,
            cached_tokens=self.n_cached,
            completion_tokens=self.n_generated,
            dropped_messages=self.dropped_messages,
        )
        if self.dropped_tokens:
            usage["dropped_tokens"] = self.dropped_tokens
        return generated(
            "".join(self._answer),
            finish_reason,
            usage,
            self._timings(now),
            reasoning_text="".join(self._thought),
            logprobs=self._logprobs,
            seed=self.seed,
        )

    def _timings(self, now: float) -> Timings:
        """Milliseconds that do not overlap, and so add up; a stage that was not reached is 0."""
        t = self.times
        admitted = t.admitted if t.admitted is not None else now
        first = t.first_token if t.first_token is not None else max(admitted, t.arrived)
        last = t.last_token if t.last_token is not None else first
        decode = last - first
        steps = self.n_generated - 1
        return Timings(
            queue_ms=_ms(admitted - t.arrived),
            prefill_ms=_ms(first - admitted),
            ttft_ms=_ms(first - t.arrived),
            decode_ms=_ms(decode),
            tokens_per_second=round(steps / decode, 1) if steps > 0 and decode > 0 else 0.0,
        )

    def _tag(self, events: list[Message]) -> list[Message]:
        return [tagged(event, self.sequence.id) for event in events]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
