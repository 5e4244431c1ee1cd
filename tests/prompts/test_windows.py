"""Windows tile the text, keep the limit, and end at sentences where they can."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from myllm.prompts.windows import Window, cut


def words(text: str) -> list[int]:
    """A token a word, and one for each four characters of a longer one: not additive within words."""
    return [0 for word in re.findall(r"\S+", text) for _ in range(-(-len(word) // 4))]


TEXTS = st.text(
    st.sampled_from("ab .\n!é😀漢") | st.characters(exclude_categories=["Cs"]), max_size=400
) | st.text("ab. \n", max_size=3000)


@given(TEXTS, st.integers(1, 40))
def test_windows_tile_the_text_and_keep_the_limit(text: str, limit: int) -> None:
    windows = list(cut(text, limit, 0, words))
    assert [window.start for window in windows] == [0, *(window.end for window in windows[:-1])]
    assert windows[-1].end == len(text)
    for window in windows:
        assert window.tokens == words(text[window.start : window.end])
        assert len(window.tokens) <= limit or window.end - window.start <= 32


@given(TEXTS, st.integers(2, 40), st.data())
def test_overlapping_windows_leave_no_gap_and_get_on(text: str, limit: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, limit - 1))
    windows = list(cut(text, limit, overlap, words))
    assert (windows[0].start, windows[-1].end) == (0, len(text))
    for before, after in pairwise(windows):
        assert before.start < after.start <= before.end < after.end
        assert len(words(text[after.start : before.end])) <= overlap


def test_windows_end_at_sentences() -> None:
    text = "One two three four. Five six. Seven eight nine ten eleven. Twelve."
    ends = [text[: window.end].rstrip()[-1] for window in cut(text, 10, 0, words)]
    assert len(ends) > 1
    assert set(ends) == {"."}


def test_an_empty_text_is_one_empty_window() -> None:
    assert list(cut("", 10, 0, words)) == [Window(0, 0, [])]


def test_a_megabyte_without_a_space_is_cut_all_the_same() -> None:
    windows = list(cut("x" * 1_000_000, 100, 0, words))
    assert windows[-1].end == 1_000_000
    assert max(len(window.tokens) for window in windows) <= 100


def test_tokens_of_a_whole_that_are_more_than_of_its_parts_shorten_the_window() -> None:
    def jealous(text: str) -> list[int]:
        n_words = len(text.split())
        return [0] * (n_words + (n_words > 5) * 3)

    windows = list(cut("a " * 50, 8, 0, jealous))
    assert max(len(window.tokens) for window in windows) <= 8
    assert windows[-1].end == 100
