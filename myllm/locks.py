"""File locks between processes: one `flock` on a private lock file that is never a symlink's target.

Owns taking, waiting for and dropping a lock. Must not know what is being locked. The kernel
drops the lock of a process that dies, so a killed holder is succeeded at once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

POLL_SECONDS: Final = 0.05
"""How often a waiter looks again; waiting inside the kernel could not be interrupted from a thread."""


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock `path` inside the block and removes the file afterwards; blocks while another has it.

    `on_wait` is called at every look that finds it taken and may raise to give up. Raises OSError
    where the file cannot be made, or is a symlink (O_NOFOLLOW).
    """
    descriptor = _acquire(path, on_wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while still held: see _is_current
        os.close(descriptor)


def try_locked(path: Path) -> int | None:
    """The descriptor of the lock where it is free (close it to drop it), None where another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if _is_current(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _acquire(path: Path, on_wait: Callable[[], None]) -> int:
    while (descriptor := try_locked(path)) is None:
        on_wait()
        time.sleep(POLL_SECONDS)
    return descriptor


def _is_current(descriptor: int, path: Path) -> bool:
    """False where the holder before us removed the file, so that our lock is on a name no one sees."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
