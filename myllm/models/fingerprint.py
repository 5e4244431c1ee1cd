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
        return _fingerprint(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _fingerprint(path: Path, size: int, mtime_ns: int) -> str:
    """Read once for a file that has not changed: every request for embeddings asks."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    return hashlib.sha256(b"%b\0%d\0%d" % (header, size, mtime_ns)).hexdigest()
