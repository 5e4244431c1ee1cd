"""One turn: a request → its events on the screen, with Ctrl-C stopping the answer.

Owns the connection to the Runtime, made anew where it was lost. Must not know sessions or commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from myllm.cli.progress import Progress
from myllm.cli.repl.screen import Screen
from myllm.cli.repl.signals import Signals
from myllm.errors import UnavailableError
from myllm.protocol import TOKEN_START, Message, parse


class TurnClient(Protocol):
    """What a turn needs of a `myllm.client.client.Client`."""

    def stream(self, request: Message) -> Iterator[bytes]: ...
    def send(self, request: Message) -> None: ...
    def close(self) -> None: ...


class Turns:
    """Asks turns, one at a time, on one connection while it lasts."""

    def __init__(self, screen: Screen, signals: Signals, open_client: Callable[[], TurnClient]) -> None:
        self._screen = screen
        self._signals = signals
        self._open_client = open_client
        self._client: TurnClient | None = None

    def open(self) -> TurnClient:
        """The connection; a cold one starts its worker now. Raises UnavailableError."""
        if self._client is None:
            self._client = self._open_client()
        return self._client

    def close(self) -> None:
        """Ends the connection, and with it what is in flight."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def ask(self, request: Message) -> dict[str, Any]:
        """Runs a turn, shows its answer, and returns the done event, which may hold an error.

        Raises UnavailableError and TryAgainError where the Runtime is gone, KeyboardInterrupt at the second
        Ctrl-C; the next turn then makes a new connection.
        """
        client = self.open()

        def stop() -> None:
            with suppress(UnavailableError):
                client.send({"op": "cancel"})

        try:
            with self._signals.stopping(stop):
                return self._shown(client.stream(request))
        except BaseException:  # whatever it was, what is left in the connection belongs to no turn
            self.close()
            raise

    def _shown(self, lines: Iterator[bytes]) -> dict[str, Any]:
        output = self._screen.answer()
        progress = Progress(self._screen.streams)
        line, event = b"", {}
        try:
            for line in lines:
                if line.startswith(TOKEN_START):
                    progress.close()
                    output.token(line)
                elif note := (event := parse(line)).get("note"):
                    self._screen.streams.note(str(note))
                elif event.get("done") is not True:
                    progress.preparing(event)
        finally:
            progress.close()
            output.done(line, event)  # also where it broke off: the screen is left at the start of a line
        return event
