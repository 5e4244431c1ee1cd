"""Bytes ⇄ messages, and what a request may say."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm import protocol
from myllm.errors import BY_CODE, BadDataError, InternalError, MyllmError, UsageError, from_wire
from myllm.protocol import LineBuffer, MessageReader, encode, parse
from myllm.requests import GenRequest, LoadOptions

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages = st.dictionaries(st.text().filter(lambda key: key != "part"), json_values, max_size=4)


def read(data: bytes, cuts: list[int]) -> list[dict[str, Any]]:
    reader = MessageReader()
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [message for a, b in pairwise(edges) for message in reader.feed(data[a:b])]


@given(st.lists(messages, max_size=4), st.lists(st.integers(0, 2000), max_size=8))
def test_messages_survive_lines_split_anywhere(sent: list[dict[str, Any]], cuts: list[int]) -> None:
    assert read(b"".join(map(encode, sent)), cuts) == sent


@given(messages, st.integers(1, 7), st.lists(st.integers(0, 2000), max_size=8))
def test_a_long_message_travels_in_parts_that_are_legal_lines(
    message: dict[str, Any], part_chars: int, cuts: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as limits:
        limits.setattr(protocol, "MAX_LINE", 16)
        limits.setattr(protocol, "PART_CHARS", part_chars)
        data = encode(message)
    assert read(data, cuts) == [message]


def test_parts_stay_under_the_line_limit_whatever_their_text() -> None:
    for text in ("\N{GRINNING FACE}", '"', "\\", "a", "\x01"):
        lines = encode({"prompt": text * 6_000_000}).splitlines()
        assert max(map(len, lines)) < protocol.MAX_LINE, text
        assert len(lines) > 1 or len(lines[0]) < protocol.MAX_LINE, text


def test_a_line_over_the_limit_is_an_error_and_not_a_growing_buffer() -> None:
    buffer = LineBuffer(limit=10)
    assert buffer.feed(b"12345\n123") == [b"12345"]
    with pytest.raises(BadDataError, match="longer than 10 bytes"):
        buffer.feed(b"45678901")


def test_a_message_over_the_limit_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_LINE", 16)
    monkeypatch.setattr(protocol, "MAX_MESSAGE", 64)
    with pytest.raises(BadDataError, match="limit"):
        encode({"prompt": "x" * 100})
    endless = b'{"part":"xxxxxxxxxx","more":true}\n'
    with pytest.raises(BadDataError, match="longer"):
        list(MessageReader().feed(endless * 100))


@pytest.mark.parametrize("line", [b"", b"[]", b"1", b"{", b"\xff", b'{"a":NaN}', b"null"])
def test_what_is_no_json_object_is_bad_data(line: bytes) -> None:
    with pytest.raises(BadDataError):
        parse(line)


@given(st.binary(max_size=200))
def test_hostile_bytes_give_messages_or_a_clear_error(data: bytes) -> None:
    with suppress(BadDataError):
        assert all(isinstance(message, dict) for message in MessageReader().feed(data + b"\n"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 1),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 1.01),
        ("min_p", float("nan")),
        ("seed", 2**32),
        ("stop", [""]),
        ("stop", ["x"] * 65),
        ("stop", {"a": 1}),
        ("ignore_eos", 1),
        ("logprobs", 21),
        ("on_overflow", "drop"),
        ("logit_bias", {"5": "much"}),
        ("deadline_ms", -5),
        ("priority", 20),
        ("messages", []),
        ("messages", [{"role": "king", "content": "x"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("mirostat", 3),
    ],
)
def test_a_bad_field_is_refused_by_its_name(field: str, value: Any) -> None:
    request = {"prompt": "x"} | {field: value}
    if field == "messages":
        del request["prompt"]
    with pytest.raises(UsageError, match=field):
        GenRequest.parse(request)


@given(st.dictionaries(st.sampled_from([*protocol.SAMPLING, *GenRequest.__dataclass_fields__]), json_values))
def test_any_json_is_a_request_or_a_usage_error(fields: dict[str, Any]) -> None:
    try:
        request = GenRequest.parse(fields)
    except UsageError:
        return
    assert (request.prompt is None) != (request.messages is None)


def test_prompt_and_messages_exclude_each_other() -> None:
    for request in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "y"}]}):
        with pytest.raises(UsageError, match="either"):
            GenRequest.parse(request)


def test_a_prompt_is_a_conversation_of_one_message_after_the_system_text() -> None:
    request = GenRequest.parse({"prompt": "hi", "system": "be brief"})
    assert request.conversation() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]


def test_load_options_are_checked_and_travel_as_given() -> None:
    options = LoadOptions.parse({"context": 4096, "kv_type": "q8_0", "gpu_layers": -1})
    assert options.to_wire() == {"context": 4096, "kv_type": "q8_0", "gpu_layers": -1}
    for bad in ({"contxt": 1}, {"context": 0}, {"kv_type": "f8"}, {"flash_attn": "on"}, [], {"threads": "2"}):
        with pytest.raises(UsageError):
            LoadOptions.parse(bad)


def test_errors_keep_their_kind_across_the_wire() -> None:
    for cls in BY_CODE.values():
        error = cls("what: why;\n what to do")
        assert type(from_wire(error.to_wire())) is cls
        assert str(error) == "what: why; what to do"
    assert type(from_wire({"code": "new", "message": "x"})) is InternalError


def test_every_error_has_a_status_of_the_documented_table() -> None:
    documented = {2, 65, 66, 67, 69, 70, 73, 74, 75, 77, 78, 124}
    assert {cls.exit_status for cls in BY_CODE.values()} == documented
    assert all(issubclass(cls, MyllmError) and cls.http_status >= 400 for cls in BY_CODE.values())
