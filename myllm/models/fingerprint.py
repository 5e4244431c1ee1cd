"""A model's fingerprint: who it is, without reading all of it.

SHA-256 over header, size and time of change of each of its files. Whoever changes a file changes its
time: weights changed in place with size and time kept go unseen, which `models verify` sees. Must not
know what is kept by it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

from myllm.models.names import parts_named
from myllm.models.store import read_errors

HEADER_BYTES: Final = 1024 * 1024
"""Bytes of a file's beginning that count as its header. Where it ends only parsing tells: MiniLM takes
1.4 ms as it is, and would take 5 more. Of a large vocabulary the end is left out, and what follows it."""

State = tuple[int, int, int, int]
"""Size, time of change in ns, time of change of the inode, its number."""


def fingerprint(path: Path) -> str:
    """64 hexadecimal digits; `path` is the first part of a split model.

    Raises what `read_errors` makes of a file that cannot be read. A part that is missing is for whoever
    loads the model to refuse.
    """
    with read_errors(str(path)):
        files = [path, *(part for part in parts_named(path)[1:] if part.exists())]
        return _fingerprint(tuple((file, _state(file)) for file in files))


def _state(file: Path) -> State:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=16)
def _fingerprint(files: tuple[tuple[Path, State], ...]) -> str:
    """Read once for files that have not changed: every request for embeddings asks. Size and time alone
    do not tell that: `cp -p` may put another in a file's place that has the same.
    """
    digest = hashlib.sha256()
    for path, (size, mtime_ns, *_) in files:
        with path.open("rb") as file:
            digest.update(b"%b\0%d\0%d" % (file.read(HEADER_BYTES), size, mtime_ns))
    return digest.hexdigest()
