"""Members of zip archives that come from strangers: whether the disk can take them, and their bytes.

Must not know which member is wanted, nor where it goes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Final

from myllm.errors import BadDataError, IOFailureError
from myllm.models.store import CHUNK, Staging

MAX_RATIO: Final = 100
"""Weights hardly compress; a member that claims to grow more than this is a bomb."""


def check_sizes(members: Sequence[zipfile.ZipInfo], staging: Staging, archive: str) -> None:
    """Raises BadDataError for a member that would grow too much, IOFailureError where the disk has no room.

    `archive` is what the message calls it.
    """
    for member in members:
        if member.file_size > MAX_RATIO * max(member.compress_size, 1):
            raise BadDataError(
                f"{archive}: {member.filename!r:.120} would grow from {member.compress_size:,} to "
                f"{member.file_size:,} bytes; it is not trusted"
            )
    total = sum(member.file_size for member in members)
    if total > (free := staging.free_bytes()):
        raise IOFailureError(
            f"{archive}: its model needs {total:,} bytes and the disk has {free:,}; free some"
        )


def member_chunks(stream: IO[bytes], size: int, archive: str) -> Iterator[bytes]:
    """Exactly the `size` bytes that the archive's directory promised. Raises BadDataError for fewer."""
    left = size
    while left and (chunk := stream.read(min(CHUNK, left))):
        left -= len(chunk)
        yield chunk
    if left:
        raise BadDataError(f"{archive}: a member ends {left:,} bytes early; it is broken")
