"""What of a text stays when it must be shortened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.prompts.fit import answer_room, kept_ends, shortened


def encode(text: str) -> list[int]:
    """Three bytes are a token, so that tokens cut characters."""
    data = text.encode()
    return [int.from_bytes(b"\1" + data[i : i + 3]) for i in range(0, len(data), 3)]


def decode(tokens) -> str:
    return b"".join(t.to_bytes(t.bit_length() // 8 + 1)[1:] for t in tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("max_tokens", "window", "room"),
    [(None, 8192, 512), (None, 400, 100), (100, 8192, 100), (9999, 400, 200), (0, 400, 1), (None, 2, 1)],
)
def test_room_is_kept_for_the_answer(max_tokens, window, room) -> None:
    """As many tokens as asked for, but never more than half the window; 512 or a quarter unasked."""
    assert answer_room(max_tokens, window) == room


def test_the_cut_names_what_goes() -> None:
    assert kept_ends(9, "head") == (0, 9)
    assert kept_ends(9, "tail") == (9, 0)
    assert kept_ends(9, "middle") == (5, 4)


@given(st.text(max_size=400), st.integers(1, 60), st.sampled_from(["head", "tail", "middle"]))
def test_a_shortened_text_is_ends_of_the_original(text: str, keep: int, cut: str) -> None:
    """Whole characters of the original in order, of about `keep` tokens; nothing is invented."""
    short = shortened(text, keep, cut, encode, decode)
    if len(encode(text)) <= keep and cut != "middle":
        assert short == text
    assert len(encode(short)) <= keep + 3
    front = next((n for n in range(len(short), -1, -1) if text.startswith(short[:n])), 0)
    if cut == "tail":
        assert front == len(short)
    elif cut == "head":
        assert text.endswith(short)
    else:
        assert text.endswith(short[front:])


def test_only_what_stays_is_tokenised() -> None:
    """Twenty million characters cost no more than the few that are kept."""
    seen = []

    def counting(text: str) -> list[int]:
        seen.append(len(text))
        return encode(text)

    short = shortened("0123456789" * 2_000_000, 100, "middle", counting, decode)
    assert 295 <= len(short) <= 300
    assert short.startswith("0123456789" * 14)
    assert short.endswith("0123456789" * 14)
    assert sum(seen) < 2000
