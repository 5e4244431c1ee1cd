"""What is typed while an answer comes: kept for the next prompt, and not shown in the midst of the answer.

Owns the terminal's modes in that time. Must not know what reads the input later.
"""

from __future__ import annotations

import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from myllm.errors import MyllmError

_INPUT, _LOCAL = 0, 3
"""Where tcgetattr has these flags."""
PASTES_MARKED: Final = "\x1b[?2004h"
PASTES_BARE: Final = "\x1b[?2004l"


@contextmanager
def held_input(fd: int, send: Callable[[str], None]) -> Iterator[None]:
    """Inside the block the terminal `fd` echoes nothing and changes nothing of what is typed; Ctrl-C works.

    Pastes stay marked as such, so that the prompt takes one for one message and not for many. Without line
    mode, a long one waits in the terminal instead of being cut at the kernel's 4,096 bytes.
    """
    before = termios.tcgetattr(fd)
    held = [*before]
    held[_INPUT] &= ~termios.ICRNL
    held[_LOCAL] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(fd, termios.TCSANOW, held)
    send(PASTES_MARKED)
    try:
        yield
    finally:
        with suppress(termios.error, MyllmError):  # the terminal may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)
            send(PASTES_BARE)
