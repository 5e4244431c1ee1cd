"""A text → windows that a model can take in whole: cut at sentences, lines or words where possible.

Pure. Owns where a text may be cut and that windows tile it: the first begins at 0, the last ends at
its end, and without overlap each begins where the one before ended. Must not know a tokenizer's
algorithm: token counts of pieces need not add up, so every window is counted again as a whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

Encode = Callable[[str], list[int]]
"""Text → token ids, without the model's own tokens around it."""

_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])[」』”’）]*\s*|\n+")
"""What separates sentences and lines; it stays with the text before it. Chinese and Japanese ones end
without white space."""
_WORD: Final = re.compile(r"\S*\s+|\S+")
CHARS_PER_TOKEN: Final = 256
MOST_AT_ONCE: Final = 65_536
"""Characters that may be counted as a whole: more of them a token than the above are no text that would
fit, and llama.cpp's tokenizer recurses on long runs."""
_HARD_CUT: Final = 32
"""Characters of a piece of a long word."""
_ZERO_WIDTH_JOINER: Final = "\u200d"


class Window(NamedTuple):
    """`text[start:end]`, in characters, as `tokens`, without the model's own tokens around it."""

    start: int
    end: int
    tokens: list[int]


def cut(text: str, limit: int, overlap: int, encode: Encode) -> Iterator[Window]:
    """The windows of `text`: at most `limit` tokens each, about `overlap` of them the end of the one before.

    An empty text is one empty window. `limit` is at least 1; a single character of more tokens than
    that is a window over the limit, which the caller refuses.
    """
    tokens = encode(text) if len(text) <= _most(limit) else None
    if tokens is not None and len(tokens) <= limit:
        yield Window(0, len(text), tokens)
        return
    pieces = list(_pieces(text, limit, encode))
    first = done = 0
    while done < len(pieces):
        last = _fitting(text, pieces, first, _reach(pieces, first, limit), limit, encode)
        if last <= done:  # what is shared leaves no room for anything new
            first = done
            continue
        start, end = pieces[first].start, pieces[last - 1].end
        yield Window(start, end, encode(text[start:end]))
        first, done = _back(pieces, first, last, overlap), last


class _Piece(NamedTuple):
    """Text up to `end`, of `n_tokens` when it stands alone; `sentence` if one ends here."""

    start: int
    end: int
    n_tokens: int
    sentence: bool


def _most(limit: int) -> int:
    return min(limit * CHARS_PER_TOKEN, MOST_AT_ONCE)


def _pieces(text: str, limit: int, encode: Encode) -> Iterator[_Piece]:
    """Sentences where they fit `limit`, else words, else runs of characters; they tile the text."""
    for start, end in _split(text, 0, len(text), _SENTENCE):
        count = len(encode(text[start:end])) if end - start <= _most(limit) else limit + 1
        if count <= limit:
            yield _Piece(start, end, count, sentence=True)
            continue
        for a, b in _words(text, start, end):
            for piece in _fragments(text, a, b, limit, encode):
                yield piece._replace(sentence=piece.end == end)


def _fragments(text: str, start: int, end: int, limit: int, encode: Encode) -> Iterator[_Piece]:
    """`text[start:end]` halved until every part fits `limit`, or is one character."""
    count = len(encode(text[start:end]))
    if count <= limit or end - start == 1:
        yield _Piece(start, end, count, sentence=False)
        return
    middle = _cut_before((start + end) // 2, text, start)
    yield from _fragments(text, start, middle, limit, encode)
    yield from _fragments(text, middle, end, limit, encode)


def _split(text: str, start: int, end: int, separator: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    for match in separator.finditer(text, start, end):
        yield start, match.end()
        start = match.end()
    if start < end:
        yield start, end


def _words(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _WORD.finditer(text, start, end):
        at, word_end = match.span()
        while word_end - at > _HARD_CUT:
            cut_at = _cut_before(at + _HARD_CUT, text, at)
            yield at, cut_at
            at = cut_at
        yield at, word_end


def _cut_before(at: int, text: str, start: int) -> int:
    """The last place after `start` and up to `at` where no accent or joined emoji is torn off; else `at`."""
    place = at
    while place > start and _belongs_together(text, place):
        place -= 1
    return place if place > start else at


def _belongs_together(text: str, at: int) -> bool:
    """Whether what is before and after `at` is one character to a reader."""
    after = text[at]
    return (
        unicodedata.category(after)[0] == "M"  # accents, vowel signs, variation selectors
        or _ZERO_WIDTH_JOINER in (after, text[at - 1])
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
    )


def _reach(pieces: Sequence[_Piece], first: int, limit: int) -> int:
    """One past the last piece of a window from `first`; at a sentence's end if that is far enough."""
    total, last, sentence = 0, first, None
    while last < len(pieces) and (last == first or total + pieces[last].n_tokens <= limit):
        total += pieces[last].n_tokens
        last += 1
        if pieces[last - 1].sentence and total * 2 >= limit:
            sentence = last
    return last if last == len(pieces) or sentence is None else sentence


def _fitting(text: str, pieces: Sequence[_Piece], first: int, last: int, limit: int, encode: Encode) -> int:
    """`last`, or as far before it as it takes for the pieces from `first` to be at most `limit` tokens."""
    while last > first + 1:
        n_tokens = len(encode(text[pieces[first].start : pieces[last - 1].end]))
        if n_tokens <= limit:
            break
        last = max(first + 1, last - max(1, (n_tokens - limit) * (last - first) // n_tokens))
    return last


def _back(pieces: Sequence[_Piece], first: int, last: int, overlap: int) -> int:
    """Where the next window begins: as many pieces back from `last` as `overlap` tokens hold."""
    at, shared = last, 0
    if not overlap:  # or blank pieces, which have no tokens, would be in two windows
        return at
    while at - 1 > first and shared + pieces[at - 1].n_tokens <= overlap:
        at -= 1
        shared += pieces[at].n_tokens
    return at
