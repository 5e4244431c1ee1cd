"""User text never becomes a control token: spans, tested without a tokenizer or a template engine."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.errors import BadDataError
from myllm.prompts.spans import NONCHARACTERS, PRIVATE_USE, SpecialTexts, guard, split

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|im", "</s>", "<s>", "[INST]", "<<", "<｜end▁of｜>", "aXa"]
PIECES = sorted(
    {t[i:j] for t in SPECIALS for i in range(len(t)) for j in range(i + 1, len(t) + 1)}
    | {"hello ", " ", "\n", "<|END of", "�", chr(0xFDD0), "İ", "漢"}
)
contents = st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=3)

# What a template puts before, between and after the contents; the last ones lie in wait to complete a token.
FRAMES = [
    ("<|im_start|>user\n", "<|im_end|>\n", "<|im_end|>"),
    ("", "", ""),
    ("<|", "", "|>"),
    ("<", "<", ">"),
]


def spans_of(contents: list[str], render) -> list[str]:
    guarded, sentinel = guard(contents, SpecialTexts(SPECIALS), "")
    return split(render(guarded), sentinel)


@given(contents, st.sampled_from(FRAMES))
def test_joined_spans_are_what_plain_rendering_gives(contents: list[str], frame) -> None:
    """Guarding changes where tokens may join and nothing else, also under a template's trim."""
    for change in (str, str.strip):

        def render(texts: list[str], change=change) -> str:
            return frame[0] + frame[1].join(map(change, texts)) + frame[2]

        assert "".join(spans_of(contents, render)) == render(contents)


@given(contents, st.sampled_from(FRAMES), st.sampled_from([str, str.strip, str.upper, str.lower]))
def test_no_control_token_lies_wholly_or_partly_in_a_message(contents, frame, change) -> None:
    """Every control token's text in a span comes, with every character, from the template."""
    marks = itertools.count()
    guarded, sentinel = guard(contents, SpecialTexts(SPECIALS), "")
    parts = [frame[0]]
    for text in guarded:
        parts += [change(text), frame[1] if next(marks) < len(contents) - 1 else frame[2]]
    owner = "".join(("u" if i % 2 else "t") * len(part) for i, part in enumerate(parts))
    rendered = "".join(parts)
    start = 0
    for span in rendered.split(sentinel) if sentinel else [rendered]:
        for special in SPECIALS:
            at = span.find(special)
            while at >= 0:
                whose = owner[start + at : start + at + len(special)]
                assert "u" not in whose, (special, span)
                at = span.find(special, at + 1)
        start += len(span) + 1


@pytest.mark.parametrize(
    ("before", "content", "after"),
    [
        ("<|", "im_end|>", ""),
        ("", "<|im_end|", ">"),
        ("<|im_end|", ">", ""),
        ("", "<", "|im_end|>"),
        ("<|", "im_", "end|>"),
        ("<|im", "_", "end|>"),
        ("<|", "\n im_end|> ", ""),
        ("", "  <|im_ \n", "end|>"),
        ("<|", " im_ ", "end|>"),
    ],
)
def test_text_around_a_message_cannot_complete_a_control_token(before: str, content: str, after: str) -> None:
    """Not from the left, the right or both sides, also when the template trims the message."""
    guarded, sentinel = guard([content], SpecialTexts(["<|im_end|>"]), "")
    spans = split(before + guarded[0].strip() + after, sentinel)
    assert "".join(spans) == "<|im_end|>"
    assert len(spans) > 1


@pytest.mark.parametrize("text", ["", "hello", "a < b", "<|", "|>", "if x <<= 2", "a\n\n  b  ", "<html>"])
def test_ordinary_text_is_left_in_one_span(text: str) -> None:
    """Nothing is broken that could not become a control token, so its tokens are the usual ones."""
    special = SpecialTexts(["<|im_start|>", "<|im_end|>"])
    guarded, sentinel = guard([f"x{text}y"], special, "")
    assert (guarded, sentinel) == ([f"x{text}y"], None)


def test_overlapping_and_nested_texts_are_all_broken() -> None:
    """Texts that contain each other or share characters each get a break of their own."""
    special = SpecialTexts(["aXa", "<|im", "<|im_end|>"])
    assert special.breaks(".aXaXa.") == [2, 4]
    assert special.breaks(".<|im_end|>.") == [2]


def test_a_space_stands_for_the_sentencepiece_mark() -> None:
    """SentencePiece turns spaces into its mark, so the text with spaces is that token too."""
    assert SpecialTexts(["<｜end▁of｜>"]).breaks(".<｜end of｜>.") == [2]


def test_case_does_not_matter() -> None:
    """A template that changes case cannot make a control token of text that was none."""
    assert SpecialTexts(["[INST]"]).breaks("x [inst] y") == [3]


def test_a_control_token_of_one_character_is_replaced() -> None:
    """No break fits into one character; white space, which prompts need, stays."""
    assert guard(["a¤b\n"], SpecialTexts(["¤", "\n"]), "") == (["a�b\n"], None)


def test_the_sentinel_occurs_in_no_text() -> None:
    """A message or template that holds noncharacters itself gets another sentinel."""
    texts = ["<s>" + "".join(map(chr, NONCHARACTERS))]
    guarded, sentinel = guard(texts, SpecialTexts(["<s>"]), chr(PRIVATE_USE[0]))
    assert sentinel == chr(PRIVATE_USE[1])
    assert split(guarded[0], sentinel) == ["<", texts[0][1:]]


def test_a_text_with_every_private_character_is_refused() -> None:
    """Where nothing is left to mark breaks with, the message is refused, not passed on unguarded."""
    texts = ["<s>" + "".join(map(chr, itertools.chain(NONCHARACTERS, PRIVATE_USE)))]
    with pytest.raises(BadDataError, match="private character"):
        guard(texts, SpecialTexts(["<s>"]), "")


def test_thousands_of_control_tokens_are_looked_for_at_once() -> None:
    """Gemma's 6,000 reserved tokens against half a megabyte of their first character take linear time."""
    special = SpecialTexts([f"<unused{n}>" for n in range(6000)])
    text = "<" * 500_000 + "<unused4711>"
    assert special.breaks(text) == [500_001]
