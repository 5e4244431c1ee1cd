"""Token pieces (bytes) → text that may be shown: whole UTF-8, no stop string, reasoning told apart.

Pure and per request. Must not know tokens, samplers or events.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns one request's pieces into releasable text; a text that may become a stop string is held back."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was met; it and all after it are never released."""

    def push(self, piece: bytes) -> str:
        """The text that `piece` sets free: perhaps none, perhaps also what was held before."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest at the end of a request; bytes that never became a character are U+FFFD."""
        text = self._release(self._decoder.decode(b"", True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        at = min((found for stop in self._stop if (found := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class ReasoningSplitter:
    """Tells a reasoning model's `<think>…</think>` from its answer; the marks themselves are dropped.

    Only a mark at the very start (after white space) opens a reasoning, or a prompt that ended in
    one (`inside`), as templates of reasoning models write it; an answer that merely mentions the
    mark is left alone.
    """

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, *, inside: bool = False) -> None:
        self._mark = self.CLOSE if inside else self.OPEN
        self._held = ""

    def push(self, text: str) -> list[tuple[str, bool]]:
        """`text` as (part, is reasoning) pairs; the beginning of a mark is held back until it is clear."""
        if not self._mark:
            return [(text, False)] if text else []
        text = self._held + text
        self._held = ""
        return self._open(text) if self._mark == self.OPEN else self._close(text)

    def flush(self) -> list[tuple[str, bool]]:
        """What was held back, at the end of a request."""
        held, self._held = self._held, ""
        return [(held, self._mark == self.CLOSE)] if held else []

    def _open(self, text: str) -> list[tuple[str, bool]]:
        start = text.lstrip()
        if start.startswith(self.OPEN):
            self._mark = self.CLOSE
            return self._close(start[len(self.OPEN) :])
        if self.OPEN.startswith(start):
            self._held = text
            return []
        self._mark = ""
        return [(text, False)]

    def _close(self, text: str) -> list[tuple[str, bool]]:
        thought, mark, answer = text.partition(self.CLOSE)
        if mark:
            self._mark = ""
            parts = [(thought, True), (answer.lstrip("\n"), False)]
            return [part for part in parts if part[0]]
        keep = _overlap(text, self.CLOSE)
        self._held = text[len(text) - keep :]
        return [(text[: len(text) - keep], True)] if len(text) > keep else []
