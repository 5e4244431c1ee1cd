"""Long texts in pieces: the same text, cut only where tokens do not join, or in absurd runs."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from myllm.prompts.pieces import RUN_CHARS, SHORT_CHARS, pieces

SPECIAL = ["<s>", "<|im_end|>"]


@given(st.lists(st.sampled_from(["a " * 9000, "<s>", "<|im_end|>x" * 2000, "x" * 60_000, "\n"]), max_size=12))
def test_pieces_joined_are_the_text_and_begin_at_control_tokens(parts: list[str]) -> None:
    text = "".join(parts)
    found = pieces(text, SPECIAL)
    assert "".join(found) == text
    at = 0
    for before, piece in pairwise(found):
        at += len(before)
        long_run = not any(c.isspace() for c in text[at - RUN_CHARS : at])
        assert piece.startswith(tuple(SPECIAL)) or long_run
        assert not any((before[-n:] + piece[:m]) in SPECIAL for n in range(1, 10) for m in range(1, 10))


def test_no_piece_holds_many_control_tokens() -> None:
    """Control tokens in one text cost quadratic time in llama.cpp."""
    text = "<s>" * 1_000_000
    found = pieces(text, SPECIAL)
    assert max(map(len, found)) < SHORT_CHARS + 10
    assert len(found) < 400


def test_a_run_full_of_control_tokens_is_not_cut_inside_one() -> None:
    found = pieces("<|im_end|>x" * 30_000, SPECIAL)
    assert all(piece.startswith("<|im_end|>") for piece in found)


def test_no_piece_holds_a_run_that_overflows_the_stack() -> None:
    for run in ("a", " ", "漢"):
        assert max(map(len, pieces("x " + run * 1_000_000, []))) <= RUN_CHARS + 2


def test_long_prose_is_one_piece() -> None:
    assert len(pieces("It was a dark night; <b>rain</b> fell.\n" * 50_000, SPECIAL)) == 1
