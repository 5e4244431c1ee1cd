"""What must be known of an event line to pass it on: is it a token, and whose?

Pure, on bytes: token lines, by far the most, are never parsed. Relies on how our own side writes
events: compact JSON, `id` first, then `token` or `done`; anything else is parsed.
"""

from __future__ import annotations

import re
from typing import Final

TOKEN: Final = re.compile(rb'\{"id":(\d{1,16}),(?="token":)')
"""The start of a token line with an id, up to its own keys."""


def with_id(line: bytes, start: int, request_id: int | None) -> bytes:
    """A line whose own keys begin at `start`, under another id or none; with newline."""
    if request_id is None:
        return b"{%b\n" % line[start:]
    return b'{"id":%d,%b\n' % (request_id, line[start:])
