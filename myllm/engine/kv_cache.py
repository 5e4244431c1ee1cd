"""What the KV cache holds: which slot has which tokens, who shares cells, what can be reused or dropped.

Pure bookkeeping that mirrors llama.cpp's unified cache cell for cell, so that the scheduler can
plan a batch that is known to fit. Must not call llama.cpp, read a clock or know requests.

A *cell* holds keys and values of one token of one layer stack; a *slot* is one llama.cpp
sequence id with the tokens it has in the cache. Copying a prefix to another slot shares its cells
(`llama_memory_seq_cp` in a unified cache is metadata only); a shared cell is free when its last
slot lets go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Remove(NamedTuple):
    """`llama_memory_seq_rm(slot, start, -1)`."""

    slot: int
    start: int


class Copy(NamedTuple):
    """`llama_memory_seq_cp(source, target, 0, length)`."""

    source: int
    target: int
    length: int


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence id: `tokens[i]` is in the cache at position i, in cell `cells[i]`."""

    id: int
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    busy: bool = False
    used_at: int = 0
    """The cache's tick when a request last let go of it, for least-recently-used eviction."""


class KvCache:
    """Slots over a fixed number of cells. All lengths are in tokens."""

    def __init__(self, n_cells: int, n_slots: int) -> None:
        self.n_cells = n_cells
        self.slots = [Slot(slot_id) for slot_id in range(n_slots)]
        self._free = list(range(n_cells - 1, -1, -1))
        self._sharers = [0] * n_cells
        self._tick = 0
        self._operations: list[Remove | Copy] = []

    def take_operations(self) -> list[Remove | Copy]:
        """What llama.cpp's memory must be told, in order, so that it agrees with this; forgotten then."""
        operations, self._operations = self._operations, []
        return operations

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def cells_per_slot(self) -> int:
        """Every slot's share of the cells, where they are not one pool."""
        return self.n_cells // len(self.slots)

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[Slot | None, int]:
        """The slot that holds the longest beginning of `tokens`, busy or not, and how long it is."""
        best: tuple[Slot | None, int] = (None, 0)
        for slot in self.slots:
            length = common_prefix(slot.tokens, tokens)
            # At equal length an idle slot is better: it can be taken over instead of shared.
            if length > best[1] or (length == best[1] and length and best[0] and best[0].busy > slot.busy):
                best = (slot, length)
        return best

    def holds(self, slot: Slot, tokens: Sequence[int]) -> bool:
        """Whether `slot` is one of this cache's, and begins with `tokens`."""
        return slot in self.slots and slot.tokens[: len(tokens)] == tokens

    def take(self) -> Slot | None:
        """An idle slot to fill: the first empty one, else the least recently used. None if all are busy.

        The first, because in streams only sequences with consecutive ids are decoded together.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        empty = next((slot for slot in idle if not slot.tokens), None)
        return empty or min(idle, key=lambda slot: slot.used_at, default=None)

    def share(self, source: Slot, target: Slot, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`, in the same cells."""
        self.truncate(target, 0)
        target.tokens = source.tokens[:length]
        target.cells = source.cells[:length]
        for cell in target.cells:
            self._sharers[cell] += 1
        self._operations.append(Copy(source.id, target.id, length))

    def append(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Gives `slot` new cells for `tokens`; the caller has checked `n_free`."""
        at = len(self._free) - len(tokens)
        cells = self._free[at:]
        del self._free[at:]
        for cell in cells:
            self._sharers[cell] = 1
        slot.tokens += tokens
        slot.cells += cells

    def truncate(self, slot: Slot, length: int) -> None:
        """Keeps the first `length` tokens of `slot`."""
        if length >= len(slot.tokens):
            return
        for cell in slot.cells[length:]:
            self._sharers[cell] -= 1
            if not self._sharers[cell]:
                self._free.append(cell)
        del slot.tokens[length:], slot.cells[length:]
        self._operations.append(Remove(slot.id, length))

    def release(self, slot: Slot) -> None:
        """A request is done with `slot`; its tokens stay for reuse until evicted."""
        self._tick += 1
        slot.busy, slot.used_at = False, self._tick

    def make_room(self, n_cells: int) -> bool:
        """Evicts idle slots, least recently used first, until `n_cells` are free. False if they can't be."""
        while self.n_free < n_cells:
            cached = [slot for slot in self.slots if not slot.busy and slot.tokens]
            if not cached:
                return False
            self.truncate(min(cached, key=lambda slot: slot.used_at), 0)
        return True

    @property
    def n_reusable(self) -> int:
        """Idle slots with tokens that another request may begin with."""
        return sum(1 for slot in self.slots if slot.tokens and not slot.busy)

    @property
    def n_idle(self) -> int:
        """Cells that only idle slots hold: what evicting all of them would free."""
        held = {cell for slot in self.slots if slot.busy for cell in slot.cells}
        return self.n_cells - self.n_free - len(held)

    def resize(self, n_cells: int) -> None:
        """Becomes a cache of `n_cells` that holds the busy slots only, each in cells of its own.

        The caller moves their keys and values, so nothing of this is left in the operations.
        """
        busy = [(slot, slot.tokens) for slot in self.slots if slot.busy]
        self.n_cells = n_cells
        self._free = list(range(n_cells - 1, -1, -1))
        self._sharers = [0] * n_cells
        for slot in self.slots:
            slot.tokens, slot.cells = [], []
        for slot, tokens in busy:
            self.append(slot, tokens)
        self._operations = []


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning; by halves, because comparing slices runs in C."""
    if not a or not b or a[0] != b[0]:
        return 0
    low, high = 1, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
