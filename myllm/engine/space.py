"""Where tokens find cells: the two layouts of llama.cpp's KV cache, as the scheduler asks about them.

Pure. `Pool` is the default: any mix of long and short, and a shared prefix costs nothing. `Streams` gives
each sequence cells of its own from 0 on, so that its logits do not depend, bit for bit, on who runs
beside it: the price is no sharing and memory for the longest times the number of slots. It serves
`--flash-attn off`, whose purpose is reproducibility, and recurrent models, whose state can't be shared.
"""

from __future__ import annotations

from typing import Protocol

from myllm.engine.kv_cache import KvCache, Slot
from myllm.engine.sequence import Sequence

RESERVE = 512
"""Cells set aside at admission for an answer of unknown length; more are found when it gets there."""
POOL = 16384
"""Cells up to which a pool grows so that requests can run together; one alone may grow it to the window."""
CELL_STEP = 256
"""llama.cpp pads a sequence's cells to this many."""
STREAM_CHUNK = 128
"""Prompt tokens of a step in streams: always the same, as the shape of a chunk changes low bits too."""


def round_up(n_cells: int) -> int:
    """`n_cells` as llama.cpp pads them."""
    return -(-n_cells // CELL_STEP) * CELL_STEP


def needed(sequence: Sequence) -> int:
    """Cells the sequence still wants: its missing tokens and its answer, as far as it can be foreseen."""
    return sequence.n_missing + min(sequence.limit - len(sequence.tokens), RESERVE)


class Space(Protocol):
    """What the scheduler asks of a layout. Lengths are in tokens, sizes in cells."""

    isolates: bool
    """Whether sequences share neither cells nor, while they prefill, a batch."""

    def reusable(self, cache: KvCache, tokens: list[int]) -> tuple[Slot | None, int]:
        """The slot with the longest beginning of `tokens` that may be reused, and its length."""
        ...

    def is_short(self, cache: KvCache, active: list[Sequence], sequence: Sequence, shared: int) -> bool:
        """Whether `sequence`, sharing `shared` cells with a running one, asks for more than there is."""
        ...

    def rows_fit(self, cache: KvCache, rows: list[Sequence]) -> bool:
        """Whether each of `rows` can have one more cell; evicts idle ones for them."""
        ...

    def room(self, cache: KvCache, sequence: Sequence, size: int) -> int:
        """How many of its next `size` tokens the sequence can have cells for; evicts idle ones for them."""
        ...

    def target(self, wanted: list[int], max_cells: int) -> int:
        """The number of cells in all that sequences of `wanted` cells each ask for."""
        ...

    def chunk(self, budget: int) -> int:
        """Prompt tokens of one sequence in a step, where `budget` would keep the pace."""
        ...


class Pool:
    """One pool of cells for all (`kv_unified`)."""

    isolates = False

    def reusable(self, cache: KvCache, tokens: list[int]) -> tuple[Slot | None, int]:
        return cache.longest_prefix(tokens)

    def is_short(self, cache: KvCache, active: list[Sequence], sequence: Sequence, shared: int) -> bool:
        wanted = needed(sequence) - shared + sum(map(needed, active))
        return wanted > cache.n_free + cache.n_idle

    def rows_fit(self, cache: KvCache, rows: list[Sequence]) -> bool:
        return cache.make_room(len(rows))

    def room(self, cache: KvCache, sequence: Sequence, size: int) -> int:
        return size if cache.make_room(size) else min(size, cache.n_free)

    def target(self, wanted: list[int], max_cells: int) -> int:
        return min(sum(wanted), max([POOL, *wanted]), max_cells)

    def chunk(self, budget: int) -> int:
        return budget


class Streams:
    """Every slot has the same number of cells, its own."""

    isolates = True

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots

    def reusable(self, cache: KvCache, tokens: list[int]) -> tuple[Slot | None, int]:
        return None, 0

    def is_short(self, cache: KvCache, active: list[Sequence], sequence: Sequence, shared: int) -> bool:
        return needed(sequence) > cache.cells_per_slot

    def rows_fit(self, cache: KvCache, rows: list[Sequence]) -> bool:
        return all(sequence.n_cached < cache.cells_per_slot for sequence in rows)

    def room(self, cache: KvCache, sequence: Sequence, size: int) -> int:
        return min(size, cache.cells_per_slot - sequence.n_cached)

    def target(self, wanted: list[int], max_cells: int) -> int:
        return min(self._n_slots * round_up(max(wanted)), max_cells)

    def chunk(self, budget: int) -> int:
        return STREAM_CHUNK
