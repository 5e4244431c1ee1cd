"""A Runtime of one's own for one command: on a thread, behind a socketpair.

Owns that thread's beginning and end. Must not know what the command is.
"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Final

from myllm.client.client import Client
from myllm.spawning import WorkerProcess

if TYPE_CHECKING:
    from myllm.settings import Settings

CLOSE_WAIT: Final = 0.05
"""Seconds that closing waits for the worker's end; what is not over by then ends by itself."""


def run_cold(settings: Settings, worker: WorkerProcess | None) -> Client:
    """Starts the Runtime's thread; returns before it is up."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=_run, args=(settings, theirs, worker), name="runtime", daemon=True)
    thread.start()
    return Client(ours, on_close=lambda: thread.join(CLOSE_WAIT))


def _run(settings: Settings, connection: socket.socket, worker: WorkerProcess | None) -> None:
    import asyncio

    asyncio.run(_serve(settings, connection, worker))


async def _serve(settings: Settings, connection: socket.socket, worker: WorkerProcess | None) -> None:
    import asyncio

    from myllm.runtime.connection import serve_connection
    from myllm.runtime.fleet import Fleet
    from myllm.runtime.keeper import Keeper
    from myllm.runtime.runtime import Runtime
    from myllm.runtime.worker import Spare

    reader, writer = await asyncio.open_connection(sock=connection)
    fleet = Fleet(settings.models_max_memory, settings.models_max_loaded)
    workers = Spare(worker)
    runtime = Runtime(settings, Keeper(fleet, None, workers.start))
    try:
        await serve_connection(runtime, reader, writer)
    finally:
        await runtime.close()
        await workers.close()
