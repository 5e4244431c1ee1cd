"""What of a text stays when it is too long for the window: decisions on counts, no template or model.

Tokens and characters are brought together only through the two functions a caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

ANSWER_TOKENS: Final = 512
CHARS_PER_TOKEN: Final = 8
"""More than any language averages in any usual vocabulary, so that one look is mostly enough."""

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]


def answer_room(max_tokens: int | None, window: int) -> int:
    """Tokens kept free for the answer when a text is cut: as many as asked for, at most half the window."""
    wanted = min(ANSWER_TOKENS, window // 4) if max_tokens is None else min(max_tokens, window // 2)
    return max(wanted, 1)


def kept_ends(keep: int, cut: str) -> tuple[int, int]:
    """How many of `keep` tokens stay at the front and at the back; `cut` is the part that goes."""
    if cut == "head":
        return 0, keep
    if cut == "tail":
        return keep, 0
    return keep - keep // 2, keep // 2


def shortened(text: str, keep: int, cut: str, encode: Encode, decode: Decode) -> str:
    """`text` without its head, tail or middle: about `keep` tokens, whole characters of the original.

    Only about as much of the text is tokenised as stays, so a huge text costs no more than a long one.
    """
    front, back = kept_ends(keep, cut)
    head = _chars(front, encode, decode, lambda n: text[:n], lambda ids: ids[:front], len(text))
    tail = _chars(back, encode, decode, lambda n: text[-n:], lambda ids: ids[-back:], len(text))
    return text if head + tail >= len(text) else text[:head] + text[len(text) - tail :]


def _chars(
    tokens: int,
    encode: Encode,
    decode: Decode,
    reach: Callable[[int], str],
    keep: Callable[[list[int]], list[int]],
    length: int,
) -> int:
    """How many characters the outermost `tokens` tokens of a text of `length` characters stand for."""
    if tokens <= 0:
        return 0
    chars = tokens * CHARS_PER_TOKEN
    while True:
        ids = encode(reach(chars))
        if len(ids) > tokens:
            # A cut through a character leaves U+FFFD at the edge, which stands for no whole character.
            return min(len(decode(keep(ids)).strip("�")), length)
        if chars >= length:
            return length
        chars *= 4
