"""The sole right to be the daemon: one lock, one socket, in a folder that is ours alone.

Owns the lock that lets one daemon at a time listen, and what may be removed to make way for it. Blocking.
Must not know what is said on a socket.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from pathlib import Path
from typing import Final

from myllm.errors import CannotCreateError, TryAgainError
from myllm.locks import try_locked
from myllm.paths import make_private
from myllm.socket_file import OTHERS_WRITE, not_ours

BACKLOG: Final = 512
"""Connections that may wait to be accepted: as many as the queue of requests."""
POLL: Final = 0.01
"""Seconds between two looks whether a dying daemon still answers."""
DYING: Final = 0.5
"""Seconds in which a killed daemon's socket may still answer: the kernel drops its lock a little before."""


def claim(path: str) -> Claim:
    """The sole right to be the daemon at `path`, until `release` or the process's death; its folder is made.

    Raises TryAgainError where another has it, PermissionDeniedError where the folder or the lock's
    file is not ours alone, CannotCreateError where they cannot be made.
    """
    folder, lock = os.path.dirname(path), f"{path}.lock"
    if not os.path.lexists(folder):
        make_private(Path(folder))
    _check_private(folder)
    try:
        descriptor = try_locked(Path(lock))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):  # ELOOP: O_NOFOLLOW met a symlink
            raise not_ours(lock, "it is not a file of yours") from error
        raise CannotCreateError(f"{lock}: {error.strerror}; make its folder writable") from error
    if descriptor is None:
        raise TryAgainError(f"{path}: another daemon runs or is starting; use that one, or try again")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(descriptor)
        raise not_ours(lock, "it is not a file of yours")
    return Claim(path, descriptor)


class Claim:
    """What `claim` gives; for one thread. A socket that was passed to us is not ours to make or remove:
    its daemon claims, and does not `listen`.
    """

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock
        self._bound: tuple[int, int] | None = None

    def listen(self) -> socket.socket:
        """A listening socket at the path, mode 0600 whatever the umask, in place of a dead daemon's.

        Raises PermissionDeniedError where anything else is there, which is left as it is, TryAgainError
        where somebody listens without the lock, CannotCreateError where no socket can be made. The
        umask is the process's: a file that another thread makes in this moment is private, too.
        """
        _remove_stale(self.path)
        listener = socket.socket(socket.AF_UNIX)
        umask = os.umask(0o177)
        try:
            listener.bind(self.path)
            self._bound = _identity(self.path)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise CannotCreateError(
                f"{self.path}: no socket can be made: {error.strerror or error}; make its folder writable"
            ) from error
        finally:
            os.umask(umask)
        return listener

    def release(self) -> None:
        """Removes the socket, if it is still the one that `listen` made, then lets others claim.

        May be repeated. Close the listener afterwards, not before: while it is open, no other file gets
        its inode. The lock's file stays.
        """
        if self._lock is None:
            return
        if self._bound is not None and _identity(self.path) == self._bound:
            os.unlink(self.path)
        os.close(self._lock)
        self._lock = self._bound = None


def _remove_stale(path: str) -> None:
    """Removes our own socket where nobody listens; the caller holds the lock, so nobody is about to."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise not_ours(path, "it is not a socket of yours")
    deadline = time.monotonic() + DYING
    while _answers(path):
        if time.monotonic() >= deadline:
            raise TryAgainError(f"{path}: another process listens there; end it, or use it")
        time.sleep(POLL)
    os.unlink(path)


def _answers(path: str) -> bool:
    """Whether somebody listens on our socket. Raises PermissionDeniedError where it is of another kind."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its backlog is full
            return True
        except OSError as error:
            raise not_ours(path, f"it is no daemon's socket: {error.strerror}") from error
    return True


def _check_private(folder: str) -> None:
    """Raises PermissionDeniedError unless `folder` is one of ours, no symlink, where no other may write."""
    try:
        status = os.lstat(folder)
    except OSError as error:
        raise CannotCreateError(f"{folder}: {error.strerror}; make it yours") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise not_ours(folder, "it is not a folder of yours")
    if status.st_mode & OTHERS_WRITE:
        raise not_ours(folder, "others may write in it")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
