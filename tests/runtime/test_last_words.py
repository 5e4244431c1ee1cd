"""What a user reads when a worker died."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.runtime.last_words import KEPT_BYTES, LastWords, how_it_ended


def test_the_last_lines_are_joined_and_earlier_ones_left_out() -> None:
    words = LastWords()
    words.hear(b"one\ntwo\n\nthree\n  fo")
    words.hear(b"ur\n")
    assert str(words) == "two | three | four"


@given(st.lists(st.binary(max_size=300)))
def test_any_bytes_become_one_short_printable_line(pieces: list[bytes]) -> None:
    words = LastWords()
    for piece in pieces:
        words.hear(piece)
    assert str(words).isprintable()
    assert len(str(words)) <= 400


def test_a_flood_keeps_its_end_and_no_more() -> None:
    words = LastWords()
    for number in range(100):
        words.hear(b"%d" % number * KEPT_BYTES)
    assert len(words._data) == KEPT_BYTES
    assert str(words).endswith("99")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (3 << 8, "ended with exit status 3"),
        (0, "ended with exit status 0"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (signal.SIGKILL, "was killed by SIGKILL, perhaps for want of memory"),
        (
            signal.SIGILL,
            "was killed by SIGILL: this processor cannot run llama.cpp as it was built; see README.md, "
            "An illegal instruction",
        ),
        (33, "was killed by signal 33"),
        (None, "ended"),
    ],
)
def test_a_wait_status_in_words(status: int | None, text: str) -> None:
    assert how_it_ended(status) == text
