"""Where tokens find cells: the two layouts of llama.cpp's KV cache, as the scheduler asks about them.

Pure. `Pool` is the default: any mix of long and short, and a shared prefix costs nothing; but a step
passes over every used cell. `Streams` gives each sequence cells of its own from 0 on: no step looks at
another's, and logits do not depend, bit for bit, on who runs beside. Its price is no sharing, and memory
for the longest times the number of slots. It serves `--flash-attn off`, whose purpose is
reproducibility, and recurrent models, whose state can't be shared. Many short requests gain nothing by it
(measured, Q4_0, 16+32 tokens, without and with: 64 take 22.7 and 22.9 s of one core, 16 take 5.9 and 6.1).
"""

from __future__ import annotations

from typing import Protocol

from myllm.engine.device import Device
from myllm.engine.kv_cache import KvCache, Slot
from myllm.engine.sequence import Chunk, Sequence

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


class Layout(Protocol):
    """What the scheduler asks of a layout. Lengths are in tokens, sizes in cells."""

    isolates: bool
    """Whether sequences share neither cells nor, while they prefill, a batch."""
    n_slots: int
    max_rows: int
    max_cells: int

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
        self._mixed_tokens = device.mixed_tokens

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
        self.n_slots = self.max_rows = n_slots
        self.max_cells = n_slots * round_up(window)

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
