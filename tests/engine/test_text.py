"""Pieces to text: whole characters only, stop strings never leak, reasoning is told apart."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from myllm.engine.text import ReasoningSplitter, TextStream


def split_at(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def run(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    released = [stream.push(piece) for piece in pieces]
    released.append(stream.flush())
    return released, stream.stopped


@given(text=st.text(), cuts=st.lists(st.integers(0, 200)))
@example(text="é🙂", cuts=[1, 3, 4])
def test_text_survives_any_cutting_of_its_bytes(text: str, cuts: list[int]) -> None:
    text = text.encode("utf-8", "replace").decode()
    released, stopped = run(split_at(text.encode(), cuts), [])
    assert "".join(released) == text
    assert not stopped


@given(cuts=st.lists(st.integers(0, 20)))
def test_a_character_is_never_released_in_parts(cuts: list[int]) -> None:
    released, _ = run(split_at("a🙂b".encode(), cuts), [])
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(released)


def test_bytes_that_are_no_character_become_a_replacement_character() -> None:
    assert run([b"a\xff", b"b\xf0\x9f"], [])[0] == [
        "a\N{REPLACEMENT CHARACTER}",
        "b",
        "\N{REPLACEMENT CHARACTER}",
    ]


@given(
    text=st.text("ab\n", max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40)),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    released, stopped = run(split_at(text.encode(), cuts), stop)
    assert not any(s in "".join(released) for s in stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(released) == text
    else:
        # The stop string that is complete first wins, as it would in a stream of single characters or bytes,
        # unless a piece brought several at once: then the one that starts first.
        assert text.startswith("".join(released))


def test_what_may_become_a_stop_string_is_held_back_and_given_back() -> None:
    stream = TextStream(["</end>"])
    assert [stream.push(p) for p in (b"x</e", b"nd", b"y")] == ["x", "", "</endy"]


def split_reasoning(parts: list[str], *, inside: bool = False) -> list[tuple[str, bool]]:
    splitter = ReasoningSplitter(inside=inside)
    pairs = [pair for part in parts for pair in splitter.push(part)] + splitter.flush()
    merged: list[tuple[str, bool]] = []
    for text, thought in pairs:
        if merged and merged[-1][1] == thought:
            merged[-1] = (merged[-1][0] + text, thought)
        else:
            merged.append((text, thought))
    return merged


def test_reasoning_is_told_from_the_answer_even_when_its_marks_are_cut() -> None:
    whole = "<think>\nhm</think>\n\nYes <think>."
    expected = [("\nhm", True), ("Yes <think>.", False)]
    assert split_reasoning([whole]) == expected
    assert split_reasoning(list("<think>\nhm</think>")) == [("\nhm", True)]
    assert split_reasoning(["so", "</th", "ink>", "ok"], inside=True) == [("so", True), ("ok", False)]


def test_an_answer_that_only_mentions_the_mark_is_an_answer() -> None:
    assert split_reasoning(["a <think> b"]) == [("a <think> b", False)]
    assert split_reasoning(["<thi"]) == [("<thi", False)]
