"""Decides what the next step does: who is admitted, evicted or preempted, and which tokens are decoded.

Pure: no clock, thread, ctypes or text. `plan()` changes the bookkeeping as if the step had been
done and returns what llama.cpp must do for it to be true; the engine acts and reports back.

Choices, and why:
- One pool of cells for all by default (kv_layout.py has the others). Its price, that a step passes
  over every used cell, is kept low by few idle cells beside running rows and never more rows than pay
  off (pace.py).
- A request that could share a prefix which another is still prefilling waits for it.
- Of those that wait and are as urgent, one goes next whose client has the fewest running, so that nobody
  waits behind another's sixty.
- An interactive request waits for no batch: it takes a batch's row and cells, at the next step.
- What is on disk is read back where that spares some tokens; such a step does nothing else, so that what
  cannot be read back costs nobody but whom it was for.
- When cells run out: evict idle ones, then grow the pool, then preempt one of the least urgent, of the
  client with most running the youngest, which starts again from its tokens later. Nobody fails.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field

from myllm.engine.device import Device
from myllm.engine.kv_cache import Copy, KvCache, Remove, Slot, common_prefix
from myllm.engine.kv_layout import Layout, needed
from myllm.engine.pace import PrefillBudget, RowLimit
from myllm.engine.sequence import Chunk, Sequence, in_turn

MIN_SHARED = 32
"""A shared prefix shorter than this is not worth waiting for: it prefills within a step or two."""
INTERACTIVE_ROWS = 2
"""Interactive sequences may outnumber the rows that pay off by this factor: to wait costs a person more
than to share."""
BUSY_ROWS = 8
"""From this many rows on, idle cells are kept few: masked cells still cost every row time."""
MIN_RESTORED = 32
"""So many tokens more must be on disk than in the cache: below, to prefill them is as quick."""
AGE_TOKENS = 64
"""Short prompts go first; a step of waiting is worth this many tokens, so that long ones get their turn."""


@dataclass(slots=True)
class Plan:
    """One step: a new empty cache of another `layout`, or memory `operations`; then the cache grown to
    `grow_to` cells, `restored` read from disk, or `chunks` decoded.
    """

    operations: list[Remove | Copy] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    """Who joined, and how many of its tokens were in the cache already."""
    layout: Layout | None = None
    grow_to: int | None = None
    restored: tuple[Sequence, int] | None = None
    """Whose keys and values are to be read from disk, from which position on to its `n_cached`."""

    @property
    def rows(self) -> int:
        """Sequences that decode a single token: the running ones."""
        return sum(1 for chunk in self.chunks if chunk.size == 1)

    @property
    def prompt_tokens(self) -> int:
        return sum(chunk.size for chunk in self.chunks) - self.rows


class Scheduler:
    """Sequences wait, run and are done in a KV cache of this layout, in steps that suit the device."""

    def __init__(self, layout: Layout, device: Device) -> None:
        self.layout = layout
        self.cache = KvCache(0, layout.n_slots)
        self.waiting: list[Sequence] = []
        self.active: list[Sequence] = []
        self.paused: list[Sequence] = []
        self.row_limit = RowLimit(layout.max_rows, layout.start_rows)
        self.prefill_budget = PrefillBudget(device.step_tokens)
        self._leaders: dict[Sequence, tuple[Sequence, int]] = {}

    # ── told by the engine ──────────────────────────────────────────────────────────────────

    def submit(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.urgency)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is done, cancelled or failed; what it has in the cache stays for reuse."""
        self._take_out(sequence)
        if self.layout.isolates and sequence.parked:  # nobody can reuse it
            self.cache.truncate(sequence.parked, 0)

    def pause(self, sequence: Sequence) -> None:
        """It takes part in no step until it is resumed; what it has in the cache stays, as an idle one's
        does, while nobody needs the room.
        """
        if sequence not in self.paused:
            self._take_out(sequence)
            self.paused.append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """It goes on from its last token as soon as it has a row again."""
        if sequence in self.paused:
            self._take_out(sequence)
            self.submit(sequence)

    def restart(self, sequence: Sequence) -> None:
        """What the sequence has in the cache can't be trusted; it starts again from its tokens."""
        if sequence.slot:
            self.cache.truncate(sequence.slot, 0)
        self._preempt(sequence)

    def observe(self, plan: Plan, seconds: float) -> None:
        """How long the step of `plan` took, in seconds."""
        self.prefill_budget.observe(plan.rows, plan.prompt_tokens, seconds)
        if plan.rows and not plan.prompt_tokens:
            self.row_limit.observe(plan.rows, seconds)

    def grown(self, n_cells: int) -> None:
        """The pool now has `n_cells` and holds the active sequences only, none sharing cells any more.

        Where they do not fit without sharing, some start again.
        """
        while sum(s.n_cached for s in self.active) > n_cells:
            self._preempt(self._next_to_yield())
        self.cache.resize(n_cells)

    # ── the decision ────────────────────────────────────────────────────────────────────────

    def plan(self) -> Plan:
        """The next step. An empty plan means that there is nothing to do."""
        plan = Plan()
        if self.waiting and (successor := self.layout.successor(self.active, self.waiting, self.paused)):
            self._move_to(successor)
            plan.layout = successor
        self._drop_idle_cells()
        plan.grow_to = self._admit(plan) or (None if plan.restored else self._make_room_for_rows())
        while self.active and not (plan.grow_to or plan.restored or plan.chunks):
            rows = [s for s in self.active if s.n_missing == 1]
            plan.chunks = [self._feed(s, 1) for s in sorted(rows, key=lambda s: s.slot.id if s.slot else -1)]
            plan.chunks += self._prefill(len(rows))
            if not plan.chunks:
                plan.grow_to = self._find_cells()
        plan.operations = self.cache.take_operations()
        return plan

    def _move_to(self, layout: Layout) -> None:
        """An empty cache of another layout; who was running starts again."""
        for sequence in list(self.active):
            self._preempt(sequence)
        for sequence in (*self.waiting, *self.paused):
            sequence.left = None
        self.layout, self.cache = layout, KvCache(0, layout.n_slots)
        self.row_limit = RowLimit(layout.max_rows, layout.start_rows)

    def _admit(self, plan: Plan) -> int | None:
        """Moves waiting sequences to the active ones; returns the size to grow to where that is needed."""
        for sequence in in_turn((s for s in self.waiting if not self._is_led(s)), self.active):
            if not self._has_row(sequence):
                break
            source, length = self.layout.reusable(self.cache, sequence)
            length = min(length, len(sequence.tokens) - 1)
            if self._follow(sequence, length):
                continue
            grow_to = None
            is_stored = sequence.n_stored - length >= MIN_RESTORED and not self.layout.isolates
            if self._is_short(sequence, source, length):
                grow_to = self._growth(sequence)
                if grow_to and is_stored:  # it wants the new cells
                    return grow_to
                if not grow_to and not self._yield_cells(sequence, source, length) and self.active:
                    break
            if not self._place(sequence, source, length):
                break
            if is_stored and self._restore(sequence, plan):
                return None
            plan.admitted.append((sequence, sequence.n_cached))
            if grow_to:
                return grow_to
        return None

    def _restore(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether there are cells for what of the sequence is on disk."""
        start = sequence.n_cached
        size = sequence.n_stored - start
        if sequence.slot is None or self.layout.room(self.cache, sequence, size) < size:
            return False
        self.cache.append(sequence.slot, sequence.tokens[start : sequence.n_stored])
        plan.restored = sequence, start
        plan.admitted.append((sequence, sequence.n_cached))
        return True

    def _is_short(self, sequence: Sequence, source: Slot | None, length: int) -> bool:
        """Whether the sequence, with `length` tokens of `source`, asks for more cells than there are."""
        shared = length if source and source.busy else 0
        return self.layout.is_short(self.cache, self.active, sequence, shared)

    def _yield_cells(self, sequence: Sequence, source: Slot | None, length: int) -> bool:
        """Whether less urgent ones had the cells that the sequence was short of, and gave them up."""
        while self._yields_to(sequence):
            if not self._is_short(sequence, source, length):
                return True
        return False

    def _place(self, sequence: Sequence, source: Slot | None, length: int) -> bool:
        """Gives the sequence a slot that starts with the first `length` tokens of `source`."""
        kept = [s.parked for s in self.paused]
        slot = source if source and not source.busy and source not in kept else self.cache.take()
        if slot is None:
            return False
        if source and slot is not source:
            self.cache.share(source, slot, length)
        else:
            self.cache.truncate(slot, length)
        slot.busy, sequence.slot, sequence.waited = True, slot, 0
        self.waiting.remove(sequence)
        self.active.append(sequence)
        return True

    def _has_row(self, sequence: Sequence) -> bool:
        """Whether the sequence may run now, if need be in the row of a less urgent one."""
        limit = self.row_limit.limit
        if not sequence.priority:
            limit = min(limit * INTERACTIVE_ROWS, self.layout.max_rows)
        return len(self.active) < limit or self._yields_to(sequence)

    def _yields_to(self, sequence: Sequence) -> bool:
        """Preempts one that is less urgent than the sequence; False where none runs."""
        other = self._next_to_yield() if self.active else sequence
        if other.priority <= sequence.priority:
            return False
        self._preempt(other)
        return True

    def _is_led(self, sequence: Sequence) -> bool:
        """Whether the sequence waits for another that is about to prefill their common prefix."""
        leader, length = self._leaders.get(sequence, (None, 0))
        if leader in self.active and leader is not None and leader.n_cached < length:
            return True
        self._leaders.pop(sequence, None)
        return False

    def _follow(self, sequence: Sequence, cached: int) -> bool:
        """Makes the sequence wait where an active one is prefilling clearly more of its prompt."""
        if self.layout.isolates:
            return False
        prefilling = [s for s in self.active if s.n_missing > 1]
        shared = [(min(common_prefix(s.tokens, sequence.tokens), len(s.tokens) - 1), s) for s in prefilling]
        length, leader = max(shared, key=lambda pair: pair[0], default=(0, None))
        if leader is None or length - cached < MIN_SHARED or leader.n_cached >= length:
            return False
        self._leaders[sequence] = (leader, length)
        return True

    def _make_room_for_rows(self) -> int | None:
        """Frees a cell for every running sequence; returns the pool size to grow to where that is needed."""
        while not self.layout.rows_fit(self.cache, [s for s in self.active if s.n_missing == 1]):
            if target := self._find_cells():
                return target
        return None

    def _find_cells(self) -> int | None:
        """Growing the pool where it may grow, else one sequence preempted (None)."""
        target = self._growth()
        if target is None:
            self._preempt(self._next_to_yield())
        return target

    def _prefill(self, rows: int) -> list[Chunk]:
        """Chunks of the sequences that lack more than one token, short ones first, within the budget."""
        room = self.layout.prompt_room(rows)
        # A pace is kept for people, also those who wait for a row. Where all are a batch, whoever joins
        # sooner makes the steps fuller.
        patient = rows and all(s.priority for s in self.active + self.waiting)
        budget = room if patient else self.prefill_budget.tokens(rows, room)
        chunks: list[Chunk] = []
        prefilling = [s for s in self.active if s.n_missing > 1]
        for sequence in sorted(
            prefilling, key=lambda s: (s.priority, s.n_missing - s.waited * AGE_TOKENS, s.order)
        ):
            wanted = min(sequence.n_missing - sequence.last_alone, self.layout.chunk(budget))
            if budget <= 0 or (chunks and wanted > budget):
                wanted = 0
            size = self.layout.room(self.cache, sequence, wanted)
            if not size:
                sequence.waited += 1
                continue
            chunks.append(self._feed(sequence, size))
            budget -= size
        return chunks

    def _feed(self, sequence: Sequence, size: int) -> Chunk:
        """The next `size` tokens of the sequence as a chunk, with cells taken for them."""
        if sequence.slot is None:
            raise ValueError("an active sequence has a slot")
        start = sequence.n_cached
        self.cache.append(sequence.slot, sequence.tokens[start : start + size])
        return Chunk(sequence, start, start + size, sequence.n_missing == 0)

    def _drop_idle_cells(self) -> None:
        """With many rows running, keeps no more idle tokens than a quarter of what runs."""
        if len(self.active) < BUSY_ROWS or self.layout.isolates:
            return
        idle = sorted(
            (slot for slot in self.cache.slots if not slot.busy and slot.tokens), key=lambda s: s.used_at
        )
        excess = sum(len(slot.tokens) for slot in idle) - sum(s.n_cached for s in self.active) // 4
        for slot in idle[:-1]:
            if excess <= 0:
                break
            excess -= len(slot.tokens)
            self.cache.truncate(slot, 0)

    def _next_to_yield(self) -> Sequence:
        """Of the least urgent, the youngest of the client that has most running. Never the oldest of the
        most urgent, unless it is alone, so that somebody always gets on.
        """
        shares = Counter(s.client for s in self.active)
        return max(self.active, key=lambda s: (s.priority, shares[s.client], s.order))

    def _preempt(self, sequence: Sequence) -> None:
        self._take_out(sequence)
        self.submit(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        """Out of wherever it is; its slot becomes an idle one."""
        for those in (self.active, self.waiting, self.paused):
            if sequence in those:
                those.remove(sequence)
        if slot := sequence.slot:
            self.cache.release(slot)
            sequence.slot, sequence.left = None, (slot, slot.used_at)
        self._leaders.pop(sequence, None)

    def _growth(self, *newcomer: Sequence) -> int | None:
        """The size that those who should run now ask for, a quarter more at least; None where that is had."""
        others = [s for s in self.active + self.waiting if s not in newcomer]
        wanted = [s.n_cached + needed(s) for s in [*newcomer, *others][: self.row_limit.limit]]
        target = self.layout.target(wanted)
        if target <= self.cache.n_cells:
            return None
        return min(max(target, self.cache.n_cells * 5 // 4), self.layout.max_cells)
