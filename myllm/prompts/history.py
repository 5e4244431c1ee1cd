"""What of a conversation is sent when it is too long for the window: decisions on counts, no text.

Pure. Owns where a conversation begins, and that this place stays for many turns: were it another one at
each turn, the engine would have to read everything again each time. Nothing is remembered between two turns,
as the place follows from the counts. Must not know how messages are counted, rendered or kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

SYSTEM: Final = ("system", "developer")
"""The roles of instructions, which always stay."""


class Counted(NamedTuple):
    """A message's role, and its length in tokens as rendered in its place."""

    role: str
    n_tokens: int


def fit_history(messages: Sequence[Counted], fixed: int, budget: int) -> int:
    """The index from which on messages are sent; before it only those of `SYSTEM` are.

    With the `fixed` tokens that a template adds by itself they are at most `budget` tokens, but the last user
    message and what follows it stay in any case. What is sent begins with a user message, so that answers
    keep their questions, and results of tools the calls.

    Turns are dropped when the budget is overstepped and not before, and then enough of them for some time to
    come. To know when that was, the conversation is gone through as it was had. What is no longer sent has no
    say in what follows: without it, the rest is fitted alike.
    """
    before = [0, *accumulate(0 if message.role in SYSTEM else message.n_tokens for message in messages)]
    users: list[int] = []
    first = 0
    for i, message in enumerate(messages):
        if message.role in SYSTEM:
            fixed += message.n_tokens
        elif message.role == "user":
            users.append(i)
        size = fixed + before[i + 1] - before[first]
        if size > budget and users and _was_prompt(messages, i):
            enough = before[first] + size - _after_a_drop(fixed, budget)
            at = bisect_left(users, enough, key=before.__getitem__)
            first = users[min(at, len(users) - 1)]
    return first


def _was_prompt(messages: Sequence[Counted], last: int) -> bool:
    """Whether the messages up to `last` were sent, or are to be: an answer follows, or nothing."""
    if last + 1 == len(messages):
        return True
    return messages[last].role != "assistant" and messages[last + 1].role == "assistant"


def _after_a_drop(fixed: int, budget: int) -> int:
    """Tokens that are left at most when turns have been dropped: three quarters of the budget, or where
    instructions fill most of that, half of what they leave."""
    return max(budget * 3 // 4, (fixed + budget) // 2)
