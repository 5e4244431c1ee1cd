"""A worker's way out: the events of one step as one write.

Owns the order of lines on the socket. Must not know what they mean.
"""

from __future__ import annotations

import os
import socket
import threading


class Outbox:
    """Sends lines from any thread; blocks while the other side does not read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, lines: bytes) -> None:
        """One or more whole lines, in one write. Where nobody listens any more the process ends."""
        with self._lock:
            try:
                self._connection.sendall(lines)
            except OSError:
                os._exit(0)
