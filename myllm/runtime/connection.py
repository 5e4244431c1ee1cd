"""One connection that speaks MyLLM's own protocol: hello, requests in, event lines out.

Owns the ids of its requests and what waits to be read. Must not know models or backends; works on any asyncio
stream pair, a socketpair as well as a Unix socket.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from myllm import __version__, events
from myllm.errors import BadDataError, MyllmError, UnavailableError, UsageError
from myllm.protocol import PROTOCOL, Message, MessageReader, encode, hello, tagged, with_id
from myllm.runtime.asker import PATIENCE
from myllm.runtime.call import Call

if TYPE_CHECKING:
    from myllm.runtime.runtime import Runtime

CHUNK: Final = 256 * 1024
MAX_ID: Final = 2**53
HIGH_WATER: Final = 1024 * 1024
"""Bytes that wait for a client to read before its calls pause."""
LOW_WATER: Final = 64 * 1024
LOOK: Final = 0.2
"""Seconds between two looks whether a client that waits for a place is still there."""


async def serve_connection(
    runtime: Runtime, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, **about: Any
) -> None:
    """Serves one client until it is gone or cannot be understood; its calls end with it.

    `about` goes into the hello.
    """
    connection = Connection(runtime, writer)
    connection.write(encode(hello(__version__, **about)))
    try:
        await connection.serve(reader)
    except MyllmError as error:
        connection.write(encode(events.failed(error)))
    except OSError:
        pass
    finally:
        connection.close()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


class Lines:
    """A request's end of its connection: events as lines, under the request's id or none."""

    def __init__(self, connection: Connection, request_id: int | None) -> None:
        self._connection, self._id = connection, request_id

    def event(self, event: Message) -> None:
        self._connection.write(encode(tagged(event, self._id)))

    def line(self, line: bytes, start: int) -> None:
        self._connection.write(with_id(line, start, self._id))

    def done(self, event: Message) -> None:
        self._connection.forget(self._id)
        self.event(event)


class Connection:
    """The requests of one client."""

    def __init__(self, runtime: Runtime, writer: asyncio.StreamWriter) -> None:
        self._asker = runtime.welcome()
        self._writer = writer
        self._calls: dict[int | None, Call] = {}
        self._lines: list[bytes] = []
        self._stalled: asyncio.Task[None] | None = None
        writer.transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Takes messages until the client is gone. Raises MyllmError where it talks nonsense."""
        messages = MessageReader()
        take = self._greet
        while data := await reader.read(CHUNK):
            for message in messages.feed(data):
                await take(message)
                take = self._take

    def write(self, line: bytes) -> None:
        """Sends a line; those of one round of the event loop go out as one write."""
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._flush)
        self._lines.append(line)

    def forget(self, request_id: int | None) -> None:
        """The request of that id is over; another may have it."""
        self._calls.pop(request_id, None)

    def close(self) -> None:
        """Ends all requests of a client that is gone."""
        self._asker.leave()
        self._calls.clear()  # they know this connection: nobody but the garbage collector would free either
        self._flush()
        if self._stalled:
            self._stalled.cancel()

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines and not self._writer.is_closing():
            self._writer.write(b"".join(lines))
            if not self._stalled and self._writer.transport.get_write_buffer_size() > HIGH_WATER:
                self._stalled = asyncio.get_running_loop().create_task(self._stall())

    async def _stall(self) -> None:
        """Pauses the requests of a client that does not read until it does; cut off after `PATIENCE`."""
        self._asker.pause(True)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._writer.drain()
        except (TimeoutError, OSError):
            self._writer.transport.abort()
            return
        self._stalled = None
        self._asker.pause(False)

    async def _greet(self, message: Message) -> None:
        greeting = message.get("hello")
        if not isinstance(greeting, dict):
            raise BadDataError("connection: the first line must be a hello")
        if greeting.get("protocol") != PROTOCOL:
            raise UnavailableError(
                f"connection: the other side speaks protocol {greeting.get('protocol')!r:.20}, this side "
                f"{PROTOCOL}; use one version of MyLLM"
            )

    async def _take(self, message: Message) -> None:
        request_id = _checked_id(message.get("id"))
        if message.get("op") == "cancel":
            if call := self._calls.get(request_id):
                call.cancel()
            return
        if request_id in self._calls:
            raise UsageError("request: its id is that of another in flight; ids must be unique")
        if self._calls and (request_id is None or None in self._calls):
            raise UsageError("request: one without id must be alone on its connection")
        await self._while_there(self._reading)
        if request_id is not None:
            await self._while_there(self._asker.place)
        message.pop("id", None)
        call = self._asker.ask(message, Lines(self, request_id))
        if not call.over:
            self._calls[request_id] = call

    async def _while_there(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Waits for what may be waited for more than once. Raises ConnectionResetError where the client
        goes: nothing is read meanwhile, so nobody else would notice.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    return await wait()
            if self._writer.is_closing() or _has_hung_up(self._writer.get_extra_info("socket").fileno()):
                raise ConnectionResetError

    async def _reading(self) -> None:
        """Waits until the client reads what it has got already."""
        while self._stalled:
            await asyncio.wait({self._stalled})


def _has_hung_up(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is told unasked
    return bool(poll.poll(0))


def _checked_id(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 <= value <= MAX_ID):
        return value
    raise UsageError(f"id: expected a whole number from 0 to {MAX_ID}, not {value!r:.80}")
