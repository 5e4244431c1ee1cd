"""Lines are passed on unparsed exactly where parsing them would say the same."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.errors import BadDataError
from myllm.protocol import (
    MAX_LINE,
    TOKEN_LINE,
    MessageReader,
    divided,
    encode,
    is_done,
    parse,
    tagged,
    with_id,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ['{"id":1,"token":"x"', '"done":true}', '","done":true,"x":"']
)
EVENTS = st.one_of(
    TEXT.map(lambda text: {"token": text, "done": False}),
    TEXT.map(lambda text: {"token": text, "done": False, "reasoning": True}),
    st.fixed_dictionaries({"done": st.just(True), "full_text": TEXT}),
    st.fixed_dictionaries({"done": st.just(True), "error": st.dictionaries(TEXT, TEXT)}),
    st.fixed_dictionaries({"loading": st.floats(0, 1)}),
)
IDS = st.none() | st.integers(0, 2**53)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(EVENTS, IDS)
def test_done_lines_are_told_from_others_as_a_parser_would(
    event: dict[str, Any], request_id: int | None
) -> None:
    line = encode(tagged(event, request_id)).rstrip(b"\n")
    assert is_done(line) == event.get("done", False)


@given(st.dictionaries(TEXT | st.sampled_from(["id", "token", "done"]), JSON, max_size=4), st.booleans())
def test_foreign_objects_are_judged_by_their_done_key(message: dict[str, Any], indent: bool) -> None:
    line = orjson.dumps(message, option=orjson.OPT_INDENT_2 if indent else 0).replace(b"\n", b"")
    if list(message)[:1] != ["token"]:  # such a line is a token event, whatever else it says
        assert is_done(line) == (parse(line).get("done") is True)


@given(EVENTS, st.integers(0, 2**53), IDS)
def test_a_token_line_gets_another_id_and_keeps_the_rest(
    event: dict[str, Any], old: int, new: int | None
) -> None:
    line = encode(tagged(event, old)).rstrip(b"\n")
    match = TOKEN_LINE.match(line)
    assert bool(match) == ("token" in event)
    if match:
        assert int(match[1]) == old
        assert with_id(line, match.end(), new) == encode(tagged(event, new))


@given(st.lists(EVENTS, max_size=5), st.lists(st.integers(1, 40), max_size=20))
def test_lines_and_messages_are_the_same_however_bytes_are_split(
    events: list[dict[str, Any]], cuts: list[int]
) -> None:
    data = b"".join(map(encode, events))
    lines, messages = MessageReader(), MessageReader()
    found_lines, found = [], []
    for size in [*cuts, len(data)]:
        piece, data = data[:size], data[size:]
        found_lines += lines.feed_lines(piece)
        found += messages.feed(piece)
    assert [parse(line) for line in found_lines] == found
    assert len(found) == len(events)


def test_a_message_over_the_line_limit_travels_in_parts_and_arrives_as_one_line() -> None:
    line = encode({"done": True, "full_text": "ä\n" * (MAX_LINE // 3)})
    assert max(map(len, line.splitlines())) <= MAX_LINE
    (whole,) = MessageReader().feed_lines(line)
    assert len(whole) > MAX_LINE
    assert divided(whole + b"\n") == line


@given(st.binary(max_size=60))
def test_what_is_no_json_object_is_an_error_and_nothing_else(line: bytes) -> None:
    try:
        is_done(line)
    except BadDataError:
        with pytest.raises(BadDataError):
            parse(line)
