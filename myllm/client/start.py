"""Gets a daemon: the one that answers, or a new one in the background; an old version's is replaced.

For `myllm load` and whoever else asks for a daemon rather than taking one that happens to be there.
Blocking. Must not know click.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from typing import Final

from myllm import __version__
from myllm.client.client import Client
from myllm.client.dial import dial_daemon
from myllm.client.stop import end
from myllm.errors import MyllmError, TryAgainError, UnavailableError, from_wire
from myllm.protocol import LineBuffer, parse
from myllm.spawning import PROTOCOL_FD, python

PATIENCE: Final = 20.0
"""Seconds that a new daemon has until it listens."""
LOOK: Final = 0.02


def daemon() -> Client:
    """A connection to a daemon of this version. Raises UnavailableError, or what keeps one from starting."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if client := dial_daemon():
            if client.greeting.get("version") == __version__:
                return client
            with client:
                end(client)
            deadline = time.monotonic() + PATIENCE
        try:
            _start()
        except TryAgainError:  # another one is just starting, or ending
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK)


def _start() -> None:
    """Starts a daemon; returns when it listens. Raises what it says, UnavailableError where it dies."""
    said, saying = os.pipe()
    high = fcntl.fcntl(saying, fcntl.F_DUPFD_CLOEXEC, PROTOCOL_FD + 1)
    os.close(saying)
    try:
        os.posix_spawn(
            (command := python("myllm.daemon.daemon"))[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, high, PROTOCOL_FD),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
        )
    except OSError as error:
        os.close(said)
        raise UnavailableError(f"daemon: cannot be started: {error}") from error
    finally:
        os.close(high)
    try:
        _heed(said)
    finally:
        os.close(said)


def _heed(said: int) -> None:
    """Waits for the daemon's one line. Raises the error in it."""
    lines = LineBuffer()
    while True:
        if not select.select([said], [], [], PATIENCE)[0]:
            raise UnavailableError(f"daemon: it does not listen after {PATIENCE:.0f} s; see its log")
        data = os.read(said, 65536)
        if not data:
            raise UnavailableError("daemon: it died while it started; see its log")
        for line in lines.feed(data):
            if error := parse(line).get("error"):
                failure: MyllmError = from_wire(error)
                raise failure
            return
