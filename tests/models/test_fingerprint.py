"""A file that stays is read once; one that changed, in any way, is another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_maker import make_gguf, make_parts

from myllm.errors import NotFoundError
from myllm.models import fingerprint as module
from myllm.models.fingerprint import fingerprint

CONTENT = b"GGUF and so on"


def written(path: Path) -> None:
    path.write_bytes(CONTENT[::-1])


def longer(path: Path) -> None:
    path.write_bytes(CONTENT + b"\0")
    os.utime(path, (1, 1))


def touched(path: Path) -> None:
    os.utime(path, (1, 2))


def rewritten(path: Path) -> None:
    before = path.stat().st_ctime_ns
    path.write_bytes(CONTENT[::-1])
    os.utime(path, (1, 1))
    while path.stat().st_ctime_ns == before:  # the kernel's clock for files is a coarse one
        os.utime(path, (1, 1))


def replaced(path: Path) -> None:
    """As `cp -p` or rsync brings another file of the same size and time."""
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, (1, 1))
    other.rename(path)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which all is header."""
    monkeypatch.setattr(module, "HEADER_BYTES", len(CONTENT))
    (path := tmp_path / "model.gguf").write_bytes(CONTENT)
    os.utime(path, (1, 1))
    return path


@pytest.mark.parametrize("change", [written, longer, touched, rewritten, replaced])
def test_a_file_that_changed_has_another_fingerprint(model: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint(model)
    change(model)
    after = fingerprint(model)
    assert after != before
    assert len(after) == 64


def test_a_file_that_is_as_it_was_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    really = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened.append(self) or really(self, mode))
    assert len({fingerprint(model) for _ in range(5)}) == 1
    assert opened == [model]


def test_a_file_that_is_back_as_it_was_is_the_one_it_was(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError):
        fingerprint(model)
    (tmp_path / "elsewhere").rename(model)
    assert fingerprint(model) == before


# ── split models ────────────────────────────────────────────────────────────────────────────


def renamed_inside(part: Path) -> None:
    """Another header, as long, of the same time."""
    times = part.stat().st_atime_ns, part.stat().st_mtime_ns
    part.write_bytes(part.read_bytes().replace(b"Tiny", b"Tinx"))
    os.utime(part, ns=times)


def with_a_byte_more(part: Path) -> None:
    times = part.stat().st_atime_ns, part.stat().st_mtime_ns
    part.write_bytes(part.read_bytes() + b"\0")
    os.utime(part, ns=times)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("change", [renamed_inside, with_a_byte_more, touched])
def test_a_split_model_of_which_any_part_changed_has_another_fingerprint(
    tmp_path: Path, change: Callable[[Path], None], number: int
) -> None:
    parts = make_parts(tmp_path)
    before = fingerprint(parts[0])
    assert fingerprint(parts[0]) == before
    change(parts[number])
    assert fingerprint(parts[0]) != before


def test_a_split_model_without_one_of_its_parts_is_not_the_one_it_was(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    before = fingerprint(parts[0])
    parts[1].unlink()
    assert fingerprint(parts[0]) != before


def test_a_whole_model_that_is_called_like_a_first_part_has_a_fingerprint(tmp_path: Path) -> None:
    alone = make_gguf(tmp_path / "alone.gguf")
    before = fingerprint(alone)
    assert fingerprint(alone.rename(tmp_path / "big-00001-of-00002.gguf")) == before
