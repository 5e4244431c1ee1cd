"""What an earlier output has, and going on after a torn line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.cli.console import Streams
from myllm.cli.resume import Done, hash_of, read_done, repair_output
from myllm.errors import NotFoundError, UsageError


def line(index: int, **keys: Any) -> bytes:
    record = {"index": index, "done": True, "full_text": "x", **keys, "input_hash": f"h{index}"}
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


@pytest.fixture
def done_of(tmp_path: Path) -> Callable[[bytes], Done]:
    def read(data: bytes) -> Done:
        file = tmp_path / "out.jsonl"
        file.write_bytes(data)
        return read_done(str(file))

    return read


def test_a_hash_is_of_the_line_without_its_ending() -> None:
    assert hash_of(b'{"a":1}\r') == hash_of(b'{"a":1}')
    assert hash_of(b"a") != hash_of(b"b")


def test_answers_are_done_and_errors_are_not(done_of: Callable[[bytes], Done]) -> None:
    data = line(0) + line(1, error={"code": "x"}) + line(2, finish_reason="deadline") + line(3)
    done = done_of(data)
    assert done.hashes == {0: "h0", 3: "h3"}
    assert done.has(0, "h0")
    assert not done.has(1, "h1")
    assert not done.has(3, "another")
    assert done.changed == 1


def test_the_last_record_of_an_index_counts(done_of: Callable[[bytes], Done]) -> None:
    assert done_of(line(0, error={}) + line(0)).hashes == {0: "h0"}
    assert done_of(line(0) + line(0, error={})).hashes == {}


def test_token_lines_and_foreign_lines_are_passed_over(done_of: Callable[[bytes], Done]) -> None:
    data = b'{"index":0,"token":"x","done":false}\nhello\n{"index":"a","done":true}\n\n' + line(1)
    assert done_of(data).hashes == {1: "h1"}


@given(cut=st.integers(0, 400))
def test_a_torn_last_line_is_not_done(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole = b"".join(map(line, range(4)))
    cut = min(cut, len(whole))
    file = tmp_path_factory.mktemp("cut") / "out.jsonl"
    file.write_bytes(whole[:cut])
    done = read_done(str(file))
    lines = whole[:cut].split(b"\n")
    n_whole = len(lines) - 1 + (len(lines[-1]) == len(line(0)) - 1)
    assert list(done.hashes) == list(range(n_whole))
    assert done.tail == lines[-1]
    assert done.tail_offset == cut - len(lines[-1])


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=">> "):
        read_done(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("tail", "repaired"),
    [
        (b"", b""),
        (line(1)[:-20], b""),
        (b'{"ind', b""),
        (line(1)[:-1], line(1)),
        (b"some text", b"some text\n"),
    ],
)
def test_appending_starts_on_a_line_of_its_own(tmp_path: Path, tail: bytes, repaired: bytes) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(line(0) + tail)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND)
    repair_output(Streams(stdout=fd), str(file), read_done(str(file)))
    os.write(fd, b"next\n")
    os.close(fd)
    assert file.read_bytes() == line(0) + repaired + b"next\n"


def test_another_output_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(line(0)[:-9])
    fd = os.open(tmp_path / "rest.jsonl", os.O_WRONLY | os.O_CREAT)
    repair_output(Streams(stdout=fd), str(file), read_done(str(file)))
    os.close(fd)
    assert file.read_bytes() == line(0)[:-9]
    assert (tmp_path / "rest.jsonl").read_bytes() == b""


def test_overwriting_the_file_to_resume_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with pytest.raises(UsageError, match=">> "):
        repair_output(Streams(stdout=fd), str(file), read_done(str(file)))
    os.close(fd)
