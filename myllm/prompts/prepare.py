"""A request → the tokens of its prompt: rendered, tokenised, within the window or refused.

Knows no llama.cpp, KV cache or process; `template` brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from myllm.errors import ContextOverflowError, UsageError
from myllm.prompts.chat_template import ChatTemplate
from myllm.prompts.fit import CHARS_PER_TOKEN, answer_room, shortened
from myllm.prompts.pieces import pieces
from myllm.prompts.spans import SpecialTexts, guard, split
from myllm.requests import GenRequest
from myllm.tokenizer import Tokenizer

COUNTED_CHARS: Final = 256 * 1024
"""A text up to this long is always tokenised as a whole (about 0.2 s) to tell its exact count."""
PART_CHARS: Final = 32 * 1024
CUT_TOKENS: Final = 8
REASONING: Final = "<think>"
"""What opens a reasoning, see `engine/text.py`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt as tokens, how many tokens of the user's text were cut away to make it fit, and whether its
    template ends it within a reasoning.
    """

    tokens: list[int]
    dropped_tokens: int = 0
    in_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt with one text that may be shortened: `assemble` makes the tokens with another in its place."""

    text: str
    fixed_texts: list[str]
    assemble: Callable[[str], list[int]]
    in_reasoning: Callable[[], bool] = lambda: False
    """Whether what was assembled last ends within a reasoning."""


def prepare(
    request: GenRequest, tokenizer: Tokenizer, template: ChatTemplate | None, window: int
) -> Prepared:
    """The prompt's tokens, at least one fewer than the `window` holds.

    With `raw` the prompt is tokenised as it stands, control tokens included, as llama-completion
    does. A model without a template gets the messages' bare texts, a line each. Raises
    ContextOverflowError where the prompt does not fit, and BadDataError from the template.
    """
    prompt = _raw(request, tokenizer) if request.raw else _chat(request, tokenizer, template)
    return replace(_fitted(prompt, request, tokenizer, window), in_reasoning=prompt.in_reasoning())


def _fitted(prompt: _Prompt, request: GenRequest, tokenizer: Tokenizer, window: int) -> Prepared:
    cut = request.on_overflow
    room = 1 if cut == "error" else answer_room(request.max_tokens, window)
    budget = window - room
    least = _least_tokens([prompt.text, *prompt.fixed_texts], tokenizer, budget)
    if least <= budget:
        tokens = prompt.assemble(prompt.text)
        if len(tokens) <= budget:
            return Prepared(tokens)
        if cut == "error":
            raise _overflow(f"{len(tokens):,} tokens", window)
        return _cut(prompt, cut, len(tokens), tokenizer, window, room)
    if cut == "error":
        raise _overflow(f"more than {least:,} tokens", window)
    if (fixed := _least_tokens(prompt.fixed_texts, tokenizer, budget)) > budget:
        raise _overflow(f"more than {fixed:,} tokens in messages that are never cut", window)
    return _cut(prompt, cut, None, tokenizer, window, room)


def _least_tokens(texts: Sequence[str], tokenizer: Tokenizer, enough: int) -> int:
    """A number of tokens that the texts have at least; looked into only as far as to see it is over `enough`.

    First by bytes alone. Where that does not tell, very long texts are counted in parts; a cut between
    parts costs `CUT_TOKENS` at most. White space at the ends is left out: templates trim it.
    """
    long_texts = [text.strip() for text in texts if len(text) > COUNTED_CHARS]
    by_bytes = sum(len(text.encode()) for text in long_texts) // tokenizer.max_piece_bytes
    if by_bytes > enough:
        return by_bytes
    counted = 0
    for text in long_texts:
        if len(text) <= 2 * CHARS_PER_TOKEN * enough:
            continue
        for at in range(0, len(text), PART_CHARS):
            part = text[at : at + PART_CHARS]
            counted += max(len(tokenizer.encode(part, special=True)) - CUT_TOKENS, 0)
            if counted > enough:
                return counted
    return max(by_bytes, counted)


def _raw(request: GenRequest, tokenizer: Tokenizer) -> _Prompt:
    if request.system:
        raise UsageError("system: raw prompts have no messages; write it into the prompt")
    return _Prompt(request.prompt or "", [], lambda text: _encode([text], tokenizer))


def _chat(request: GenRequest, tokenizer: Tokenizer, template: ChatTemplate | None) -> _Prompt:
    messages = request.conversation()
    longest = max(
        (i for i, message in enumerate(messages) if message["role"] == "user"),
        key=lambda i: len(messages[i]["content"]),
        default=len(messages) - 1,
    )

    rendered: list[str] = []

    def assemble(text: str) -> list[int]:
        replaced = [*messages[:longest], {**messages[longest], "content": text}, *messages[longest + 1 :]]
        rendered[:] = _spans(replaced, tokenizer, template)
        return _encode(rendered, tokenizer)

    def in_reasoning() -> bool:
        """Templates of reasoning models write the mark themselves; a message that ends in it is none."""
        ends = template is not None and "".join(rendered).rstrip().endswith(REASONING)
        return ends and not messages[-1]["content"].rstrip().endswith(REASONING)

    fixed = [message["content"] for i, message in enumerate(messages) if i != longest]
    return _Prompt(messages[longest]["content"], fixed, assemble, in_reasoning)


def _spans(messages: list[dict[str, str]], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    if template is None:
        texts, sentinel = guard([m["content"] for m in messages], SpecialTexts(tokenizer.special_tokens), "")
        return split("\n".join(texts), sentinel)
    return template.render(
        messages,
        special_tokens=tokenizer.special_tokens,
        bos=tokenizer.bos_text,
        eos=tokenizer.eos_text,
    )


def _encode(spans: list[str], tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.special_tokens
    tokens = [
        token
        for span in spans
        for piece in pieces(span, special)
        for token in tokenizer.encode(piece, special=True)
    ]
    if tokenizer.add_bos and tokenizer.bos is not None and tokens[:1] != [tokenizer.bos]:
        tokens.insert(0, tokenizer.bos)
    return tokens


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
    raise _overflow(
        f"{around:,} tokens without the text that may be cut, {room:,} kept for the answer", window
    )


def _dropped(text: str, kept: str, whole: int | None, now: int, around: int) -> int:
    """Tokens cut away: counted, or where the text was too long to count them, by the kept part's density."""
    if whole is not None:
        return max(whole - now, 0)
    return round((len(text) - len(kept)) * max(now - around, 1) / max(len(kept), 1))


def _overflow(size: str, window: int) -> ContextOverflowError:
    return ContextOverflowError(
        f"prompt: {size}, the window holds {window:,} with the answer; shorten it, cut it with"
        " --on-overflow head|tail|middle, or load with a larger --context"
    )
