"""A model's fingerprint: who it is, without reading all of it.

SHA-256 of header, size and time of change of its file, or of each of a split model's.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

from myllm.models.names import parts_named
from myllm.models.store import read_errors

HEADER_BYTES: Final = 1024 * 1024
"""Bytes of a file's beginning that count: all metadata but a large vocabulary's end."""


def fingerprint(path: Path) -> str:
    """64 hexadecimal digits. Raises what `read_errors` makes of a file that cannot be read."""
    parts = [_fingerprint(part, _state(part)) for part in parts_named(path)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int, int, int]:
    with read_errors(str(path)):
        status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=64)
def _fingerprint(path: Path, state: tuple[int, int, int, int]) -> str:
    """Read once for a file that has not changed: every request for embeddings asks. Its size and time
    alone do not tell that: `cp -p` may put another in its place that has the same.
    """
    size, mtime_ns, *_ = state
    with read_errors(str(path)), path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    return hashlib.sha256(b"%b\0%d\0%d" % (header, size, mtime_ns)).hexdigest()
