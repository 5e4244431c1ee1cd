"""Where tokens find cells: the two layouts of llama.cpp's KV cache, as the scheduler asks about them.

Pure. `Pool` is the default: any mix of long and short, and a shared prefix costs nothing; but a step
passes over every used cell. `Streams` gives each sequence cells of its own from 0 on: no step looks at
another's, and logits do not depend, bit for bit, on who runs beside. Its price is no sharing, and memory
for the longest times the number of slots. It serves `--flash-attn off`, whose purpose is
reproducibility, recurrent models, whose state can't be shared, and `Crowd`s: many short requests that
have no prefix in common (measured on two cores, 64 of 16+16 tokens, medians of six interleaved pairs: 122
tokens/s decoded against a pool's 103, the whole 7 % sooner).
"""

from __future__ import annotations

from typing import Protocol

from myllm.engine.device import Device
from myllm.engine.kv_cache import KvCache, Slot, common_prefix
from myllm.engine.sequence import Chunk, Sequence

RESERVE = 512
"""Cells set aside at admission for an answer of unknown length; more are found when it gets there."""
POOL = 16384
"""Cells up to which a pool grows so that requests can run together; one alone may grow it to the window."""
CELL_STEP = 256
"""llama.cpp pads a sequence's cells to this many."""
CROWD = 16
"""So many requests at once are worth a layout of their own."""
CROWD_SLOTS = 64
CROWD_CELLS = POOL // CROWD_SLOTS
"""What each of them has."""
CROWD_PREFIX = 64
"""A common beginning of this many tokens is worth more shared than a crowd's streams are."""
RESTART_TOKENS = 1024
"""Tokens in the cache that a change of layout may throw away: a few steps' work."""
STREAM_CHUNK = 128
"""Prompt tokens of a step in streams: always the same, as the shape of a chunk changes low bits too."""


def round_up(n_cells: int) -> int:
    """`n_cells` as llama.cpp pads them."""
    return -(-n_cells // CELL_STEP) * CELL_STEP


def needed(sequence: Sequence) -> int:
    """Cells the sequence still wants: its missing tokens and its answer, as far as it can be foreseen."""
    return sequence.n_missing + min(sequence.limit - len(sequence.tokens), RESERVE)


class Layout(Protocol):
    """What the scheduler asks of a layout. Lengths are in tokens, sizes in cells."""

    isolates: bool
    """Whether sequences share neither cells nor, while they prefill, a batch."""
    n_slots: int
    max_rows: int
    start_rows: int
    """Rows to begin with, until it is measured how many pay off."""
    max_cells: int

    def successor(
        self, active: list[Sequence], waiting: list[Sequence], paused: list[Sequence]
    ) -> Layout | None:
        """The layout that would serve these sequences better, where it is worth to start again with it."""
        ...

    def reusable(self, cache: KvCache, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot with the longest beginning of the sequence that it may reuse, and its length."""
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

    def target(self, wanted: list[int]) -> int:
        """The number of cells in all that sequences of `wanted` cells each ask for, within `max_cells`."""
        ...

    def chunk(self, budget: int) -> int:
        """Prompt tokens of one sequence in a step, where `budget` would keep the pace."""
        ...

    def prompt_room(self, rows: int) -> int:
        """Prompt tokens that a step may take on beside `rows` decoding sequences, whatever the pace."""
        ...

    def batches(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """A step's chunks as they share batches: where sequences are isolated, each prompt has its own."""
        ...


class Pool:
    """One pool of cells for all (`kv_unified`); `max_cells` is at least a whole window."""

    isolates = False

    def __init__(self, max_cells: int, max_rows: int, n_slots: int, device: Device) -> None:
        self.max_cells, self.max_rows, self.n_slots = max_cells, max_rows, n_slots
        self.start_rows, self._mixed_tokens = device.start_rows, device.mixed_tokens

    def successor(
        self, active: list[Sequence], waiting: list[Sequence], paused: list[Sequence]
    ) -> Layout | None:
        asked = active + waiting + paused
        if len(asked) < CROWD or self.max_rows < CROWD or self.max_cells < POOL:
            return None
        lost = sum(sequence.n_cached for sequence in active)
        return Crowd(self) if lost <= RESTART_TOKENS and is_crowd(asked) else None

    def reusable(self, cache: KvCache, sequence: Sequence) -> tuple[Slot | None, int]:
        return cache.longest_prefix(sequence.tokens)

    def is_short(self, cache: KvCache, active: list[Sequence], sequence: Sequence, shared: int) -> bool:
        wanted = needed(sequence) - shared + sum(map(needed, active))
        return wanted > cache.n_free + cache.n_idle

    def rows_fit(self, cache: KvCache, rows: list[Sequence]) -> bool:
        return cache.make_room(len(rows))

    def room(self, cache: KvCache, sequence: Sequence, size: int) -> int:
        return size if cache.make_room(size) else min(size, cache.n_free)

    def target(self, wanted: list[int]) -> int:
        return min(sum(wanted), max([POOL, *wanted]), self.max_cells)

    def chunk(self, budget: int) -> int:
        return budget

    def prompt_room(self, rows: int) -> int:
        return self._mixed_tokens - rows

    def batches(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        return [chunks] if chunks else []


class Streams:
    """Every slot has the same number of cells, its own."""

    isolates = True

    def __init__(self, n_slots: int, window: int) -> None:
        self.n_slots = self.max_rows = self.start_rows = n_slots  # more rows do no harm
        self.max_cells = n_slots * round_up(window)

    def successor(
        self, active: list[Sequence], waiting: list[Sequence], paused: list[Sequence]
    ) -> Layout | None:
        return None

    def reusable(self, cache: KvCache, sequence: Sequence) -> tuple[Slot | None, int]:
        slot = sequence.parked  # all of its own, as it was
        return slot, len(slot.tokens) if slot else 0

    def is_short(self, cache: KvCache, active: list[Sequence], sequence: Sequence, shared: int) -> bool:
        return needed(sequence) > cache.cells_per_slot

    def rows_fit(self, cache: KvCache, rows: list[Sequence]) -> bool:
        return all(sequence.n_cached < cache.cells_per_slot for sequence in rows)

    def room(self, cache: KvCache, sequence: Sequence, size: int) -> int:
        return min(size, cache.cells_per_slot - sequence.n_cached)

    def target(self, wanted: list[int]) -> int:
        return min(self.n_slots * round_up(max(wanted)), self.max_cells)

    def chunk(self, budget: int) -> int:
        return STREAM_CHUNK

    def prompt_room(self, rows: int) -> int:
        return 4 * STREAM_CHUNK

    def batches(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        rows = [chunk for chunk in chunks if chunk.size == 1]
        return ([rows] if rows else []) + [[chunk] for chunk in chunks if chunk.size > 1]


class Crowd(Streams):
    """Streams for many short requests of a batch; the pool returns when others wait and none runs, and at
    once for somebody at a terminal who needs more than a slot.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__(CROWD_SLOTS, CROWD_CELLS)
        if pool.max_rows < CROWD_SLOTS - 1:  # fewer were asked for
            self.max_rows = self.start_rows = pool.max_rows
        self._pool = pool

    def successor(
        self, active: list[Sequence], waiting: list[Sequence], paused: list[Sequence]
    ) -> Layout | None:
        is_urgent = any(not s.priority and needed(s) > CROWD_CELLS for s in waiting)
        is_over = waiting and not active and not is_crowd(waiting)
        return self._pool if is_urgent or is_over else None


def is_crowd(sequences: list[Sequence]) -> bool:
    """Whether these are requests of a batch, all short enough for a crowd's slots, with nothing to share."""
    first, last = sequences[0], sequences[-1]
    shared = 0 if first is last else common_prefix(first.tokens, last.tokens)
    return shared < CROWD_PREFIX and all(
        s.priority and s.n_cached + needed(s) <= CROWD_CELLS for s in sequences
    )
