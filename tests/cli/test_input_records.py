"""Records, one a line: splitting, what they ask for, what passes through."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.cli.documents import first_line
from myllm.cli.input_records import (
    BOM,
    Line,
    LineSplitter,
    Record,
    RecordError,
    Skipped,
    looks_like_jsonl,
    parse_jsonl,
    parse_text,
    record_lines,
)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return (data[a:b] for a, b in pairwise(places))


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b""))), st.lists(st.integers(0)))
def test_lines_are_the_same_wherever_the_input_is_cut(lines: list[bytes], cuts: list[int]) -> None:
    data = b"\n".join(lines)
    expected = [line.removeprefix(BOM) if n == 0 else line for n, line in enumerate(lines)]
    found = [line.data for line in record_lines(pieces(data, cuts), limit=100)]
    assert found == [line for line in expected if line.strip()]


@given(
    st.lists(st.sampled_from([b"", b" ", b"\t", b"one", b'{"text":"a b"}']), min_size=1, max_size=6),
    st.booleans(),
    st.lists(st.integers(0)),
)
def test_the_first_line_is_the_same_wherever_the_input_is_cut(
    lines: list[bytes], marked: bool, cuts: list[int]
) -> None:
    data = b"\n".join(lines)
    mark = BOM if marked else b""  # which comes at once
    chunks = [mark + data[:1], *pieces(data[1:], cuts)]
    rest, line = first_line(iter(chunks))
    assert line.data == next((line.lstrip() for line in lines if line.strip()), b"")
    assert b"".join(rest) == mark + data


@given(st.lists(st.integers(0), max_size=8))
def test_a_line_over_the_limit_is_marked_and_the_next_ones_are_whole(cuts: list[int]) -> None:
    data = b"ab\n" + b"x" * 1000 + b"\ncd\n" + b"y" * 11
    lines = list(record_lines(pieces(data, cuts), limit=10))
    assert [line.too_long for line in lines] == [False, True, False, True]
    assert (lines[0].data, lines[2].data) == (b"ab", b"cd")
    assert len(lines[1].data) == LineSplitter.KEPT


def test_a_long_line_is_not_held() -> None:
    splitter = LineSplitter(limit=1000)
    for _ in range(100):
        assert list(splitter.feed(b"z" * 1000)) == []
    assert splitter.pending == 100_000
    assert sum(map(len, splitter._chunks)) <= 1000


@pytest.mark.parametrize("name", ["text", "prompt", "content", "full_text", "input"])
def test_the_text_is_found_by_any_of_its_names(name: str) -> None:
    record = parse_jsonl(orjson.dumps({"id": 7, name: "hi"}))
    assert record == Record(text="hi", own={"id": 7, name: "hi"})


def test_the_first_name_wins_and_field_names_another() -> None:
    line = b'{"input":"c","prompt":"b","text":"a","note":"d"}'
    assert parse_jsonl(line).text == "a"  # type: ignore[union-attr]
    assert parse_jsonl(line, "note").text == "d"  # type: ignore[union-attr]
    with pytest.raises(RecordError, match="missing"):
        parse_jsonl(line, "missing")


def test_parameters_are_taken_and_our_own_keys_are_not_passed_on() -> None:
    record = parse_jsonl(
        b'{"text":"a","temperature":0,"stop":["x"],"seed":null,"model":"big","usage":{},"session_id":"s","k":1}'
    )
    assert isinstance(record, Record)
    assert record.parameters == {"temperature": 0, "stop": ["x"]}
    assert record.own == {"text": "a", "temperature": 0, "stop": ["x"], "seed": None, "k": 1}


def test_a_done_record_of_ours_gives_its_answer_and_not_its_question() -> None:
    record = parse_jsonl(
        b'{"index":3,"prompt":"question","label":1,"done":true,"full_text":"answer","seed":9,"input_hash":"ab"}'
    )
    assert record == Record(text="answer", own={"prompt": "question", "label": 1})


def test_tokens_and_progress_of_our_stream_are_no_records() -> None:
    for line in (b'{"token":"x","done":false}', b'{"loading":0.5}', b'{"pulling":{"bytes":1}}'):
        assert isinstance(parse_jsonl(line), Skipped)


def test_an_error_line_of_ours_stays_an_error() -> None:
    record = parse_jsonl(b'{"index":0,"id":4,"done":true,"error":{"code":"io","message":"m"}}')
    assert record == Record(own={"id": 4}, upstream_error={"code": "io", "message": "m"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "not a JSON object but list"),
        (b'{"x":1}', "no text"),
        (b'{"text":5}', "expected a string, not int"),
        (b'{"messages":"hi"}', "expected a list"),
        (b'{"text":"\xff"}', "not JSON"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        parse_jsonl(line)


def test_a_bad_record_keeps_the_keys_that_could_be_read() -> None:
    with pytest.raises(RecordError) as caught:
        parse_jsonl(b'{"id":5,"text":null}')
    assert caught.value.own == {"id": 5, "text": None}


def test_a_line_of_text_is_its_text() -> None:
    assert parse_text(b"caf\xc3\xa9\r").text == "café"
    with pytest.raises(RecordError, match="at byte 3"):
        parse_text(b"caf\xff")


def test_jsonl_is_known_by_a_whole_object_in_the_first_line() -> None:
    assert looks_like_jsonl(Line(b' {"a":1} '))
    assert not looks_like_jsonl(Line(b"{"))
    assert not looks_like_jsonl(Line(b"5"))
    assert looks_like_jsonl(Line(b'{"text":"aaa', too_long=True))
