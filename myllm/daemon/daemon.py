"""The daemon: a Runtime behind front doors, from its claim on the socket to its last worker's end.

Owns draining, idling, signals and what the service manager is told. Must not know what is asked at a door,
nor how a model is kept. `main` is the background process that `myllm load` starts; `myllm serve --no-http`
calls `run` in the foreground. `Daemon` itself takes no signal and no event loop for its own.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

from myllm import __version__, events, settings
from myllm.daemon import service_manager
from myllm.daemon.claim import Claim, claim
from myllm.daemon.door import Door, SocketDoor
from myllm.errors import InternalError, MyllmError, UnavailableError
from myllm.logs import Log, open_log
from myllm.paths import state_dir
from myllm.protocol import PROTOCOL, Message, encode
from myllm.requests import Request
from myllm.runtime.call import Call
from myllm.runtime.fleet import Fleet
from myllm.runtime.keeper import Keeper
from myllm.runtime.memory import careful_estimate
from myllm.runtime.reply import Unheard
from myllm.runtime.runtime import Runtime
from myllm.settings import Settings
from myllm.socket_file import socket_path
from myllm.spawning import inherit_nothing_but

GRACE: Final = 30.0
"""Seconds that running requests have to finish once it is to stop; a service manager waits longer."""
IDLE_EXIT: Final = 300.0
"""Seconds without models, requests and clients after which it ends."""
IDLE_LOOKS: Final = 10
"""Times that it looks within these."""
DESCRIPTORS: Final = 65_536
"""Enough for any number of clients; a worker closes as many at its start, one by one on macOS."""


def main(fd: int) -> NoReturn:
    """The background process: says on `fd` that it listens, or what kept it from that, and runs."""
    inherit_nothing_but(fd)
    os.chdir("/")
    try:
        log = open_log(state_dir() / "daemon.log")
        status = run(settings.load(), log, kind="daemon", ready=lambda: _say(fd, events.done()))
    except MyllmError as error:
        _say(fd, events.failed(error))
        status = error.exit_status
    except Exception as error:  # noqa: BLE001 — whoever started it gets one line
        bug = InternalError(f"daemon: {type(error).__name__}: {error}")
        _say(fd, events.failed(bug))
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
        door = SocketDoor(passed or claimed.listen(), pid=os.getpid(), kind=kind)
        _raise_descriptor_limit()
        if asyncio.run(_serve(Daemon(configured, log, kind, [door]), claimed, ready)) == signal.SIGINT:
            raise KeyboardInterrupt
        return 0
    finally:
        claimed.release()


async def _serve(daemon: Daemon, claimed: Claim, ready: Callable[[], None]) -> int | None:
    """Serves on this process's own loop, under its signals; the one that stopped it, if one did."""
    stopped_by: list[int] = []

    def stop(number: int) -> None:
        """On the first signal drains, on the second ends at once by that signal."""
        if daemon.stopping:
            claimed.release()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        daemon.note("stopping", signal=signal.Signals(number).name)
        stopped_by.append(number)
        daemon.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    loop.set_exception_handler(daemon.unforeseen)
    # The claim goes first, so that nobody finds a socket behind which nobody is.
    await daemon.serve(ready, drained=claimed.release)
    return stopped_by[0] if stopped_by else None


class Daemon:
    """One run of it, on whatever event loop it is served."""

    def __init__(self, configured: Settings, log: Log, kind: str, doors: Sequence[Door]) -> None:
        self._log = log
        self._kind = kind
        self._doors = doors
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._configured = configured
        fleet = Fleet(configured.models_max_memory, configured.models_max_loaded)
        keeper = Keeper(fleet, configured.keep_alive, estimate=careful_estimate, log=self.note)
        self._runtime = Runtime(
            configured, keeper, log=self.note, about=self._about, operations={"shutdown": self._shutdown}
        )

    @property
    def stopping(self) -> bool:
        """Whether it drains, or is over."""
        return self._stopping.is_set()

    async def serve(self, ready: Callable[[], None], drained: Callable[[], None] = lambda: None) -> None:
        """Opens its doors; returns after `stop`, when all is over and nothing is left behind.

        `ready` is called when the doors are open, `drained` when what ran has ended, before they close.
        """
        loop = asyncio.get_running_loop()
        self._started = loop.time()
        for door in self._doors:
            await door.open(self._runtime)
        self.note("started", version=__version__, kind=self._kind)
        for work in (self._watchdog(), *([] if self._kind == "serve" else [self._idle()])):
            self._tasks.add(loop.create_task(work))
        for name in self._configured.models_preload:
            self._runtime.welcome().ask({"op": "load", "model": name}, Unheard())
        service_manager.notify("READY=1")
        ready()
        await self._stopping.wait()
        service_manager.notify("STOPPING=1")
        await self._runtime.drain(GRACE)
        drained()
        await asyncio.gather(*(door.close() for door in self._doors))
        for task in self._tasks:
            task.cancel()
        await self._runtime.close()
        self.note("stopped")

    def stop(self) -> None:
        """Has it finish what runs, and end."""
        self._stopping.set()

    def reload(self) -> None:
        """Reads the configuration again; a bad one is logged, and the old one stays."""
        try:
            self._configured = settings.load()
        except MyllmError as error:
            self.note("configuration", level="error", error=str(error))
            return
        self._runtime.configure(self._configured)
        self.note("configuration")

    def note(self, event: str, **fields: Any) -> None:
        """Logs what happened, and tells the service manager."""
        self._log.write(event, **fields)
        if event != "request":
            said = f"{event} {fields.get('model', '')}"
            # One line: a newline would begin another assignment.
            service_manager.notify(f"STATUS={' '.join(said.split())}")

    def unforeseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs what nobody caught, for `loop.set_exception_handler`."""
        error = context.get("exception")
        self.note("unforeseen", level="error", error=f"{context.get('message')}: {error!r}")

    # ── what it is asked ────────────────────────────────────────────────────────────────────

    async def _shutdown(self, request: Request, call: Call, arrived: float) -> None:
        """Stops as on SIGTERM, unless somebody runs it in the foreground."""
        if self._kind == "serve":
            raise UnavailableError(f"serve: it runs as process {os.getpid()}; stop it there")
        call.done(events.done(pid=os.getpid()))
        self.stop()

    def _about(self) -> Message:
        return {
            **{"pid": os.getpid(), "version": __version__, "protocol": PROTOCOL, "kind": self._kind},
            "uptime_s": round(asyncio.get_running_loop().time() - self._started, 1),
            "connections": self._n_clients,
        }

    @property
    def _n_clients(self) -> int:
        return sum(door.n_clients for door in self._doors)

    # ── what goes on beside ─────────────────────────────────────────────────────────────────

    async def _idle(self) -> None:
        """Stops the daemon that has had nothing to do for a while."""
        looks = 0
        while looks <= IDLE_LOOKS:  # the first only finds it idle, and the others measure
            await asyncio.sleep(IDLE_EXIT / IDLE_LOOKS)
            looks = looks + 1 if self._runtime.idle and not self._n_clients else 0
        self.note("idle")
        self.stop()

    async def _watchdog(self) -> None:
        """Tells the service manager that the event loop runs."""
        if interval := service_manager.watchdog_interval():
            while True:
                service_manager.notify("WATCHDOG=1")
                await asyncio.sleep(interval)


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
