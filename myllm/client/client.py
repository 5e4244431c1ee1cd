"""The blocking client of a Runtime: requests out, event lines in.

The CLI's one way to models, cold and with a daemon. Must not know which of the two it is, nor
click or asyncio. Light: what it imports, every command pays for.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from myllm import __version__
from myllm.errors import TryAgainError, UnavailableError, from_wire
from myllm.protocol import PROTOCOL, Message, MessageReader, encode, hello, is_done, parse

CHUNK: Final = 256 * 1024


class Client:
    """One connection. Use `stream` for one request at a time, or `send` and `events` for many in flight.

    `send` may be called from one thread while another iterates; the rest is for one thread.
    """

    def __init__(self, connection: socket.socket, on_close: Callable[[], None] = lambda: None) -> None:
        self._connection = connection
        self._on_close = on_close
        self._reader = MessageReader()
        self._lines: deque[bytes] = deque()
        self._greeting: Message | None = None
        self._sending = threading.Lock()
        self._transmit(encode(hello(__version__)))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def greeting(self) -> Message:
        """The other side's hello: `protocol`, `version`, and a daemon's `pid` and `kind`. The first call
        waits for it. Raises UnavailableError.
        """
        if self._greeting is None:
            message = parse(self._next_line())
            if error := message.get("error"):
                raise from_wire(error)
            greeting = message.get("hello")
            if not isinstance(greeting, dict):
                raise UnavailableError("runtime: what answers is no MyLLM; is another program there?")
            self._greeting = greeting
        return self._greeting

    @property
    def max_in_flight(self) -> int:
        """How many requests may run at once on this connection. Raises UnavailableError."""
        if self.greeting.get("protocol") != PROTOCOL:
            raise UnavailableError("runtime: it speaks another protocol; use one version of MyLLM")
        return int(self.greeting.get("max_in_flight", 1))

    def stream(self, request: Message) -> Iterator[bytes]:
        """Sends a request without id; yields its event lines, without newline, the done line last.

        Raises UnavailableError where the other side vanishes before.
        """
        with suppress(UnavailableError):  # what the other side said before it went is still to be read
            self.send(request)
        for line in self.events():
            yield line
            if is_done(line):
                return

    def send(self, request: Message) -> None:
        """Sends one request; with an `id` it may be one of many in flight. Raises UnavailableError."""
        self._transmit(encode(request))

    def events(self) -> Iterator[bytes]:
        """Event lines of all requests in flight, as they come, without newline; blocks between them.

        Never ends by itself: whoever counts the done lines knows when to stop. Raises
        UnavailableError where the other side vanishes.
        """
        for lines in self.batches():
            yield from lines

    def batches(self) -> Iterator[list[bytes]]:
        """The same lines, as many at once as there are."""
        _ = self.max_in_flight
        while True:
            first = self._next_line()
            lines, self._lines = [first, *self._lines], deque()
            yield lines

    def close(self) -> None:
        """Ends the connection, and with it everything in flight. Returns at once, or nearly so."""
        with suppress(OSError):  # where the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._on_close()

    def _next_line(self) -> bytes:
        while not self._lines:
            try:
                data = self._connection.recv(CHUNK)
            except TimeoutError as error:
                raise TryAgainError("daemon: it does not answer; try again, or see its log") from error
            except OSError:
                data = b""
            if not data:
                raise UnavailableError("runtime: the connection ended before the answer did; try again")
            self._lines.extend(self._reader.feed_lines(data))
        return self._lines.popleft()

    def _transmit(self, lines: bytes) -> None:
        with self._sending:
            try:
                self._connection.sendall(lines)
            except OSError as error:
                raise UnavailableError(f"runtime: the connection is gone: {error}; try again") from error
