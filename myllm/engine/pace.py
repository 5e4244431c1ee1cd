"""How much work a step is worth, found by measuring: rows at once, and prompt tokens beside them.

Pure: it is told how long steps took, and never reads a clock. All times are seconds.
"""

from __future__ import annotations

from collections import deque
from statistics import median


class RowLimit:
    """How many sequences should run at once: the fewest with (nearly) the best tokens per second.

    Decoding is bound by memory bandwidth for a few rows and by arithmetic for many; where it
    saturates depends on model, quantisation and machine (measured: 8–16 rows in Q4_1, 32 in Q4_0).
    Past that point another row costs everybody latency and buys nothing.
    """

    LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48)
    WORTH = 1.04
    """A higher rung must be this much faster, or the machine's noise would move the limit."""
    SAMPLES = 12
    STALE = 2000
    """Steps after which a measured rung is forgotten, as the sequences have grown by then."""

    def __init__(self, most: int, start: int) -> None:
        self._ladder = [rung for rung in self.LADDER if rung < most] + [most]
        self._start = max(rung for rung in self._ladder if rung <= start)
        self._rates: dict[int, deque[float]] = {}
        self._measured_at: dict[int, int] = {}
        self._step = 0
        self.limit = self._start
        """Sequences to run at once; one rung above the best one while that is not yet measured."""

    def observe(self, rows: int, seconds: float) -> None:
        """A step that only decoded `rows` sequences took `seconds`."""
        self._step += 1
        rung = max(rung for rung in self._ladder if rung <= rows)
        self._rates.setdefault(rung, deque(maxlen=2 * self.SAMPLES)).append(rows / seconds)
        self._measured_at[rung] = self._step
        for stale in [r for r, step in self._measured_at.items() if self._step - step > self.STALE]:
            del self._rates[stale], self._measured_at[stale]
        if self._step % self.SAMPLES == 0:
            self.limit = self._choose()

    def _choose(self) -> int:
        known = {r: median(rates) for r, rates in self._rates.items() if len(rates) >= self.SAMPLES}
        if self._start not in known:
            return self._start
        best = max(known.values())
        chosen = min(rung for rung, rate in known.items() if rate * self.WORTH >= best)
        # Low rungs are measured in passing, when few sequences run; only upwards must be tried on purpose.
        above = next((rung for rung in self._ladder if rung > chosen), chosen)
        return chosen if above in known else above


class PrefillBudget:
    """How many prompt tokens a step takes on, so that running sequences keep their pace."""

    PACE = 3.0
    """A step with prompt tokens may take this many times a usual decode step."""
    ALONE = 0.5
    """Seconds a step may take when nothing decodes: cancellations and newcomers wait that long."""
    LEAST = 16
    SMOOTHING = 0.2

    def __init__(self, most: int) -> None:
        self._most = most
        self._decode_step: float | None = None
        self._token_alone: float | None = None
        self._token_beside: float | None = None

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """A step with `rows` decoding sequences and `prompt_tokens` took `seconds`."""
        if not prompt_tokens:
            self._decode_step = self._smooth(self._decode_step, seconds)
        elif not rows:
            self._token_alone = self._smooth(self._token_alone, seconds / prompt_tokens)
        elif self._decode_step:
            extra = max(seconds - self._decode_step, 0.0) / prompt_tokens
            self._token_beside = self._smooth(self._token_beside, extra)

    def tokens(self, rows: int, room: int) -> int:
        """Prompt tokens for a step in which `rows` sequences decode, at most about `room` beside them."""
        if not rows:
            fitting = self.ALONE / self._token_alone if self._token_alone else 4 * self.LEAST
            return int(min(max(fitting, 4 * self.LEAST), self._most))
        per_token = self._token_beside or self._token_alone
        if not per_token or not self._decode_step:
            return min(2 * self.LEAST, room)
        fitting = (self.PACE - 1) * self._decode_step / per_token
        return int(max(min(fitting, room), self.LEAST))

    def _smooth(self, old: float | None, new: float) -> float:
        return new if old is None else old + self.SMOOTHING * (new - old)
