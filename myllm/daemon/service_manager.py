"""What a daemon and its service manager say to each other: ready, alive, and the socket it passes.

Owns systemd's side of the environment: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3); where
none of it is set, as on macOS or at a terminal, nothing happens. Must not know what is served.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Final

from myllm.errors import ConfigError

FIRST_PASSED: Final = 3
"""SD_LISTEN_FDS_START: the descriptor of the first socket that is passed."""
LISTEN_VARIABLES: Final = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
PATIENCE: Final = 1.0
"""Seconds that a message may wait for room in the manager's queue."""


def notify(text: str) -> None:
    """Sends `text`, assignments such as `READY=1` one a line, to the service manager, if there is one.

    Never raises: a daemon does not fail for want of a listener.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.connect(address)  # so that waiting is for the manager's queue, and not for our own
        manager.send(text.encode("utf-8", "replace"))


def watchdog_interval() -> float | None:
    """Seconds between two `WATCHDOG=1`, half of what the manager waits for; None where it does not watch."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdigit()):
        return None
    return int(microseconds) / 2e6 or None


def activated() -> socket.socket | None:
    """The listening socket that the service manager opened for us, else None.

    Unsets the variables that tell of it and closes the descriptor on exec, so that no process we start
    takes it for its own. Raises ConfigError where something else than one Unix stream socket was passed.
    """
    passed = {name: os.environ.pop(name, "") for name in LISTEN_VARIABLES}
    if passed["LISTEN_PID"] != str(os.getpid()):
        return None
    if passed["LISTEN_FDS"] != "1":
        raise ConfigError(
            f"LISTEN_FDS: expected 1 socket, not {passed['LISTEN_FDS']!r}; give the unit one ListenStream="
        )
    try:
        listener = socket.socket(fileno=FIRST_PASSED)
    except OSError as error:
        raise _wrong(f"it is none: {error.strerror}") from error
    if (why := _why_useless(listener)) is not None:
        listener.detach()  # whatever it is, it is not ours to close
        raise _wrong(why)
    listener.set_inheritable(False)
    listener.setblocking(True)
    return listener


def _why_useless(listener: socket.socket) -> str | None:
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM:
        return "it is no Unix stream socket"
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "nobody can connect to it"
    return None


def _wrong(why: str) -> ConfigError:
    return ConfigError(
        f"passed socket: {why}; give the unit ListenStream= with an absolute path, and no Accept=yes"
    )
