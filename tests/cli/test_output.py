"""Events as text and as JSONL."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from myllm.cli.console import Streams
from myllm.cli.output import CountOutput, JsonlOutput, TextOutput, losses, statistics

DONE = {
    "done": True,
    "full_text": "x",
    "model": "m",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 1234, "cached_tokens": 17, "completion_tokens": 2, "dropped_messages": 0},
    "timings": {"load_ms": 420.0, "ttft_ms": 31.1, "tokens_per_second": 110.2},
    "seed": 7,
}


class Sink(Streams):
    """stdout as a list, a terminal or not."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.data = b""
        self._terminal = terminal

    @property
    def stdout_is_terminal(self) -> bool:
        return self._terminal

    def write(self, data: bytes) -> None:
        self.data += data


def as_text(tokens: list[str], *, terminal: bool = False) -> bytes:
    sink = Sink(terminal)
    output = TextOutput(sink)
    for token in tokens:
        output.token(orjson.dumps({"token": token, "done": False}))
    output.done(b"", DONE)
    return sink.data


@given(st.lists(st.text(alphabet="ab\n", max_size=4)))
def test_text_ends_in_exactly_one_newline(tokens: list[str]) -> None:
    text = "".join(tokens)
    expected = text.rstrip("\n") + "\n" if text else ""
    assert as_text(tokens) == expected.encode()


def test_text_comes_as_it_is_generated() -> None:
    sink = Sink()
    output = TextOutput(sink)
    output.token(b'{"token":"Hel","done":false}')
    assert sink.data == b"Hel"


def test_reasoning_is_left_out_of_text() -> None:
    sink = Sink()
    TextOutput(sink).token(b'{"token":"hm","done":false,"reasoning":true}')
    assert sink.data == b""


def test_a_terminal_gets_escapes_and_a_pipe_gets_bytes() -> None:
    tokens = ["a\x1b[", "31mb\x9b", "\x7f\tc"]
    assert as_text(tokens) == "a\x1b[31mb\x9b\x7f\tc\n".encode()
    assert as_text(tokens, terminal=True) == b"a\\x1b[31mb\\x9b\\x7f\tc\n"


def test_jsonl_is_copied_unchanged() -> None:
    sink = Sink()
    output = JsonlOutput(sink)
    line = '{"token":"\x7f é",  "done":false}'.encode()
    output.token(line)
    output.done(b'{"done":true}', {})
    assert sink.data == line + b'\n{"done":true}\n'


def test_jsonl_on_a_terminal_means_the_same() -> None:
    sink = Sink(terminal=True)
    JsonlOutput(sink).token(orjson.dumps({"token": "\x9b31m\x7f"}))
    assert sink.data == b'{"token":"\\u009b31m\\u007f"}\n'


def test_a_count_is_a_number() -> None:
    sink = Sink()
    CountOutput(sink).done(b"", {"done": True, "usage": {"prompt_tokens": 23}})
    assert sink.data == b"23\n"


def test_statistics_are_one_line() -> None:
    line = statistics(DONE)
    assert line == (
        "m: 1,234 prompt tokens (17 cached), 2 tokens at 110.2/s, first after 31 ms, "
        "load 420 ms, seed 7, stop"
    )


def test_what_was_left_out_is_said() -> None:
    assert losses(DONE) is None
    usage: dict[str, Any] = {"dropped_tokens": 1500, "dropped_messages": 0}
    assert losses({"usage": usage}) == "prompt: 1,500 tokens left out so that it fits the window"
