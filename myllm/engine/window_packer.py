"""Which windows of texts share a batch, and whose come next.

Pure. Must not know llama.cpp, vectors, clocks or texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from myllm.engine.text_vectors import TextVectors


class WaitingWindow(NamedTuple):
    """A window that has no vector yet; `turn` says when it is due, among those as urgent."""

    owner: TextVectors
    item: int
    chunk: int
    tokens: list[int]
    turn: int = 0


class WindowPacker:
    """Windows that wait, the urgent first, in batches as full as a look ahead makes them.

    Clients share the batches evenly: a window's turn comes when its client's windows before it, as urgent,
    are paid for in tokens, counted from where the queue stood when they came (start-time fair queueing:
    Goyal, Vin and Cheng, 1996). Turns of a window each would not be even, which an arrival is promised:
    one window may have fifty times another's tokens.
    """

    LOOK_AHEAD = 64
    """Windows behind the first that may go before it, to fill a batch that has no room for it."""

    def __init__(self, n_tokens: int = 0, n_sequences: int = 0) -> None:
        self.n_tokens, self.n_sequences = n_tokens, n_sequences
        self._waiting: deque[WaitingWindow] = deque()
        self._now: dict[int, int] = {}
        """By priority, the turn of the last batch's first window."""
        self._next: dict[tuple[int, int], int] = {}
        """By priority and client, the turn of its next window."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, windows: Sequence[WaitingWindow]) -> None:
        """Behind those of the same client that came before and are as urgent."""
        if not self._waiting:  # all are even
            self._now, self._next = {}, {}
        waiting = [*self._waiting, *map(self._with_turn, windows)]
        self._waiting = deque(sorted(waiting, key=lambda w: (w.owner.request.priority, w.turn)))

    def _with_turn(self, window: WaitingWindow) -> WaitingWindow:
        owner = window.owner
        key = owner.request.priority, owner.arrival.client
        turn = max(self._next.get(key, 0), self._now.get(key[0], 0))
        self._next[key] = turn + len(window.tokens)
        return window._replace(turn=turn)

    def drop(self, owner: TextVectors) -> list[WaitingWindow]:
        """Takes out what is left of a request, which its client has not had; it may be added again."""
        left = [w for w in self._waiting if w.owner is owner]
        self._waiting = deque(w for w in self._waiting if w.owner is not owner)
        if left:
            self._next[owner.request.priority, owner.arrival.client] -= sum(
                len(window.tokens) for window in left
            )
        return left

    def next_batch(self, most: int | None = None) -> list[WaitingWindow]:
        """The windows of the next batch; the oldest is always one of them, whatever its length.

        Within `most` tokens, or the batch's size, and its number of sequences.
        """
        room = min(self.n_tokens, most or self.n_tokens)
        batch: list[WaitingWindow] = []
        passed: list[WaitingWindow] = []
        while self._waiting and len(batch) < self.n_sequences and len(passed) < self.LOOK_AHEAD and room > 0:
            window = self._waiting.popleft()
            if batch and len(window.tokens) > room:
                passed.append(window)
                continue
            if not batch:
                self._now[window.owner.request.priority] = window.turn
            batch.append(window)
            room -= len(window.tokens)
        self._waiting.extendleft(reversed(passed))
        return batch
