"""A model file's fingerprint: who it is, without reading all of it.

SHA-256 of its header, size and time of change (DESIGN.md §4); of a split model, of its first part.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

from myllm.models.store import read_errors

HEADER_BYTES: Final = 1024 * 1024
"""Bytes of the file's beginning that count: all metadata but a large vocabulary's end."""


def fingerprint(path: Path) -> str:
    """64 hexadecimal digits. Raises what `read_errors` makes of a file that cannot be read."""
    with read_errors(str(path)):
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return _fingerprint(path, state)


@lru_cache(maxsize=16)
def _fingerprint(path: Path, state: tuple[int, int, int, int]) -> str:
    """Read once for a file that has not changed: every request for embeddings asks. Its size and time
    alone do not tell that: `cp -p` may put another in its place that has the same.
    """
    size, mtime_ns, *_ = state
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    return hashlib.sha256(b"%b\0%d\0%d" % (header, size, mtime_ns)).hexdigest()
