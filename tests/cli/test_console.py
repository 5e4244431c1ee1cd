"""The standard streams: notes, escapes, failures."""

from __future__ import annotations

import io
import os
import pty
import threading
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.cli import console
from myllm.cli.console import Streams, visible, visible_json
from myllm.errors import IOFailureError, NotFoundError

CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}


@given(st.text())
def test_no_control_character_but_tab_and_newline_is_shown(text: str) -> None:
    shown = visible(text)
    assert not {ord(c) for c in shown} & CONTROLS
    assert visible(shown) == shown


@given(st.text())
def test_json_for_a_terminal_means_the_same_and_has_no_controls(text: str) -> None:
    line = orjson.dumps({"token": text})
    shown = visible_json(line)
    assert orjson.loads(shown) == {"token": text}
    assert not {ord(c) for c in shown.decode()} & CONTROLS


def test_a_sequence_cut_into_tokens_stays_harmless() -> None:
    assert "".join(map(visible, ["\x1b", "]52;c;", "aGk=", "\x07"])) == "\\x1b]52;c;aGk=\\x07"


def test_a_note_is_one_safe_line() -> None:
    err = io.StringIO()
    Streams(stderr=err).note("a\x1b[31m")
    assert err.getvalue() == "myllm: a\\x1b[31m\n"


def test_a_stderr_that_is_gone_hurts_nobody() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Streams(stderr=Gone()).note("hello")


def test_an_error_has_its_traceback_only_with_debug() -> None:
    err = io.StringIO()
    streams = Streams(stderr=err)
    streams.report(NotFoundError("x: no such model"))
    assert err.getvalue() == "myllm: x: no such model\n"
    streams.debug = True
    streams.report(NotFoundError("x: no such model"))
    assert "NotFoundError" in err.getvalue()


def test_a_silent_stdin_is_mentioned_once_and_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    read, write = os.pipe()
    err = io.StringIO()
    said = threading.Event()
    chunks: list[bytes] = []
    streams = Streams(stdin=read, stderr=err)
    streams.before_note = said.set
    reader = threading.Thread(target=lambda: chunks.extend(streams.chunks("text on stdin")))
    reader.start()
    assert said.wait(5)
    os.write(write, b"late")
    os.close(write)
    reader.join(5)
    os.close(read)
    assert chunks == [b"late"]
    assert err.getvalue().count("waiting for text on stdin") == 1


def test_a_stdin_that_speaks_at_once_is_not_commented_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    read, write = os.pipe()
    os.write(write, b"now")
    os.close(write)
    err = io.StringIO()
    assert list(Streams(stdin=read, stderr=err).chunks("text")) == [b"now"]
    os.close(read)
    assert not err.getvalue()


def test_a_folder_as_stdin_is_an_io_failure(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IOFailureError, match="stdin"):
        list(Streams(stdin=fd).chunks("text"))
    os.close(fd)


def test_writing_is_whole_or_an_error() -> None:
    read, write = os.pipe()
    data = bytes(range(256)) * 4000
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.extend(iter(lambda: os.read(read, 65536), b"")))
    reader.start()
    Streams(stdout=write).write(data)
    os.close(write)
    reader.join(5)
    os.close(read)
    assert b"".join(got) == data

    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(IOFailureError, match="No space left"):
        Streams(stdout=full).write(b"x")
    os.close(full)


def test_a_reader_that_is_gone_is_a_broken_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        Streams(stdout=write).write(b"x")
    os.close(write)


def test_terminals_are_known() -> None:
    leader, follower = pty.openpty()
    streams = Streams(follower, follower, io.StringIO())
    assert (streams.stdin_is_terminal, streams.stdout_is_terminal, streams.stderr_is_terminal) == (
        True,
        True,
        False,
    )
    os.close(leader)
    os.close(follower)
