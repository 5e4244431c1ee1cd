"""A sequence: one request's tokens on their way through the KV cache, as the scheduler sees it.

Holds no text, sampler, clock or event (see generation.py), so that scheduling is tested on bare tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from myllm.engine.kv_cache import Slot


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` (prompt, then what was generated) go into the cache in order; when the last is in, the next
    one can be sampled. A sequence that lost its cells therefore just starts again from its tokens.

    `id` and `client` are its arrival's, `order` counts arrivals. `priority` 0 is interactive, higher is
    more patient. `limit` is the most tokens it may come to (prompt + max_tokens, within the window).
    """

    id: int
    tokens: list[int]
    limit: int
    priority: int = 0
    order: int = 0
    client: int = 0
    slot: Slot | None = None
    n_stored: int = 0
    """Tokens of its beginning, never all of them, whose keys and values are on disk."""
    last_alone: bool = False
    """Whether the last of its missing tokens is decoded by itself, as it is where the others are read back:
    the logits are the same then, bit for bit."""
    left: tuple[Slot, int] | None = None
    """The slot it last gave up, and when (`Slot.used_at`)."""
    waited: int = 0
    """Steps for which its prefill got no token."""

    @property
    def n_cached(self) -> int:
        return len(self.slot.tokens) if self.slot else 0

    @property
    def parked(self) -> Slot | None:
        """The slot it last gave up, with whatever is not evicted, if nobody else has had it since."""
        slot, used_at = self.left or (None, 0)
        return slot if slot and not slot.busy and slot.used_at == used_at else None

    @property
    def n_missing(self) -> int:
        """Tokens still to be decoded before the next can be sampled; 1 is the steady state."""
        return len(self.tokens) - self.n_cached

    @property
    def urgency(self) -> tuple[int, int]:
        """Sort key: interactive before batch, then by arrival."""
        return self.priority, self.order


class Chunk(NamedTuple):
    """Tokens `start:end` of a sequence, to be decoded in its slot; with `sample`, its next token is due."""

    sequence: Sequence
    start: int
    end: int
    sample: bool

    @property
    def size(self) -> int:
        return self.end - self.start


def in_turn(waiting: Iterable[Sequence], running: Iterable[Sequence]) -> list[Sequence]:
    """Those of `waiting`, sorted by urgency, as they should be admitted: the urgent first, then whose
    client has the fewest running, each counting those before it as such, then by arrival.
    """
    shares = Counter(sequence.client for sequence in running)
    turns: dict[Sequence, tuple[int, int, int]] = {}
    for sequence in waiting:
        turns[sequence] = sequence.priority, shares[sequence.client], sequence.order
        shares[sequence.client] += 1
    return sorted(turns, key=turns.__getitem__)
