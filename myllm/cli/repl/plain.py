"""Messages read as plain lines, where no editor can be: a terminal that obeys nothing, stdout in a file.

Owns lines and `\"\"\"` blocks. Must not know commands or prompt-toolkit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from myllm.cli.console import CHUNK, Streams, visible
from myllm.cli.repl.commands import in_block
from myllm.errors import IOFailureError


class PlainReader:
    """The terminal's own line editing; prompts go to stderr, since stdout may be a file."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._buffer = b""

    def read(self, before: str = "") -> str:
        """The next message, which may take several lines; blocks. `before` is what it is to replace, shown.

        Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C, IOFailureError.
        """
        if before:
            self._show(f"{before}\n")
        self._show("> ")
        typed = self._line()
        while in_block(typed):
            self._show("  ")
            typed += self._line()
        return typed

    def awaiting(self) -> AbstractContextManager[None]:
        """While an answer comes, the terminal goes on as it is."""
        return nullcontext()

    def _line(self) -> str:
        """A line with its newline, or what stands before Ctrl-D without one."""
        for data in self._chunks():
            self._buffer += data
            if b"\n" in data:
                break
        line, newline, self._buffer = self._buffer.partition(b"\n")
        if not line and not newline:
            self._show("\n")
            raise EOFError
        return (line + newline).decode("utf-8", "replace")

    def _chunks(self) -> Iterator[bytes]:
        if b"\n" in self._buffer:
            return
        try:
            while data := os.read(self._streams.stdin, CHUNK):
                yield data
        except OSError as error:
            raise IOFailureError(f"stdin: cannot be read: {error}") from error

    def _show(self, text: str) -> None:
        self._streams.stderr.write(visible(text))
        self._streams.stderr.flush()
