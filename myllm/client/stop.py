"""Stops the daemon: it finishes what it does, and its process is gone.

Blocking. Must not know click.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from myllm.client.client import Client
from myllm.client.dial import dial_daemon
from myllm.errors import TryAgainError, UnavailableError, from_wire
from myllm.locks import try_locked
from myllm.protocol import PROTOCOL, parse
from myllm.socket_file import socket_path

PATIENCE: Final = 40.0
"""Seconds that it has to finish what it does, 30, and a little more."""
SILENCE: Final = 2.0
"""Seconds of waiting after which that is said."""
LOOK: Final = 0.02


def stop_daemon(note: Callable[[str], None] = lambda text: None) -> int | None:
    """The pid of the daemon that ran, once it is gone; None where none does. Takes and raises as `end`."""
    client = dial_daemon()
    if client is None:
        return None
    with client:
        return end(client, note)


def end(client: Client, note: Callable[[str], None] = lambda text: None) -> int:
    """Has the daemon at the other end finish what it does; its pid, once it is gone.

    `note` takes what the user should know meanwhile. Raises UnavailableError for a `serve`, and for a
    daemon that does not end.
    """
    pid, version = client.greeting.get("pid"), client.greeting.get("version")
    if client.greeting.get("kind") != "daemon" or not isinstance(pid, int):
        raise UnavailableError(
            f"daemon: `myllm serve` of version {version} runs as process {pid}; stop it there"
        )
    with closing(Process(pid)) as process, _asked(client, pid):
        if not process.ends(SILENCE):
            note(f"waiting for the daemon, process {pid}: it finishes what it does")
            if not process.ends(PATIENCE):
                raise UnavailableError(f"daemon: process {pid} does not end; see its log, or kill it")
    return pid


@contextmanager
def _asked(client: Client, pid: int) -> Iterator[None]:
    """Has the daemon begin to end, where possible not by a signal: a second one, if somebody else stops it
    too, would end it at once, with all that runs. Raises what it refuses with.
    """
    if client.greeting.get("protocol") == PROTOCOL:
        _ask(client)
        yield
        return
    lock = try_locked(Path(f"{socket_path()}.stop"))
    if lock is not None:  # else another process of ours has sent the signal
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _ask(client: Client) -> None:
    try:
        *_, line = client.stream({"op": "shutdown"})
    except UnavailableError:
        return  # it was ending
    error = parse(line).get("error")
    if error and error.get("code") != TryAgainError.code:  # somebody else stops it, too
        raise from_wire(error)


class Process:
    """Another process, whose end can be waited for.

    On Linux by a pidfd: where pid 1 reaps nobody, as in many containers, an ended process keeps its pid.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):  # gone already, or a sandbox that does not allow it
                self._descriptor = os.pidfd_open(pid)

    def ends(self, seconds: float) -> bool:
        """Whether it ends within so many seconds; waits for that."""
        if self._descriptor is not None:
            return bool(select.select([self._descriptor], [], [], seconds)[0])
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(LOOK)
        return False

    def close(self) -> None:
        """Lets go of what waiting needs."""
        if self._descriptor is not None:
            os.close(self._descriptor)
