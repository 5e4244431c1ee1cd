"""Windows tile the text, keep the limit, and end at sentences where they can."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from myllm.prompts.windows import Window, cut


def words(text: str) -> list[int]:
    """A token a word, and one for each four characters of a longer one: not additive within words."""
    return [0 for word in re.findall(r"\S+", text) for _ in range(-(-len(word) // 4))]


TEXTS = st.text(
    st.sampled_from("ab .\n!é😀漢") | st.characters(exclude_categories=["Cs"]), max_size=400
) | st.text("ab. \n", max_size=3000)


@given(TEXTS, st.integers(1, 40))
@example("one\n \ntwo", 1)  # a line of no tokens
def test_windows_tile_the_text_and_keep_the_limit(text: str, limit: int) -> None:
    windows = list(cut(text, limit, 0, words))
    assert [window.start for window in windows] == [0, *(window.end for window in windows[:-1])]
    assert windows[-1].end == len(text)
    for window in windows:
        assert window.tokens == words(text[window.start : window.end])
        assert len(window.tokens) <= limit or window.end - window.start == 1


def utf8(text: str) -> list[int]:
    """A token a byte, so that one character may have more than the limit."""
    return list(text.encode())


@given(TEXTS, st.integers(1, 40))
def test_only_a_single_character_may_be_over_the_limit(text: str, limit: int) -> None:
    windows = list(cut(text, limit, 0, utf8))
    assert b"".join(bytes(window.tokens) for window in windows) == text.encode()
    for window in windows:
        assert len(window.tokens) <= limit or window.end - window.start == 1


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


def test_chinese_sentences_end_without_a_space() -> None:
    text = "今天天气很好。我们去公园吧！「好的。」他说明天再去。"
    assert [text[a:b] for a, b, _ in cut(text, 12, 0, lambda part: [0] * len(part))] == [
        "今天天气很好。",
        "我们去公园吧！「好的。」",
        "他说明天再去。",
    ]


def test_no_accent_and_no_joined_emoji_is_torn_apart() -> None:
    family, e_acute = "👩\u200d👩\u200d👧", "e\u0301"
    for text in (family * 40, e_acute * 200, "👍🏽" * 99):
        windows = list(cut(text, 15, 0, lambda part: [0] * len(part)))
        assert len(windows) > 1
        for window in windows:
            part = text[window.start : window.end]
            assert part[0] in "👩e👍"
            assert part[-1] in "👧\u0301🏽"


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
