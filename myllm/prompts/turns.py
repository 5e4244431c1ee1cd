"""A conversation → its prompt without the oldest turns, where all of it does not fit the window.

Counts, has `history.py` decide and renders what stays, which has the last word. What is out of reach is not
even counted, so that a conversation of years costs no more than one of hours.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Final

from myllm.prompts.chat import Chat
from myllm.prompts.chat_template import Message
from myllm.prompts.fit import CHARS_PER_TOKEN, answer_room
from myllm.prompts.history import SYSTEM, Counted, fit_history
from myllm.prompts.lengths import least_tokens, overflow
from myllm.tokenizer import Tokenizer

DOT: Final = "."
"""The shortest text of a message."""
REACH_CHARS: Final = 4 * CHARS_PER_TOKEN
"""Characters a token of the budget within which turns are counted at all. A few times what can stay, for when
this reach moves, the beginning may."""


def without_oldest_turns(
    messages: list[Message], chat: Chat, tokenizer: Tokenizer, max_tokens: int | None, window: int
) -> tuple[list[int], int]:
    """The prompt's tokens, and how many messages are not in it; room is kept for an answer of `max_tokens`.

    The newest turn may take of that room what it needs. Raises ContextOverflowError where not even that fits,
    BadDataError from the template.
    """
    budget = window - answer_room(max_tokens, window)
    n_given = len(messages)
    lengths = [Counted(message["role"], len(message["content"])) for message in messages]
    messages = _sent(messages, fit_history(lengths, 0, REACH_CHARS * budget))
    if sum(len(message["content"]) for message in messages) <= CHARS_PER_TOKEN * budget:  # it may fit
        tokens = chat.assemble(messages)
        if len(tokens) <= budget:
            return tokens, n_given - len(messages)
    fixed, counted = _counted(messages, chat, tokenizer, window)
    first = fit_history(counted, fixed, budget)
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=first)
    while True:
        sent = _sent(messages, first)
        least = least_tokens([message["content"] for message in sent], tokenizer, window)
        if least >= window:
            raise overflow(f"more than {least:,} tokens without the turns before", window)
        tokens = chat.assemble(sent)
        if len(tokens) <= budget or first >= last:
            break
        # The counts were a little low. With the rest of it, turns go as if it had been known: not one by one.
        fixed = len(tokens) - sum(counted[i].n_tokens for i in _indices(messages, first))
        first = max(fit_history(counted, fixed, budget), _next_user(messages, first))
    if len(tokens) >= window:
        raise overflow(f"{len(tokens):,} tokens without the turns before", window)
    return tokens, n_given - len(sent)


def _sent(messages: list[Message], first: int) -> list[Message]:
    return [messages[i] for i in _indices(messages, first)]


def _indices(messages: list[Message], first: int) -> list[int]:
    """Of those that are sent where the conversation begins at `first`."""
    return [i for i, message in enumerate(messages) if i >= first or message["role"] in SYSTEM]


def _next_user(messages: list[Message], first: int) -> int:
    """Of the first turn after the one at `first`."""
    return next(i for i, message in enumerate(messages) if i > first and message["role"] == "user")


def _counted(
    messages: list[Message], chat: Chat, tokenizer: Tokenizer, window: int
) -> tuple[int, list[Counted]]:
    """The tokens that the template adds by itself, and the length of each message in its place.

    What stands around a message is told from short conversations. One over the `window` is counted roughly.
    """

    def count(text: str) -> int:
        least = least_tokens([text], tokenizer, window)
        return least if least > window else len(tokenizer.encode(text, special=False))

    def size(*roles: str) -> int:
        return len(chat.assemble([{"role": role, "content": DOT} for role in roles]))

    instructions = [message["role"] for message in takewhile(lambda m: m["role"] in SYSTEM, messages)]
    short, longer = size(*instructions, "user"), size(*instructions, "user", "assistant", "user")
    each = (longer - short + 1) // 2
    around = each - count(DOT)
    fixed = short - each * (len(instructions) + 1)
    return fixed, [Counted(message["role"], count(message["content"]) + around) for message in messages]
