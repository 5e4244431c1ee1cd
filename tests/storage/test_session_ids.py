"""How ids are spelled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from myllm.storage.session_ids import LENGTH, SHORTEST_PREFIX, number_after, parsed, prefix_span, written

numbers = st.integers(0, 2**50 - 1)


@given(numbers)
def test_an_id_is_read_as_it_was_written(number: int) -> None:
    assert len(written(number)) == LENGTH
    assert parsed(written(number)) == parsed(written(number).upper()) == number


@given(numbers, numbers)
def test_ids_sort_as_their_numbers(one: int, other: int) -> None:
    assert (written(one) < written(other)) == (one < other)


@given(numbers, numbers, st.integers(SHORTEST_PREFIX, LENGTH))
def test_a_prefix_spans_the_ids_that_begin_so(one: int, other: int, length: int) -> None:
    prefix = written(one)[:length]
    span = prefix_span(prefix)
    assert span is not None
    assert (span[0] <= other <= span[1]) == written(other).startswith(prefix)


@given(st.text(max_size=12))
def test_any_text_may_be_asked_for(text: str) -> None:
    assert parsed(text) is None or len(text) == LENGTH


def test_seven_characters_tell_what_was_made_in_different_seconds_apart() -> None:
    first = number_after(0, 1_700_000_000)
    assert written(first)[:7] != written(number_after(first, 1_700_000_001))[:7]


@given(numbers, st.floats(-1e18, 1e18))
def test_a_later_number_is_greater_whatever_the_clock_says(last: int, seconds: float) -> None:
    assert number_after(last, seconds) > last
