"""How tests read: the bytes of a file → the transcripts in it, and what was noted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myllm.transcripts.importing import read
from myllm.transcripts.transcript import Notes, Transcript

Read = Callable[..., tuple[list[Transcript], list[str]]]


@pytest.fixture
def read_bytes(tmp_path: Path) -> Read:
    def reading(data: bytes, format_: str | None = None) -> tuple[list[Transcript], list[str]]:
        path = tmp_path / "given"
        path.write_bytes(data)
        notes = Notes()
        return list(read(path, notes, format_, now=1000.0)), notes.lines()

    return reading


@pytest.fixture
def read_lines(read_bytes: Read) -> Read:
    def reading(*records: Any, format_: str | None = None) -> tuple[list[Transcript], list[str]]:
        return read_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records), format_)

    return reading
