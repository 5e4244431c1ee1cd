"""Our engine, driven in this process: requests of plain tokens in, moments out.

The engine's thread only notes what came when; the thread that measures sleeps meanwhile, for on few
cores every wake-up is taken from llama.cpp's threads. Must not know what is compared with what.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from myllm.engine import open_engine
from myllm.protocol import Message
from myllm.requests import Arrival, GenRequest, LoadOptions

TIMEOUT = 600.0
BATCH = 1
"""The priority of a batch's requests."""
VOCABULARY = range(1000, 30_000)
"""Token ids that are ordinary ones in any model of today."""


class Step(NamedTuple):
    """The engine's counters after a step that made events. Seconds and tokens, all running totals."""

    at: float
    prompt_tokens: int
    generated_tokens: int
    decode_seconds: float


class Engine:
    """One loaded model and a log of what it did since `clear`."""

    def __init__(self, model: Path, threads: int) -> None:
        self._condition: Callable[[], bool] = lambda: False
        self._reached = threading.Event()
        self._next_id = 0
        self._random = random.Random(1)
        self.clear()
        self._engine = open_engine(model, LoadOptions(threads=threads), self._take, lambda _: None)

    def clear(self) -> None:
        """Forgets what was logged; only while nothing runs."""
        self.steps: list[Step] = []
        self.arrivals: dict[int, list[float]] = {}
        self.done: dict[int, Message] = {}

    def random_tokens(self, count: int) -> list[int]:
        """A prompt that shares no beginning with any other."""
        return self._random.choices(VOCABULARY, k=count)

    def encode(self, text: str) -> list[int]:
        return self._engine.tokenizer.encode(text, special=False)

    def submit(self, prompt: list[int], max_tokens: int, **fields: Any) -> int:
        """Asks for exactly `max_tokens` greedy tokens and returns the request's id."""
        self._next_id += 1
        request = GenRequest(
            max_tokens=max_tokens,
            ignore_eos=True,
            sampling={"temperature": 0.0},
            **fields,
        )
        self.arrivals[self._next_id] = []
        self._engine.submit(request, prompt, Arrival(self._next_id, time.monotonic()))
        return self._next_id

    def cancel(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self._engine.cancel(request_id)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Sleeps until the condition, checked after every step by the engine's thread, is true."""
        self._reached.clear()
        self._condition = condition
        if not condition() and not self._reached.wait(TIMEOUT):
            raise TimeoutError(f"the engine did not get there in {TIMEOUT:g} s: {self._engine.status()}")
        if failed := [event["error"] for event in self.done.values() if "error" in event]:
            raise RuntimeError(f"a request failed: {failed[0]}")

    def wait_for(self, request_ids: list[int]) -> None:
        """Sleeps until these requests are done."""
        self.wait_until(lambda: all(request_id in self.done for request_id in request_ids))

    def run(self, prompts: list[list[int]], max_tokens: int, **fields: Any) -> list[Message]:
        """Submits the prompts at once, waits for all, returns their done events; clears the log before."""
        self.clear()
        started = self._counters()
        request_ids = [self.submit(prompt, max_tokens, **fields) for prompt in prompts]
        self.wait_for(request_ids)
        self.steps.insert(0, started)
        return [self.done[request_id] for request_id in request_ids]

    def decode_rate(self) -> float:
        """Tokens a second of those steps of the last run in which nothing was prefilled.

        By the clock, from one step's end to the next one's: planning, sampling and emitting count.
        """
        pairs = [
            (after.generated_tokens - before.generated_tokens, after.at - before.at)
            for before, after in pairwise(self.steps)
            if after.prompt_tokens == before.prompt_tokens
        ]
        return sum(tokens for tokens, _ in pairs) / sum(seconds for _, seconds in pairs)

    def whole_rate(self) -> float:
        """Prompt and generated tokens a second of the last run, from its start to its last token."""
        first, last = self.steps[0], self.steps[-1]
        tokens = last.prompt_tokens + last.generated_tokens - first.prompt_tokens - first.generated_tokens
        return tokens / (last.at - first.at)

    def share_outside_decode(self) -> float:
        """The part of the last run's time, in percent, that was not spent in `llama_decode`."""
        first, last = self.steps[0], self.steps[-1]
        return 100 * (1 - (last.decode_seconds - first.decode_seconds) / (last.at - first.at))

    @property
    def row_limit(self) -> int:
        """Rows a step that the engine has found to be worth it."""
        return int(self._engine.status()["row_limit"])

    def close(self) -> None:
        self._engine.close()

    def _take(self, events: list[Message]) -> None:
        self.steps.append(self._counters())
        for event in events:
            if event["done"]:
                self.done[event["id"]] = event
            else:
                self.arrivals[event["id"]].append(self.steps[-1].at)
        if self._condition():
            self._reached.set()

    def _counters(self) -> Step:
        status = self._engine.status()
        return Step(
            time.monotonic(), status["prompt_tokens"], status["generated_tokens"], status["decode_seconds"]
        )
