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
from contextlib import suppress
from typing import Final

from myllm import __version__
from myllm.errors import MyllmError, TryAgainError, UnavailableError, from_wire
from myllm.protocol import PROTOCOL, LineBuffer, parse
from myllm.runtime.client import Client
from myllm.runtime.dial import dial_daemon
from myllm.runtime.spawn import PROTOCOL_FD, python

PATIENCE: Final = 20.0
"""Seconds that a new daemon has until it listens."""
REPLACING: Final = 40.0
"""Seconds that an old one has to finish what it does, and a little more."""
LOOK: Final = 0.02


def daemon() -> Client:
    """A connection to a daemon of this version. Raises UnavailableError, or what keeps one from starting."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if client := dial_daemon():
            if client.greeting.get("version") == __version__:
                return client
            _replace(client)
            deadline = time.monotonic() + PATIENCE
        try:
            _start()
        except TryAgainError:  # another one is just starting, or ending
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK)


def _replace(client: Client) -> None:
    """Has another version's daemon finish what it does and end. Raises UnavailableError for a `serve`."""
    pid, version = client.greeting.get("pid"), client.greeting.get("version")
    with client:
        if client.greeting.get("kind") != "daemon" or not isinstance(pid, int):
            raise UnavailableError(
                f"daemon: `myllm serve` of version {version} runs as process {pid}, this is {__version__}; "
                "restart it"
            )
        _stop(client, pid)
    deadline = time.monotonic() + REPLACING
    while other := dial_daemon():
        same = other.greeting.get("pid") == pid
        other.close()
        if not same:
            return
        if time.monotonic() > deadline:
            raise UnavailableError(f"daemon: version {version}, process {pid}, does not end; kill it")
        time.sleep(LOOK)


def _stop(client: Client, pid: int) -> None:
    """Asks a daemon to end. Where that is possible not by a signal: a second one, of another starter's or
    of `load --stop`, would end it at once, with all that runs.
    """
    if client.greeting.get("protocol") == PROTOCOL:
        with suppress(UnavailableError):  # it has just ended
            list(client.stream({"op": "shutdown"}))
    else:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _start() -> None:
    """Starts a daemon; returns when it listens. Raises what it says, UnavailableError where it dies."""
    said, saying = os.pipe()
    high = fcntl.fcntl(saying, fcntl.F_DUPFD_CLOEXEC, PROTOCOL_FD + 1)
    os.close(saying)
    try:
        os.posix_spawn(
            (command := python("myllm.runtime.daemon"))[0],
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
