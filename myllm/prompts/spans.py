"""Keeps message text from becoming control tokens: where to break it, and spans of what was rendered.

A control token's text (`<|im_end|>`) is read as that token wherever it stands in a rendered
prompt. So a sentinel character goes into each such text inside a message before rendering, and
the rendered prompt is split there: spans are tokenised one by one, and no token reaches across a
border. A prompt without such text is one span and is tokenised as ever. This works with tokenizers
whose plain merges can also reach a control token (SentencePiece builds `</s>` out of `</` and `s>`,
even with parsing of special tokens off).

Pure: no template, tokenizer or process here. Out of reach is a template that itself deletes
characters from the middle of a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Final

from myllm.errors import BadDataError

NONCHARACTERS: Final = range(0xFDD0, 0xFDF0)
"""Code points that Unicode keeps for a program's own use and never assigns (The Unicode Standard, 23.7)."""
PRIVATE_USE: Final = range(0x100000, 0x10FFFE)
REPLACEMENT: Final = "�"
SPACE_MARK: Final = "▁"
"""SentencePiece's stand-in for a space: a token with it in its text is matched by a real space too."""


class SpecialTexts:
    """The texts of a model's control tokens, made ready to be looked for in messages.

    Letters match in either case, so that a template which changes case cannot complete one.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        variants = {v.lower() for t in texts for v in (t, t.replace(SPACE_MARK, " ")) if v}
        # There is no room for a sentinel inside one character; white space stays, prompts need it.
        single = [t for t in variants if len(t) == 1 and not t.isspace()]
        self._single = {ord(c): REPLACEMENT for t in single for c in {t, *t.upper()}}
        longer = sorted(t for t in variants if len(t) > 1)
        self._starts = re.compile(_any_of(longer), re.IGNORECASE) if longer else None
        self._heads = {t[:i] for t in longer for i in range(1, len(t))}
        self._tails = {t[i:] for t in longer for i in range(1, len(t))}
        self._inner = [t[1:-1] for t in longer if len(t) > 2]
        self._longest = max(map(len, longer), default=0)

    def without_single(self, content: str) -> str:
        """`content` with each control token of one character replaced by U+FFFD."""
        return content.translate(self._single) if self._single else content

    def breaks(self, content: str) -> list[int]:
        """Positions in `content`, ascending, where no token may join the text before and after.

        Inside every control token's text, and at an end that the text beside it could complete to
        one. Ends are looked at without white space, which many templates trim.
        """
        if self._starts is None or not content:
            return []
        found = {match.start() + 1 for match in self._starts.finditer(content)}
        core = content.strip() or content
        start = content.index(core)
        edge = core[: self._longest].lower(), core[-self._longest :].lower()
        lengths = range(1, min(self._longest, len(core) + 1))
        if any(edge[0][:n] in self._tails for n in lengths) or self._is_inner(core):
            found.add(start)
        if any(edge[1][-n:] in self._heads for n in lengths):
            found.add(start + len(core))
        return sorted(found)

    def _is_inner(self, core: str) -> bool:
        return len(core) < self._longest - 1 and any(core.lower() in inner for inner in self._inner)


def guard(contents: Sequence[str], special: SpecialTexts, template: str) -> tuple[list[str], str | None]:
    """The contents with a sentinel at each break, and the sentinel; None where nothing had to be broken.

    Raises BadDataError where no character is left to serve as the sentinel.
    """
    contents = [special.without_single(content) for content in contents]
    breaks = [special.breaks(content) for content in contents]
    if not any(breaks):
        return contents, None
    sentinel = _unused([template, *contents])
    return [_insert(text, at, sentinel) for text, at in zip(contents, breaks, strict=True)], sentinel


def split(rendered: str, sentinel: str | None) -> list[str]:
    """The spans of a rendered prompt, in order; joined they are the prompt."""
    return [span for span in rendered.split(sentinel) if span] if sentinel else [rendered] * bool(rendered)


def _insert(text: str, positions: list[int], sentinel: str) -> str:
    edges = [0, *positions, len(text)]
    return sentinel.join(text[a:b] for a, b in pairwise(edges))


def _unused(texts: list[str]) -> str:
    used = set().union(*texts)
    for code in chain(NONCHARACTERS, PRIVATE_USE):
        if chr(code) not in used:
            return chr(code)
    raise BadDataError("prompt: it holds every private character of Unicode; take some of them out")


def _any_of(texts: list[str]) -> str:
    """A regular expression that finds every place where one of the sorted `texts` starts.

    A trie: a few thousand alternatives cost a look at the next character, not a try each. Only the
    first character is consumed, so that overlapping texts are all found.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[0], []).append(text[1:])
    return "|".join(re.escape(first) + f"(?={_trie(rest)})" for first, rest in groups.items())


def _trie(texts: list[str]) -> str:
    if "" in texts:  # a text ends here: that one starts here is all there is to know
        return ""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _trie(rest) for first, rest in groups.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
