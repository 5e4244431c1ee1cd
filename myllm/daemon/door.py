"""How requests come to a daemon: front doors, the Unix socket the first.

Owns who is let in by the socket. Must not know models, signals or how long a daemon lives. Another door
(HTTP) implements `Door`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Final, Protocol

from myllm.runtime.connection import serve_connection
from myllm.runtime.runtime import Runtime
from myllm.socket_file import ROOT, peer_uid

FAREWELL: Final = 1.0
"""Seconds that clients have to read what was written to them at last."""


class Door(Protocol):
    """One way in; everything happens on the daemon's event loop."""

    @property
    def n_clients(self) -> int:
        """How many are inside."""

    async def open(self, runtime: Runtime) -> None:
        """Lets clients in from now on, whose requests go to `runtime`. Raises MyllmError."""

    async def close(self) -> None:
        """Lets nobody in any more; returns when those inside have had time to read what was said last."""


class SocketDoor:
    """The daemon's Unix socket, which listens already; `about` is what its hello tells of the process."""

    def __init__(self, listener: socket.socket, **about: object) -> None:
        self._listener = listener
        self._about = about
        self._clients: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def n_clients(self) -> int:
        return len(self._clients)

    async def open(self, runtime: Runtime) -> None:
        async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """One client, if it is ours."""
            if peer_uid(writer.get_extra_info("socket")) not in (os.getuid(), ROOT):
                writer.close()
                return
            self._clients.add(writer)
            try:
                await serve_connection(runtime, reader, writer, **self._about)
            finally:
                self._clients.discard(writer)

        self._server = await asyncio.start_unix_server(welcome, sock=self._listener)

    async def close(self) -> None:
        if self._server:
            self._server.close()
        await asyncio.sleep(0)  # what was said in this round of the loop is written in the next
        clients = list(self._clients)
        for writer in clients:
            writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await asyncio.gather(*(writer.wait_closed() for writer in clients), return_exceptions=True)
        for writer in clients:
            writer.transport.abort()
