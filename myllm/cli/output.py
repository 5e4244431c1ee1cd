"""Event lines → stdout: text as it comes, or JSONL copied unchanged.

Owns what stdout looks like in either form. Must not know where the lines come from. Both forms take
the same calls, so that who reads events need not know which one it is.
"""

from __future__ import annotations

from typing import Any, Protocol

from myllm.cli.console import Streams, visible, visible_json
from myllm.protocol import parse


class Output(Protocol):
    """Where the events of one request go."""

    def token(self, line: bytes) -> None:
        """A token event."""

    def done(self, line: bytes, event: dict[str, Any]) -> None:
        """The done event, as it came and parsed; nothing follows."""


class JsonlOutput:
    """Every line as it is; on a terminal with its control characters escaped."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._escapes = streams.stdout_is_terminal

    def token(self, line: bytes) -> None:
        self._streams.write((visible_json(line) if self._escapes else line) + b"\n")

    def done(self, line: bytes, event: dict[str, Any]) -> None:
        self.token(line)


class TextOutput:
    """The answer's text without its reasoning, ending in exactly one newline; nothing for an empty one.

    Newlines are held back until it is known that text follows. On a terminal control characters are
    escaped; into a pipe text is raw.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._escapes = streams.stdout_is_terminal
        self._newlines = ""
        self._wrote = False

    def token(self, line: bytes) -> None:
        event = parse(line)
        if event.get("reasoning") is True:
            return
        held = self._newlines + str(event["token"])
        text = held.rstrip("\n")
        self._newlines = held[len(text) :]
        if text:
            self._streams.write((visible(text) if self._escapes else text).encode())
            self._wrote = True

    def done(self, line: bytes, event: dict[str, Any]) -> None:
        if self._wrote or self._newlines:
            self._streams.write(b"\n")


class CountOutput:
    """The number of tokens of a prompt, as text."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def token(self, line: bytes) -> None:
        """There are none."""

    def done(self, line: bytes, event: dict[str, Any]) -> None:
        if "usage" in event:
            self._streams.write(b"%d\n" % event["usage"]["prompt_tokens"])


def statistics(event: dict[str, Any]) -> str:
    """`-v`'s one line, from a done event."""
    usage, timings = event.get("usage", {}), event.get("timings", {})
    parts = [f"{usage.get('prompt_tokens', 0):,} prompt tokens ({usage.get('cached_tokens', 0):,} cached)"]
    if "completion_tokens" in usage:
        parts.append(f"{usage['completion_tokens']:,} tokens at {timings.get('tokens_per_second', 0):g}/s")
        parts.append(f"first after {timings.get('ttft_ms', 0):.0f} ms")
    if load_ms := timings.get("load_ms"):
        parts.append(f"load {load_ms:.0f} ms")
    if "seed" in event:
        parts.append(f"seed {event['seed']}")
    return f"{event.get('model', 'model')}: {', '.join([*parts, event.get('finish_reason', 'counted')])}"


def losses(event: dict[str, Any]) -> str | None:
    """What was left out of the prompt so that it fits; None where nothing was."""
    usage = event.get("usage", {})
    lost = [f"{n:,} {what}" for what in ("tokens", "messages") if (n := usage.get(f"dropped_{what}"))]
    return f"prompt: {' and '.join(lost)} left out so that it fits the window" if lost else None
