"""How a worker died, in one line: its exit status and the end of what it wrote.

Pure. Must not know processes or pipes.
"""

from __future__ import annotations

import os
import signal
from typing import Final

KEPT_BYTES: Final = 64 * 1024
"""Of a worker's stdout and stderr, the most that is kept."""
_SHOWN_LINES: Final = 3
_SHOWN_CHARS: Final = 400
_PERHAPS: Final = {
    "SIGKILL": ", perhaps for want of memory",
    "SIGILL": (
        ": this processor cannot run llama.cpp as it was built; see README.md, An illegal instruction"
    ),
}
"""What mostly is behind a signal."""


class LastWords:
    """The end of a stream: takes any number of bytes, keeps the last 64 KiB."""

    def __init__(self) -> None:
        self._data = b""

    def hear(self, data: bytes) -> None:
        self._data = (self._data + data)[-KEPT_BYTES:]

    def __str__(self) -> str:
        """The last lines as one, without control characters."""
        text = self._data.decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        joined = " | ".join(lines[-_SHOWN_LINES:])
        shown = "".join(char if char.isprintable() else " " for char in joined)
        return shown[-_SHOWN_CHARS:]


def how_it_ended(wait_status: int | None) -> str:
    """In words, what `waitpid` said; None where nobody can tell."""
    if wait_status is None:
        return "ended"
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{_PERHAPS.get(name, '')}"
