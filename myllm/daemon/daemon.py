"""The daemon: a Runtime behind a Unix socket, from its claim on the socket to its last worker's end.

Owns signals, draining, idling and what the service manager is told. Must not know what is asked on a
connection, nor how a model is kept. `main` is the background process that `myllm load` starts;
`myllm serve --no-http` calls `run` in the foreground.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

from myllm import __version__, settings
from myllm.daemon import service_manager
from myllm.daemon.claim import Claim, claim
from myllm.errors import InternalError, MyllmError, UnavailableError
from myllm.logs import Log, open_log
from myllm.paths import state_dir
from myllm.protocol import PROTOCOL, Message, encode, error_event
from myllm.runtime.call import Call
from myllm.runtime.connection import serve_connection
from myllm.runtime.fleet import Fleet
from myllm.runtime.keeper import Keeper
from myllm.runtime.memory import careful_estimate
from myllm.runtime.runtime import Runtime
from myllm.settings import Settings
from myllm.socket_file import peer_uid, socket_path
from myllm.spawning import inherit_nothing_but

GRACE: Final = 30.0
"""Seconds that running requests have to finish once it is to stop (faults.md, SIGTERM)."""
IDLE_EXIT: Final = 300.0
"""Seconds without models, requests and clients after which it ends (DESIGN.md §4)."""
IDLE_LOOKS: Final = 10
"""Times that it looks within these."""
FAREWELL: Final = 1.0
"""Seconds that clients have to read what was written to them at last."""
DESCRIPTORS: Final = 65_536
"""Enough for any number of clients; a worker closes as many at its start, one by one on macOS."""
ROOT: Final = 0


def main(fd: int) -> NoReturn:
    """The background process: says on `fd` that it listens, or what kept it from that, and runs."""
    inherit_nothing_but(fd)
    os.chdir("/")
    try:
        log = open_log(state_dir() / "daemon.log")
        status = run(settings.load(), log, kind="daemon", ready=lambda: _say(fd, {"done": True}))
    except MyllmError as error:
        _say(fd, error_event(error))
        status = error.exit_status
    except Exception as error:  # noqa: BLE001 — whoever started it gets one line
        bug = InternalError(f"daemon: {type(error).__name__}: {error}")
        _say(fd, error_event(bug))
        status = bug.exit_status
    os._exit(status)


def run(configured: Settings, log: Log, *, kind: str, ready: Callable[[], None]) -> int:
    """Serves until it is stopped or idles out; 0. `kind` is `daemon`, or `serve`, which never idles out.

    Raises MyllmError where it cannot begin: TryAgainError where another daemon runs; KeyboardInterrupt
    where it was SIGINT that stopped it.
    """
    passed = service_manager.activated()
    claimed = claim(socket_path())
    try:
        listener = passed or claimed.listen()
        _raise_descriptor_limit()
        if asyncio.run(Daemon(configured, log, kind, claimed).serve(listener, ready)) == signal.SIGINT:
            raise KeyboardInterrupt
        return 0
    finally:
        claimed.release()


class Daemon:
    """One run of it, on one event loop."""

    def __init__(self, configured: Settings, log: Log, kind: str, claimed: Claim) -> None:
        self._log = log
        self._kind = kind
        self._claim = claimed
        self._stopping = asyncio.Event()
        self._signal: int | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._configured = configured
        fleet = Fleet(configured.models_max_memory, configured.models_max_loaded)
        keeper = Keeper(fleet, configured.keep_alive, estimate=careful_estimate, log=self._note)
        self._runtime = Runtime(
            configured, keeper, log=self._note, about=self._about, operations={"shutdown": self._shutdown}
        )

    async def serve(self, listener: socket.socket, ready: Callable[[], None]) -> int | None:
        """Serves on the listening socket; returns when all is over and nothing is left behind, with the
        signal that stopped it, if one did.
        """
        loop = asyncio.get_running_loop()
        self._started = loop.time()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.set_exception_handler(self._unforeseen)
        server = await asyncio.start_unix_server(self._welcome, sock=listener)
        self._note("started", version=__version__, kind=self._kind)
        for work in (self._watchdog(), *([] if self._kind == "serve" else [self._idle()])):
            self._tasks.add(loop.create_task(work))
        self._preload()
        service_manager.notify("READY=1")
        ready()
        await self._stopping.wait()
        service_manager.notify("STOPPING=1")
        await self._runtime.drain(GRACE)
        self._claim.release()  # first, so that nobody finds a socket behind which nobody is
        server.close()
        await self._part()
        for task in self._tasks:
            task.cancel()
        await self._runtime.close()
        self._note("stopped")
        return self._signal

    # ── clients ─────────────────────────────────────────────────────────────────────────────

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, if it is ours."""
        if peer_uid(writer.get_extra_info("socket")) not in (os.getuid(), ROOT):
            writer.close()
            return
        self._clients.add(writer)
        try:
            await serve_connection(self._runtime, reader, writer, pid=os.getpid(), kind=self._kind)
        finally:
            self._clients.discard(writer)

    async def _part(self) -> None:
        """Closes all connections, after what is still to be read from them."""
        await asyncio.sleep(0)  # what was said in this round of the loop is written in the next
        clients = list(self._clients)
        for writer in clients:
            writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await asyncio.gather(*(writer.wait_closed() for writer in clients), return_exceptions=True)
        for writer in clients:
            writer.transport.abort()

    # ── what it is asked and told ───────────────────────────────────────────────────────────

    async def _shutdown(self, message: Message, call: Call, arrived: float) -> None:
        """Stops as on SIGTERM, unless somebody runs it in the foreground."""
        if self._kind == "serve":
            raise UnavailableError(f"serve: it runs as process {os.getpid()}; stop it there")
        call.finish({"done": True, "pid": os.getpid()})
        self._stopping.set()

    def _about(self) -> Message:
        return {
            **{"pid": os.getpid(), "version": __version__, "protocol": PROTOCOL, "kind": self._kind},
            "uptime_s": round(asyncio.get_running_loop().time() - self._started, 1),
            "connections": len(self._clients),
        }

    def _stop(self, number: int) -> None:
        """On the first signal drains, on the second ends at once by that signal."""
        if self._stopping.is_set():
            self._claim.release()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._note("stopping", signal=signal.Signals(number).name)
        self._signal = number
        self._stopping.set()

    def _reload(self) -> None:
        """Reads the configuration again; a bad one is logged, and the old one stays."""
        try:
            self._configured = settings.load()
        except MyllmError as error:
            self._note("configuration", level="error", error=str(error))
            return
        self._runtime.configure(self._configured)
        self._note("configuration")

    def _preload(self) -> None:
        for name in self._configured.models_preload:
            call = Call(None, lambda line: None, lambda call: None)
            self._runtime.start({"op": "load", "model": name}, call)

    # ── what goes on beside ─────────────────────────────────────────────────────────────────

    async def _idle(self) -> None:
        """Stops the daemon that has had nothing to do for a while."""
        looks = 0
        while looks < IDLE_LOOKS:
            await asyncio.sleep(IDLE_EXIT / IDLE_LOOKS)
            looks = looks + 1 if self._runtime.idle and not self._clients else 0
        self._note("idle")
        self._stopping.set()

    async def _watchdog(self) -> None:
        """Tells the service manager that the event loop runs."""
        if interval := service_manager.watchdog_interval():
            while True:
                service_manager.notify("WATCHDOG=1")
                await asyncio.sleep(interval)

    def _note(self, event: str, **fields: Any) -> None:
        self._log.write(event, **fields)
        if event != "request":
            said = f"{event} {fields.get('model', '')}"
            service_manager.notify(
                f"STATUS={' '.join(said.split())}"
            )  # a newline would begin another assignment

    def _unforeseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._note("unforeseen", level="error", error=f"{context.get('message')}: {error!r}")


def _raise_descriptor_limit() -> None:
    """A client is a descriptor, and the usual limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say(fd: int, message: Message) -> None:
    with suppress(OSError):  # whoever wanted to know is gone
        os.write(fd, encode(message))
        os.close(fd)
