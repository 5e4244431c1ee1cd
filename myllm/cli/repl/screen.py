"""What the REPL shows: its own words, and answers as they come.

Owns escaping, dimming, and that all of it is written plainly, so that it stays in the scrollback and a
terminal may change its size meanwhile. Must not know where answers come from.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, Final

from myllm.cli.console import Streams, visible
from myllm.cli.output import Output, TextOutput
from myllm.protocol import parse

_OBEY_NOTHING: Final = ("", "dumb", "unknown")
"""Values of TERM, in none of which prompt-toolkit can do its work."""
_DIMMED: Final = ("\x1b[2m", "\x1b[0m\n\n")
_TAGGED: Final = ("<think>\n", "\n</think>\n\n")
"""What stands round reasoning: escape sequences, or the tags that models use."""


class Screen:
    """The terminal of the conversation; where stdout is a file, it gets the answers and nothing else."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.obeys = streams.stdout_is_terminal and os.environ.get("TERM", "") not in _OBEY_NOTHING
        """Whether there is a terminal that knows escape sequences."""
        self._dims = self.obeys and not os.environ.get("NO_COLOR")

    def say(self, text: str) -> None:
        """The REPL's own words, where the user sees them. Raises IOFailureError."""
        shown = visible(text)
        if self.streams.stdout_is_terminal:
            self.streams.write(f"{shown}\n".encode("utf-8", "replace"))
        else:
            self.streams.stderr.write(f"{shown}\n")
            self.streams.stderr.flush()

    def send(self, sequence: str) -> None:
        """An escape sequence of ours to the terminal, where there is one that knows it."""
        if self.obeys:
            self.streams.write(sequence.encode())

    @property
    def columns(self) -> int:
        """The width of what the user sees."""
        return shutil.get_terminal_size().columns

    def answer(self) -> Output:
        """Where the events of the next answer go."""
        if not self.streams.stdout_is_terminal:
            return TextOutput(self.streams)
        return ScreenOutput(self.streams, *(_DIMMED if self._dims else _TAGGED))


class ScreenOutput:
    """An answer on a terminal, its reasoning between `begin` and `end`; it ends in exactly one newline.

    Newlines are held back until it is known that text of the same kind follows.
    """

    def __init__(self, streams: Streams, begin: str, end: str) -> None:
        self._streams = streams
        self._marks = begin, end
        self._reasoning = False
        self._held = ""
        self._wrote = False

    def token(self, line: bytes) -> None:
        event = parse(line)
        text = str(event["token"])
        if (event.get("reasoning") is True) is not self._reasoning:
            text = text.lstrip("\n")
            if not text:
                return
            self._turn()
        if not self._wrote:
            text = text.lstrip("\n")
        whole = self._held + text
        shown = whole.rstrip("\n")
        self._held = whole[len(shown) :]
        self._write(visible(shown))

    def done(self, line: bytes, event: dict[str, Any]) -> None:
        if self._reasoning:
            self._turn()
        elif self._wrote:
            self._streams.write(b"\n")

    def _turn(self) -> None:
        """From answer to reasoning, or back."""
        self._reasoning = not self._reasoning
        self._held = ""
        self._write(self._marks[0] if self._reasoning else self._marks[1])

    def _write(self, text: str) -> None:
        if text:
            self._streams.write(text.encode("utf-8", "replace"))
            self._wrote = True
