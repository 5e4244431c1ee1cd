"""What Ctrl-C and a request to end do while the REPL works: stop the answer first, then more.

Owns the handlers of SIGINT, SIGTERM and SIGHUP. Must not know what an answer is. For the main thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
"""SIGHUP: the terminal is gone."""


class Ended(SystemExit):
    """The process was asked to end, by the signal `number`.

    A SystemExit, as asyncio lets only that and KeyboardInterrupt through, and prompt-toolkit runs on it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Signals:
    """The handlers, inside its block. Raises Ended where one of `ENDING` comes; after the answer's end, if
    one is being stopped.
    """

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._end: Ended | None = None

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._on_end) for number in ENDING}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Inside this block the first Ctrl-C calls `stop`, on a thread; the next one is a KeyboardInterrupt.

        On a thread, since this one may hold the very lock that `stop` takes.
        """
        self._stop = stop
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._stop = None
            if self._end:  # before all that went wrong on the way, such as a terminal that is gone
                raise self._end

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._stopped():
            raise KeyboardInterrupt

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        self._end = Ended(number)
        if not self._stopped():
            raise self._end

    def _stopped(self) -> bool:
        """Whether there was something left to stop."""
        stop, self._stop = self._stop, None
        if stop is not None:
            threading.Thread(target=stop, daemon=True).start()
        return stop is not None
