"""The seam between the Runtime and whatever answers for a model: a worker process, a remote server, a script.

A model is a file or an endpoint; a backend has one ready. A second kind implements `Backend` and passes
tests/runtime/test_backend_contract.py. Must not know which kinds there are, who asks, or what for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from myllm.protocol import Message
from myllm.requests import LoadOptions
from myllm.runtime.reply import Reply


class Backend(Protocol):
    """One model, ready to answer many requests at once. Everything happens on one event loop, and nothing
    but `status` and `close` waits.
    """

    @property
    def busy(self) -> bool:
        """Whether it has requests."""

    @property
    def pid(self) -> int | None:
        """The process that has the model, where there is one on this machine."""

    @property
    def window(self) -> int | None:
        """The most tokens of prompt and answer, once the model is ready; None where that is not known."""

    @property
    def last_words(self) -> str:
        """The end of what it said beside its events, in one line: why it died, perhaps."""

    @property
    def dismissed(self) -> bool:
        """Whether its end was asked for."""

    async def load(
        self, path: Path, name: str, options: LoadOptions, progress: Callable[[Message], None]
    ) -> Message:
        """Readies the model, called `name` to users; `progress` takes `loading` events. Raises MyllmError."""

    def submit(self, message: Message, client: int, reply: Reply) -> None:
        """Takes a request in: `op` and what is asked. Its events, exactly one done event at last, go to
        `reply`, an error where the backend cannot answer any more. `client` is whose it is: clients share a
        backend evenly.
        """

    def cancel(self, reply: Reply) -> None:
        """Asks for the end of the request that `reply` is for; its done event follows. Ignored once over."""

    def pause(self, reply: Reply, paused: bool) -> None:
        """Stops that request, or lets it go on from where it was. Ignored once over."""

    async def status(self) -> Message:
        """What it says of itself, see `Engine.status`. Raises TimeoutError, MyllmError."""

    def when_idle(self, tell: Callable[[], None]) -> None:
        """Has `tell` called whenever the last of its requests has ended."""

    def when_dead(self, tell: Callable[[asyncio.Task[None]], None]) -> None:
        """Has `tell` called as soon as it is known to end, asked or unasked, with the task that clears away
        what is left of it and fails its requests.
        """

    async def close(self) -> None:
        """Ends it, which frees all it had; its requests fail."""
