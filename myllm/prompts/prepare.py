"""A request → the tokens of its prompt: rendered, tokenised, within the window or refused.

Owns which prompts may lose what when they are too long, and the cutting of texts; `turns.py` leaves out
messages. Knows no llama.cpp, KV cache or process; `template` brings its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from myllm.errors import UsageError
from myllm.prompts.chat import Chat, encode
from myllm.prompts.chat_template import ChatTemplate, Message
from myllm.prompts.fit import answer_room, shortened
from myllm.prompts.lengths import least_tokens, overflow
from myllm.prompts.turns import without_oldest_turns
from myllm.requests import GenRequest
from myllm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt as tokens, how many tokens of the user's text were cut away or how many messages left out to
    make it fit, how many were joined to the one before them, and whether its template ends it within a
    reasoning.
    """

    tokens: list[int]
    dropped_tokens: int = 0
    dropped_messages: int = 0
    joined_messages: int = 0
    in_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt with one text that may be shortened: `assemble` makes the tokens with another in its place."""

    text: str
    fixed_texts: list[str]
    assemble: Callable[[str], list[int]]


def prepare(
    request: GenRequest, tokenizer: Tokenizer, template: ChatTemplate | None, window: int
) -> Prepared:
    """The prompt's tokens, at least one fewer than the `window` holds.

    With `raw` the prompt is tokenised as it stands, control tokens included, as llama-completion
    does. A model without a template gets the messages' bare texts, a line each. Raises
    ContextOverflowError where the prompt does not fit, and BadDataError from the template.
    """
    if request.raw:
        return _fitted(_raw(request, tokenizer), request, tokenizer, window)
    chat = Chat(tokenizer, template)
    messages = request.conversation()
    if request.on_overflow == "turns":
        tokens, n_dropped = without_oldest_turns(messages, chat, tokenizer, request.max_tokens, window)
        prepared = Prepared(tokens, dropped_messages=n_dropped)
    else:
        prepared = _fitted(_with_longest_text(messages, chat), request, tokenizer, window)
    return replace(prepared, joined_messages=chat.n_joined, in_reasoning=chat.ends_in_reasoning(messages[-1]))


def _fitted(prompt: _Prompt, request: GenRequest, tokenizer: Tokenizer, window: int) -> Prepared:
    cut = "error" if request.on_overflow == "turns" else request.on_overflow  # raw prompts have none
    room = 1 if cut == "error" else answer_room(request.max_tokens, window)
    budget = window - room
    least = least_tokens([prompt.text, *prompt.fixed_texts], tokenizer, budget)
    if least <= budget:
        tokens = prompt.assemble(prompt.text)
        if len(tokens) <= budget:
            return Prepared(tokens)
        if cut == "error":
            raise overflow(f"{len(tokens):,} tokens", window)
        return _cut(prompt, cut, len(tokens), tokenizer, window, room)
    if cut == "error":
        raise overflow(f"more than {least:,} tokens", window)
    if (fixed := least_tokens(prompt.fixed_texts, tokenizer, budget)) > budget:
        raise overflow(f"more than {fixed:,} tokens in messages that are never cut", window)
    return _cut(prompt, cut, None, tokenizer, window, room)


def _raw(request: GenRequest, tokenizer: Tokenizer) -> _Prompt:
    if request.system:
        raise UsageError("system: raw prompts have no messages; write it into the prompt")
    return _Prompt(request.prompt or "", [], lambda text: encode([text], tokenizer))


def _with_longest_text(messages: list[Message], chat: Chat) -> _Prompt:
    """A conversation whose longest user message may be shortened."""
    longest = max(
        (i for i, message in enumerate(messages) if message["role"] == "user"),
        key=lambda i: len(messages[i]["content"]),
        default=len(messages) - 1,
    )

    def assemble(text: str) -> list[int]:
        changed = {**messages[longest], "content": text}
        return chat.assemble([*messages[:longest], changed, *messages[longest + 1 :]])

    fixed = [message["content"] for i, message in enumerate(messages) if i != longest]
    return _Prompt(messages[longest]["content"], fixed, assemble)


def _cut(
    prompt: _Prompt, cut: str, whole: int | None, tokenizer: Tokenizer, window: int, room: int
) -> Prepared:
    """The prompt with its text shortened until it fits exactly; `whole` is its count where that is known."""
    budget = window - room
    around = len(prompt.assemble("."))
    keep = budget - around
    while keep > 0:
        text = shortened(
            prompt.text, keep, cut, lambda part: tokenizer.encode(part, special=False), tokenizer.decode
        )
        tokens = prompt.assemble(text)
        if len(tokens) <= budget:
            return Prepared(tokens, _dropped(prompt.text, text, whole, len(tokens), around))
        keep -= len(tokens) - budget
    raise overflow(
        f"{around:,} tokens without the text that may be cut, {room:,} kept for the answer", window
    )


def _dropped(text: str, kept: str, whole: int | None, now: int, around: int) -> int:
    """Tokens cut away: counted, or where the text was too long to count them, by the kept part's density."""
    if whole is not None:
        return max(whole - now, 0)
    return round((len(text) - len(kept)) * max(now - around, 1) / max(len(kept), 1))
