"""The standard streams as one object: bytes in, bytes out, notes on stderr.

Owns what a good Unix filter does with its three descriptors: partial writes, a reader that is gone,
a full disk, a silent stdin, and keeping terminals safe from control characters. Must not know
commands or models. Works on descriptors, so that nothing is left in a buffer that Python would
complain about at exit.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from typing import Final, TextIO

from myllm.errors import IOFailureError, MyllmError

CHUNK: Final = 64 * 1024
"""Bytes read at once: a pipe holds no more, and all lines of a chunk are in memory together."""
PATIENCE: Final = 2.0
"""Seconds of silence on stdin after which stderr says what is being waited for: who forgot to give input
would think that the model is slow."""
_CONTROLS: Final = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
"""C0 without tab and newline, DEL, C1. Each is escaped by itself, so no sequence can be cut in two.
(Compiled when first used, which most commands never do.)"""
_JSON_CONTROLS: Final = rb"\x7f|\xc2[\x80-\x9f]"
"""What JSON leaves as it is of the above, in UTF-8."""


class Streams:
    """stdin, stdout and stderr of one command; tests inject their own.

    `debug` says whether errors are shown with their traceback.
    """

    def __init__(self, stdin: int = 0, stdout: int = 1, stderr: TextIO | None = None) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr if stderr is not None else sys.stderr
        self.debug = False
        self.before_note: Callable[[], None] = lambda: None
        """Called before a line is written to stderr; a progress bar clears itself with it."""

    @property
    def stdin_is_terminal(self) -> bool:
        return os.isatty(self.stdin)

    @property
    def stdout_is_terminal(self) -> bool:
        return os.isatty(self.stdout)

    @property
    def stderr_is_terminal(self) -> bool:
        return self.stderr.isatty()

    @property
    def columns(self) -> int | None:
        """How wide stdout's terminal is; None where it is none, or does not say."""
        try:
            return os.get_terminal_size(self.stdout).columns or None
        except OSError:
            return None

    @property
    def takes_colour(self) -> bool:
        """Whether stdout is a terminal that shows colours to somebody who wants them (no-color.org)."""
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return wanted and self.stdout_is_terminal

    def chunks(self, awaited: str) -> Iterator[bytes]:
        """What comes on stdin, until its end; blocks between chunks of at most `CHUNK` bytes.

        Where nothing has come after `PATIENCE` seconds, stderr says that `awaited` is waited for.
        Raises IOFailureError.
        """
        try:
            self.await_input(awaited)
            while data := os.read(self.stdin, CHUNK):
                yield data
        except (OSError, ValueError) as error:
            raise IOFailureError(f"stdin: cannot be read: {error}") from error

    def await_input(self, awaited: str) -> None:
        """Says on stderr that `awaited` is waited for, where nothing comes for `PATIENCE` seconds."""
        if not select.select([self.stdin], [], [], PATIENCE)[0]:
            self.note(f"waiting for {awaited}")

    def write(self, data: bytes) -> None:
        """All of `data` to stdout, at once. Raises IOFailureError; BrokenPipeError where nobody reads."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.stdout, view) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise write_failure(error) from error

    def note(self, text: str) -> None:
        """One line on stderr, `myllm: text`; a stderr that cannot be written is nobody's loss."""
        self.before_note()
        try:
            self.stderr.write(f"myllm: {visible(text)}\n")
            self.stderr.flush()
        except (OSError, ValueError):
            pass

    @property
    def can_ask(self) -> bool:
        """Whether there is somebody to read a question and type an answer."""
        return self.stdin_is_terminal and self.stderr_is_terminal

    def ask(self, question: str) -> str:
        """A person's answer, a line, which is waited for; nothing where the input ends."""
        self.before_note()
        self.stderr.write(f"myllm: {visible(question)} ")
        self.stderr.flush()
        return os.read(self.stdin, CHUNK).decode("utf-8", "replace").strip()

    def report(self, error: MyllmError) -> None:
        """An error as one line; with `debug` its traceback comes first."""
        if self.debug:
            import traceback

            self.before_note()
            traceback.print_exception(error, file=self.stderr)
        self.note(str(error))


def write_failure(error: OSError) -> IOFailureError:
    """What a failed write to stdout means to the user."""
    return IOFailureError(f"stdout: cannot be written: {error.strerror}; the output is not complete")


def visible(text: str) -> str:
    r"""`text` safe for a terminal: control characters but tab and newline become `\x1b` and the like."""
    return re.sub(_CONTROLS, lambda match: f"\\x{ord(match[0]):02x}", text)


def visible_json(line: bytes) -> bytes:
    r"""A line of JSON safe for a terminal, with the same meaning: DEL and C1 become `\u009b` and the like."""
    return re.sub(_JSON_CONTROLS, lambda match: b"\\u%04x" % ord(match[0].decode()), line)
