"""In which order answers go out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from myllm.cli.ordering import AsTheyEnd, InOrder

Piece = tuple[int, bytes, bool]


@st.composite
def interleavings(draw: st.DrawFn) -> list[Piece]:
    """Pieces of up to 6 answers of up to 4 pieces, in any order that keeps each answer's own."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    turns = draw(st.permutations([ticket for ticket, count in enumerate(counts) for _ in range(count)]))
    said = [0] * len(counts)
    pieces = []
    for ticket in turns:
        said[ticket] += 1
        pieces.append((ticket, b"%d.%d " % (ticket, said[ticket]), said[ticket] == counts[ticket]))
    return pieces


@given(interleavings())
def test_everything_comes_out_once_and_in_order(pieces: list[Piece]) -> None:
    order, out, ended = InOrder(), b"", []
    for ticket, piece, last in pieces:
        data, tickets = order.add(ticket, piece, last=last)
        out += data
        ended += tickets
    assert out == b"".join(piece for _, piece, _ in sorted(pieces))
    assert ended == sorted({ticket for ticket, _, _ in pieces})


def test_the_answer_whose_turn_it_is_does_not_wait() -> None:
    order = InOrder()
    assert order.add(1, b"b1", last=False) == (b"", [])
    assert order.add(0, b"a1", last=False) == (b"a1", [])
    assert order.add(0, b"a2", last=True) == (b"a2b1", [0])
    assert order.add(1, b"b2", last=True) == (b"b2", [1])


def test_unordered_answers_go_out_as_they_come() -> None:
    order = AsTheyEnd()
    assert order.add(5, b"x", last=False) == (b"x", [])
    assert order.add(4, b"y", last=True) == (b"y", [4])
