"""How long texts are in tokens, looked into only as far as it takes to know that they are too long.

Owns the limits up to which texts are tokenised as a whole, and what is said of a prompt over the window. Must
not know templates, nor what is done about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from myllm.errors import ContextOverflowError
from myllm.prompts.fit import CHARS_PER_TOKEN
from myllm.tokenizer import Tokenizer

COUNTED_CHARS: Final = 256 * 1024
"""A text up to this long is always tokenised as a whole (about 0.2 s) to tell its exact count."""
PART_CHARS: Final = 32 * 1024
CUT_TOKENS: Final = 8


def least_tokens(texts: Sequence[str], tokenizer: Tokenizer, enough: int) -> int:
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


def overflow(size: str, window: int) -> ContextOverflowError:
    """What is raised for a prompt of `size`, a number of tokens in words."""
    return ContextOverflowError(
        f"prompt: {size}, the window holds {window:,} with the answer; shorten it, cut it with"
        " --on-overflow head|tail|middle|turns, or load with a larger --context"
    )
