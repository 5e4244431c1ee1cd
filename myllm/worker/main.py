"""The worker process: one loaded model behind a socketpair.

Owns what this process inherits and how it ends; reads messages on the main thread and hands the
work to an `Intake`. Must not know asyncio, the Runtime's connections or how models are found.

Messages in: `load` once, then `gen`, `count`, `cancel`, `status`. When the other side is gone, so
is this process, at once, whatever llama.cpp is doing; only what is already computed is still written to disk.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import Final

from myllm import __version__
from myllm.errors import MyllmError
from myllm.protocol import MessageReader, encode, hello
from myllm.spawning import inherit_nothing_but
from myllm.worker.intake import Intake
from myllm.worker.outbox import Outbox

CHUNK: Final = 256 * 1024
SETTLE: Final = 1.0
"""Seconds that a process whose work is over may still take to write down what others can use again."""


def main(fd: int) -> None:
    """Runs the worker on the inherited descriptor `fd`; does not return."""
    inherit_nothing_but(fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # OpenBLAS, which numpy brings and nothing here uses, would start threads and reserve memory for each.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    threading.Thread(target=import_engine, name="imports", daemon=True).start()
    connection = socket.socket(fileno=fd)
    outbox = Outbox(connection)
    outbox.send(encode(hello(__version__)))
    serve(connection, Intake(outbox))


def import_engine() -> None:
    """Has the slow imports done by the time a path to load arrives; numpy's, while that is loaded."""
    with suppress(Exception):  # opening the engine raises it again, where it can be reported
        for module in ("myllm.engine.llama", "myllm.engine.engine", "myllm.engine.llama_runner"):
            import_module(module)


def serve(connection: socket.socket, intake: Intake) -> None:
    """Takes messages until the other side is gone, then ends the process."""
    reader = MessageReader()
    try:
        while data := connection.recv(CHUNK):
            for message in reader.feed(data):
                intake.take(message)
    except ConnectionError:
        pass
    except MyllmError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(error.exit_status)
    intake.settle(SETTLE)
    os._exit(0)
