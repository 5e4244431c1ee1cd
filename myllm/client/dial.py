"""A connection to the daemon, where one answers and is ours. On the way of every command: nothing slow is
imported.

Owns the checks before and after connecting. Must not know what is asked.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from typing import Final

from myllm.client.client import Client
from myllm.errors import PermissionDeniedError, TryAgainError, UnavailableError
from myllm.socket_file import ROOT, is_open, not_ours, peer_uid, socket_path

PATIENCE: Final = 5.0
"""Seconds that the daemon has to greet: less would be rash on a machine that computes on all cores."""
POLL: Final = 0.01
"""Seconds between two tries to connect: on Linux a full backlog is EAGAIN at once, whatever the timeout."""


def dial_daemon() -> Client | None:
    """A client that the daemon has greeted, of whatever version it is; None where nobody listens.

    Raises PermissionDeniedError where what is there is not ours, TryAgainError where it does not speak.
    """
    connection = dial(socket_path(), PATIENCE)
    if connection is None:
        return None
    connection.settimeout(PATIENCE)
    client = Client(connection)
    try:
        _ = client.greeting
    except UnavailableError:
        client.close()
        return None  # it was just ending
    except BaseException:
        client.close()
        raise
    connection.settimeout(None)
    return client


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
        raise not_ours(path, "it is not a socket of yours")
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid not in trusted or is_open(folder):
        raise not_ours(os.path.dirname(path), "other users could put their own socket there")
    connection = socket.socket(socket.AF_UNIX)
    try:
        if not _connect(connection, path, timeout):
            connection.close()
            return None
        if peer_uid(connection) not in trusted:
            raise not_ours(path, "another user's process listens there")
    except BaseException:
        connection.close()
        raise
    return connection


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
            raise not_ours(path, f"it cannot be connected to: {error.strerror}") from error
        else:
            connection.setblocking(True)
            return True
