"""What stdin means to a plain `gen`."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.cli.inputs import Given, UpstreamError, compose, decode_text, fill, has_place, parse_input
from myllm.errors import BadDataError, UsageError


def jsonl(*objects: object) -> bytes:
    return b"".join(orjson.dumps(each) + b"\n" for each in objects)


STREAM = ({"token": "Hel", "done": False}, {"token": "lo", "done": False})
DONE = {"done": True, "full_text": "Hello", "model": "m", "usage": {}}


@given(st.text())
def test_text_comes_back_as_it_was_but_for_the_mark_and_the_last_newline(text: str) -> None:
    plain = text.removeprefix("\ufeff")
    data = ("\ufeff" + plain + "\n").encode()
    assert decode_text(data) == plain.removesuffix("\r")


def test_only_one_final_newline_is_dropped() -> None:
    assert decode_text(b"a\n\n") == "a\n"
    assert decode_text(b"a\r\n") == "a"
    assert decode_text(b"a\0b") == "a\0b"


@given(st.text(), st.binary(min_size=1).filter(lambda b: b[0] in range(0x80, 0xC0)))
def test_invalid_utf8_is_refused_with_its_place(before: str, rest: bytes) -> None:
    with pytest.raises(BadDataError, match=f"at byte {len(before.encode()):,};") as caught:
        decode_text(before.encode() + rest)
    assert caught.value.exit_status == 65


def test_utf16_is_named() -> None:
    with pytest.raises(BadDataError, match=r"UTF-16.*iconv"):
        decode_text("hi".encode("utf-16"))


def test_plain_text_and_json_that_is_no_stream_are_text() -> None:
    assert parse_input(b'{"a": 1}\n{"b": 2}\n').text == '{"a": 1}\n{"b": 2}'
    assert parse_input(b"{} is a dict").text == "{} is a dict"
    assert parse_input(b"").text == ""


def test_our_own_stream_is_its_full_text() -> None:
    assert parse_input(jsonl({"loading": 0.5}, *STREAM, DONE)) == Given(text="Hello")


def test_records_of_a_batch_are_joined_with_a_blank_line() -> None:
    records = [{"index": n, **DONE, "full_text": f"text {n}"} for n in range(3)]
    assert parse_input(jsonl(*records)).text == "text 0\n\ntext 1\n\ntext 2"


def test_a_stream_that_was_cut_off_is_refused() -> None:
    with pytest.raises(BadDataError, match="cut off"):
        parse_input(jsonl(*STREAM))
    with pytest.raises(BadDataError, match=r"line 3.*--input text"):
        parse_input(jsonl(*STREAM) + b'{"done":tr')


def test_an_error_of_the_command_before_is_exit_1_and_keeps_its_line() -> None:
    line = jsonl({"done": True, "error": {"code": "not_found", "message": "no such model"}})
    with pytest.raises(UpstreamError, match="no such model") as caught:
        parse_input(jsonl(*STREAM) + line)
    assert caught.value.exit_status == 1
    assert caught.value.line == line.strip()


def test_input_text_takes_a_stream_as_text() -> None:
    assert parse_input(jsonl(DONE), "text").text == jsonl(DONE).decode().strip()


def test_lines_of_role_and_content_are_one_conversation() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "x"}]
    messages = parse_input(jsonl(turns[0]) + b"\n" + jsonl(turns[1])).messages
    assert messages == [turns[0], {"role": "user", "content": "Hi"}]


def test_a_conversation_with_a_foreign_line_is_refused() -> None:
    with pytest.raises(BadDataError, match="line 2"):
        parse_input(jsonl({"role": "user", "content": "Hi"}, {"role": "clown", "content": "x"}))


def test_input_jsonl_takes_the_text_of_records() -> None:
    assert parse_input(jsonl({"text": "a"}, {"input": "b"}), "jsonl").text == "a\n\nb"
    assert parse_input(jsonl({"note": "c"}), "jsonl", "note").text == "c"
    messages = [{"role": "user", "content": "Hi"}]
    assert parse_input(jsonl({"messages": messages}), "jsonl").messages == messages


def test_lines_need_batch_or_map() -> None:
    with pytest.raises(UsageError, match="--batch"):
        parse_input(b"a\nb\n", "lines")


def test_text_comes_first_then_the_prompt() -> None:
    assert compose(Given(text="body"), "Sum up.") == {"prompt": "body\n\nSum up."}
    assert compose(Given(text="body"), None) == {"prompt": "body"}
    assert compose(Given(), "Hi") == {"prompt": "Hi"}


def test_braces_place_the_text_and_doubled_ones_are_literal() -> None:
    assert compose(Given(text="b{}"), "a {} c {{}}") == {"prompt": "a b{} c {}"}
    assert compose(Given(text="x"), 'Return {"a": 1} {{}}') == {"prompt": 'x\n\nReturn {"a": 1} {}'}
    assert compose(Given(), "Explain {} and {{}}") == {"prompt": "Explain {} and {}"}


def test_an_empty_stdin_is_refused_where_it_was_needed() -> None:
    with pytest.raises(UsageError, match="type `myllm gen"):
        compose(Given(text=""), None)
    with pytest.raises(UsageError, match="-n"):
        compose(Given(text=""), "Sum up: {}")
    assert compose(Given(text=""), "Hi") == {"prompt": "Hi"}


def test_after_a_conversation_the_prompt_is_the_next_turn() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    composed = compose(Given(messages=turns), "Bye")
    assert composed == {"messages": [*turns, {"role": "user", "content": "Bye"}]}
    with pytest.raises(UsageError, match="conversation"):
        compose(Given(messages=turns), "x {}")


@given(st.text())
def test_text_is_put_in_unchanged_whatever_it_holds(text: str) -> None:
    assert fill("<{}>", text) == f"<{text}>"
    assert has_place("a {} b")
    assert not has_place("a {{}} b")


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        given_input = parse_input(data)
    except BadDataError:
        return
    assert given_input.text is not None or given_input.messages
