"""The daemon's socket as a file: where it is, who may listen there, and who is at the other end.

Owns the checks that a socket, its folder and the process behind it are ours, and the lock that lets
one daemon at a time listen. Blocking. Must not know what is said on a socket. `socket_path` and `dial`
are on every warm command's way: what only a daemon needs is imported in `claim`.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import time
from collections.abc import Mapping
from typing import Final

from myllm.errors import CannotCreateError, PermissionDeniedError, TryAgainError
from myllm.paths import FOLDER, runtime_folder

NAME: Final = "daemon.sock"
LONGEST: Final = 100
"""Bytes of a path that any kernel takes for a socket: `sun_path` is 108 on Linux and 104 on macOS."""
BACKLOG: Final = 512
"""Connections that may wait to be accepted: as many as the queue of requests (DESIGN.md §8)."""
SESSION_FOLDERS: Final = "/run/user"
SHORT_FOLDER: Final = "/tmp"  # noqa: S108  # the folder below is private, and checked at each use
POLL: Final = 0.01
"""Seconds between two tries to connect: on Linux a full backlog is EAGAIN at once, whatever the timeout."""
DYING: Final = 0.5
"""Seconds in which a killed daemon's socket may still answer: the kernel drops its lock a little before."""
ROOT: Final = 0
OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def socket_path(environ: Mapping[str, str] = os.environ) -> str:
    """Where the daemon of these XDG folders listens, at most 100 bytes; creates nothing.

    A longer path becomes a hash of it in a short private folder. Raises ConfigError where there is no
    home to put it in.
    """
    wanted = os.path.join(runtime_folder(environ), NAME)
    if len(os.fsencode(wanted)) <= LONGEST:
        return wanted
    from hashlib import sha256  # 4 ms, for the few whose folders have such names

    user = os.getuid()
    session = os.path.join(SESSION_FOLDERS, str(user))
    folder = os.path.join(session, FOLDER) if _is_ours(session) else f"{SHORT_FOLDER}/{FOLDER}-{user}"
    return os.path.join(folder, sha256(os.fsencode(wanted)).hexdigest()[:16] + ".sock")


def dial(path: str, timeout: float) -> socket.socket | None:
    """A blocking connection to who listens at `path`, None where nobody does.

    Waits up to `timeout` seconds where so many others want in that the backlog is full.
    Raises PermissionDeniedError where the socket, its folder or the process at the other end is
    another user's (root aside) or open to others, TryAgainError where the daemon accepts nobody in time.
    """
    try:
        file, folder = os.lstat(path), os.lstat(os.path.dirname(path))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None  # after `su`, XDG_RUNTIME_DIR may be another user's
    except OSError as error:
        raise PermissionDeniedError(f"{path}: {error.strerror}; make its folder yours") from error
    trusted = (os.getuid(), ROOT)
    if not stat.S_ISSOCK(file.st_mode) or file.st_uid not in trusted:
        raise _not_ours(path, "it is not a socket of yours")
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid not in trusted or _is_open(folder):
        raise _not_ours(os.path.dirname(path), "other users could put their own socket there")
    connection = socket.socket(socket.AF_UNIX)
    try:
        if not _connect(connection, path, timeout):
            connection.close()
            return None
        if peer_uid(connection) not in trusted:
            raise _not_ours(path, "another user's process listens there")
    except BaseException:
        connection.close()
        raise
    return connection


def peer_uid(connection: socket.socket) -> int:
    """The user id of the process at the other end, from the kernel.

    Raises PermissionDeniedError where the kernel cannot tell.
    """
    try:
        if sys.platform == "linux":  # struct ucred: pid, uid, gid
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        else:  # LOCAL_PEERCRED of SOL_LOCAL; struct xucred: version, uid, groups
            credentials = connection.getsockopt(0, 1, 76)
    except OSError as error:
        raise PermissionDeniedError(
            f"socket: the kernel does not say who is at the other end: {error}; try again"
        ) from error
    return int.from_bytes(credentials[4:8], sys.byteorder)


def claim(path: str) -> Claim:
    """The sole right to be the daemon at `path`, until `release` or the process's death; its folder is made.

    Raises TryAgainError where another has it, PermissionDeniedError where the folder or the lock's
    file is not ours alone, CannotCreateError where they cannot be made.
    """
    from pathlib import Path

    from myllm.models.locks import try_locked
    from myllm.paths import make_private

    folder, lock = os.path.dirname(path), f"{path}.lock"
    if not os.path.lexists(folder):
        make_private(Path(folder))
    _check_private(folder)
    try:
        descriptor = try_locked(Path(lock))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):  # ELOOP: O_NOFOLLOW met a symlink
            raise _not_ours(lock, "it is not a file of yours") from error
        raise CannotCreateError(f"{lock}: {error.strerror}; make its folder writable") from error
    if descriptor is None:
        raise TryAgainError(f"{path}: another daemon runs or is starting; use that one, or try again")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(descriptor)
        raise _not_ours(lock, "it is not a file of yours")
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


def _connect(connection: socket.socket, path: str, timeout: float) -> bool:
    """False where nobody listens."""
    deadline = time.monotonic() + timeout
    connection.setblocking(False)
    while True:
        try:
            connection.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # the backlog is full
            if time.monotonic() >= deadline:
                raise TryAgainError(f"{path}: the daemon is too busy to answer; try again") from None
            time.sleep(POLL)
        except OSError as error:
            raise _not_ours(path, f"it cannot be connected to: {error.strerror}") from error
        else:
            connection.setblocking(True)
            return True


def _remove_stale(path: str) -> None:
    """Removes our own socket where nobody listens; the caller holds the lock, so nobody is about to."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise _not_ours(path, "it is not a socket of yours")
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
            raise _not_ours(path, f"it is no daemon's socket: {error.strerror}") from error
    return True


def _check_private(folder: str) -> None:
    """Raises PermissionDeniedError unless `folder` is one of ours, no symlink, where no other may write."""
    try:
        status = os.lstat(folder)
    except OSError as error:
        raise CannotCreateError(f"{folder}: {error.strerror}; make it yours") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise _not_ours(folder, "it is not a folder of yours")
    if status.st_mode & OTHERS_WRITE:
        raise _not_ours(folder, "others may write in it")


def _is_open(folder: os.stat_result) -> bool:
    """True where others can replace a file of ours; with the sticky bit, as in /tmp, they can't."""
    return bool(folder.st_mode & OTHERS_WRITE) and not folder.st_mode & stat.S_ISVTX


def _is_ours(folder: str) -> bool:
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not _is_open(status)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _not_ours(path: str, why: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{path}: {why}; move it away, or set XDG_RUNTIME_DIR to a folder of your own"
    )
