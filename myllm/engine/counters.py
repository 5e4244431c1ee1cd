"""What an engine counts of its work, for people and benchmarks: tokens, steps, and the pace of late.

Must not know requests, llama.cpp or a clock. One thread writes, any may read. All times are seconds.
"""

from __future__ import annotations

from collections import deque

from myllm.protocol import Message

LATELY = 5.0
"""Seconds back from now whose steps make up the pace that is shown."""


class Counters:
    """Sums since the engine began; `prompt_tokens` are those that were decoded, `cached_tokens` those
    that need not be.
    """

    def __init__(self) -> None:
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._cached_tokens = self._admitted_tokens = self._told = 0
        self._decode_seconds = self._step_seconds = 0.0
        self._late: deque[tuple[float, float, int]] = deque()
        """When a step ended, how long it took, and the tokens it generated."""

    def admitted(self, n_prompt: int, n_cached: int) -> None:
        """A request runs; its prompt's first `n_cached` tokens need not be decoded."""
        self._admitted_tokens += n_prompt
        self._cached_tokens += n_cached

    def decoded(self, seconds: float) -> None:
        """One batch went through llama.cpp, or what stands for it."""
        self._decode_seconds += seconds

    def generated(self) -> None:
        """A token was sampled."""
        self._generated_tokens += 1

    def stepped(self, started: float, ended: float, prompt_tokens: int) -> None:
        """A whole step is over, with sampling and events."""
        self._steps += 1
        self._prompt_tokens += prompt_tokens
        self._step_seconds += ended - started
        self._late.append((ended, ended - started, self._generated_tokens - self._told))
        self._told = self._generated_tokens
        while self._late[0][0] < ended - LATELY:
            self._late.popleft()

    def as_message(self, now: float) -> Message:
        """All of it as JSON values."""
        return {
            "tokens_per_second": round(self._pace(now), 1),
            "kv_hit_rate": round(self._cached_tokens / max(self._admitted_tokens, 1), 4),
            "steps": self._steps,
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self._generated_tokens,
            "cached_tokens": self._cached_tokens,
            "decode_seconds": round(self._decode_seconds, 3),
            "step_seconds": round(self._step_seconds, 3),
        }

    def _pace(self, now: float) -> float:
        """Tokens generated a second of the steps that ended lately; 0 where there were none."""
        late = [step for step in tuple(self._late) if step[0] >= now - LATELY]
        seconds = sum(seconds for _, seconds, _ in late)
        return sum(tokens for _, _, tokens in late) / seconds if seconds else 0.0
