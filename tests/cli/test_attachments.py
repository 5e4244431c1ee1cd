"""Files that go to the model with a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from myllm.cli.attachments import LARGEST, Attachment, composed, mentioned, read
from myllm.errors import BadDataError, MyllmError, NotFoundError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_text_file_is_read_without_its_byte_order_mark(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfh\xc3\xa9\n")
    assert read("a.txt") == Attachment("a.txt", "hé\n")


@pytest.mark.parametrize("data", [b"a\0b", b"\xff\xfe", b"GIF89a\x80"])
def test_a_binary_file_is_refused(folder: Path, data: bytes) -> None:
    (folder / "a").write_bytes(data)
    with pytest.raises(BadDataError, match="not UTF-8 text but binary"):
        read("a")


def test_a_file_over_the_limit_is_refused_and_one_at_it_is_not(folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * LARGEST)
    assert len(read("a").text) == LARGEST
    (folder / "a").write_bytes(b"x" * (LARGEST + 1))
    with pytest.raises(BadDataError, match="larger than"):
        read("a")


@pytest.mark.parametrize("name", ["nothing", ".", "/dev/zero", "x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_what_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(MyllmError):
        read(name)


def test_a_folder_is_no_file() -> None:
    with pytest.raises(NotFoundError, match="not a file"):
        read(".")


def test_a_message_of_one_line_mentions_the_files_there_are(folder: Path) -> None:
    (folder / "a.txt").touch()
    assert mentioned("@a.txt and @a.txt, @b.txt, ada@a.txt @" + "x" * 5000) == ["a.txt"]
    assert mentioned("def f():\n    @a.txt") == []


def test_a_file_is_fenced_by_more_backticks_than_it_has() -> None:
    files = [Attachment("a.md", "```\nx\n```\n"), Attachment("b", "y")]
    assert composed(files, "Why?") == "a.md:\n````\n```\nx\n```\n````\n\nb:\n```\ny\n```\n\nWhy?"
