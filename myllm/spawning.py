"""Starts processes of ours: a worker, cheap and early, before the slow imports of whoever wants one; a
daemon.

Owns how they are born: what they inherit and where a worker's last words go. Must not know the
protocol, asyncio or engines, and imports nothing that costs a command time.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from typing import NamedTuple

from myllm.errors import UnavailableError

PROTOCOL_FD = 3
"""The worker's end of the socketpair, in the worker."""

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 — pathlib costs 25 ms
# They must run this very package, and nothing that lies in the current directory: so neither `-m`,
# which would also pay for runpy, nor PYTHONPATH, which would put the package's neighbours before the
# standard library.
_MAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import myllm
sys.path.append(sys.path.pop(0))
from importlib import import_module
import_module(sys.argv[3]).main(int(sys.argv[2]))
"""


class WorkerProcess(NamedTuple):
    """A worker just started: its process id, our end of the protocol and of its stdout and stderr."""

    pid: int
    protocol: socket.socket
    words: int


def python(module: str) -> list[str]:
    """The command that calls `main(3)` of a module of this package."""
    return [sys.executable, "-P", "-c", _MAIN, _ROOT, str(PROTOCOL_FD), module]


def inherit_nothing_but(fd: int) -> None:
    """Closes every descriptor but `fd` and the standard three; `fd` is not passed on to children."""
    os.closerange(3, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    os.set_inheritable(fd, False)


def spawn() -> WorkerProcess:
    """Starts a worker in a session of its own; returns at once, while Python starts over there.

    Its stdin is /dev/null, its stdout and stderr a pipe, so that it holds nothing of ours. The
    worker closes whatever else it inherited. Raises UnavailableError.
    """
    try:
        ours, theirs = socket.socketpair()
        words, theirs_words = os.pipe()
        protocol_high, words_high = (
            # Above the descriptors they are put on, which may be free where we were started without stdin.
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, PROTOCOL_FD + 1)
            for fd in (theirs.fileno(), theirs_words)
        )
    except OSError as error:
        raise UnavailableError(f"worker: cannot be started: {error}") from error
    theirs.close()
    os.close(theirs_words)
    try:
        pid = os.posix_spawn(
            sys.executable,
            python("myllm.worker.main"),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, words_high, 1),
                (os.POSIX_SPAWN_DUP2, words_high, 2),
                (os.POSIX_SPAWN_DUP2, protocol_high, PROTOCOL_FD),
            ],
            setsid=True,
            setsigmask=(),
        )
    except OSError as error:
        ours.close()
        os.close(words)
        raise UnavailableError(f"worker: cannot be started: {error}") from error
    finally:
        os.close(protocol_high)
        os.close(words_high)
    os.set_blocking(words, False)
    return WorkerProcess(pid, ours, words)
