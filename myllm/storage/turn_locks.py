"""Turns in sessions: one at a time, among processes and threads, by a lock file for each that is under way.

Owns the lock files: one is there while its turn lasts, or its process died in it. Must not know what a
turn does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from myllm import locks, paths
from myllm.errors import TryAgainError

SUFFIX: Final = ".lock"


class TurnLocks:
    """The locks in `folder`, by the id of a session. Methods raise OSError and CannotCreateError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self, session: str, wait_seconds: float) -> Iterator[None]:
        """Holds one inside the block. Entering blocks; raises TryAgainError after `wait_seconds`."""
        deadline = time.monotonic() + wait_seconds

        def on_wait() -> None:
            if time.monotonic() >= deadline:
                raise TryAgainError(
                    f"session {session}: another command is taking a turn in it; try again when it has ended"
                )

        with locks.locked(paths.make_private(self.folder) / f"{session}{SUFFIX}", on_wait):
            yield

    def left(self) -> list[str]:
        """The ids whose lock files are there, held or not."""
        return [file.stem for file in self.folder.glob(f"*{SUFFIX}")]
