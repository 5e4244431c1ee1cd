"""Long texts cut into pieces that a tokenizer takes one after the other without harm.

Owns where a cut changes no token, or next to none. Must not know templates, windows or llama.cpp, of whose
tokenizers two things grow badly with one long text (measured, 0.3.36):
- Control tokens: each one found walks the list of fragments before it (`tokenizer_st_partition`),
  16,000 in one text take 1.1 s, 60,000 take 20 s. A text can be cut before a control token without
  changing a token, for the fragments around it are tokenised apart anyway.
- Long runs: vocabularies that fall back on std::regex (deepseek, tekken, gpt-4o, falcon, bloom, …)
  use about 330 bytes of stack a character in a run of one kind, and end the process at about
  26,000 characters on 8 MiB. Such a run is no prose: one cut in 100,000 characters changes a token
  or two. A piece may still take 33 MB, so that whoever tokenises has a deep stack (`worker/intake.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

SHORT_CHARS: Final = 8 * 1024
RUN_CHARS: Final = 100_000
# The looks behind let only the start of a run be tried, which keeps the search linear.
_LONG_RUN: Final = re.compile(rf"(?<!\S)\S{{{RUN_CHARS},}}|(?<!\s)\s{{{RUN_CHARS},}}")


def pieces(text: str, special_tokens: Sequence[str]) -> list[str]:
    """The pieces of `text` in order, mostly one; joined they are the text."""
    if len(text) <= SHORT_CHARS:
        return [text]
    return [
        piece
        for part in _split_at(text, _before_control_tokens(text, special_tokens))
        for piece in _split_at(part, _inside_long_runs(part))
    ]


def _split_at(text: str, cuts: list[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


def _before_control_tokens(text: str, special_tokens: Sequence[str]) -> list[int]:
    """Places before a control token, `SHORT_CHARS` apart or the next one after that."""
    if not special_tokens:
        return []
    cuts, last = [], 0
    for match in re.finditer("|".join(map(re.escape, special_tokens)), text):
        if match.start() - last >= SHORT_CHARS:
            last = match.start()
            cuts.append(last)
    return cuts


def _inside_long_runs(part: str) -> list[int]:
    """Places in runs only; a part has control tokens in its first `SHORT_CHARS` alone, so none is cut."""
    return [
        cut
        for run in _LONG_RUN.finditer(part)
        for cut in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS)
    ]
