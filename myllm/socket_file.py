"""The daemon's socket as a file: where it is, whose it may be, and who is at the other end.

A leaf: `client/dial.py` connects to it, `daemon/claim.py` listens there, and both trust by the same rules.
Must not know what is said on a socket. On every warm command's way.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Mapping
from typing import Final

from myllm.errors import PermissionDeniedError
from myllm.paths import FOLDER, runtime_folder

NAME: Final = "daemon.sock"
LONGEST: Final = 100
"""Bytes of a path that any kernel takes for a socket: `sun_path` is 108 on Linux and 104 on macOS."""
SESSION_FOLDERS: Final = "/run/user"
SHORT_FOLDER: Final = "/tmp"  # noqa: S108  # the folder below is private, and checked at each use
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


def is_open(folder: os.stat_result) -> bool:
    """True where others can replace a file of ours; with the sticky bit, as in /tmp, they can't."""
    return bool(folder.st_mode & OTHERS_WRITE) and not folder.st_mode & stat.S_ISVTX


def _is_ours(folder: str) -> bool:
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not is_open(status)


def not_ours(path: str, why: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{path}: {why}; move it away, or set XDG_RUNTIME_DIR to a folder of your own"
    )
