"""What must be known of an event line to pass it on: is it a token, whose, is it the last?

Pure, on bytes: token lines, by far the most, are never parsed. Relies on how our own side writes
events: compact JSON, `id` first, then `token` or `done`; anything else is parsed.
"""

from __future__ import annotations

import re
from typing import Final

from myllm.protocol import parse

TOKEN: Final = re.compile(rb'\{"id":(\d{1,16}),(?="token":)')
"""The start of a token line with an id, up to its own keys."""
_TOKEN_START: Final = re.compile(rb'\{(?:"id":\d{1,16},)?"token":')
_DONE_START: Final = re.compile(rb'\{(?:"id":\d{1,16},)?"done":true[,}]')


def with_id(line: bytes, start: int, request_id: int | None) -> bytes:
    """A line whose own keys begin at `start`, under another id or none; with newline."""
    if request_id is None:
        return b"{%b\n" % line[start:]
    return b'{"id":%d,%b\n' % (request_id, line[start:])


def is_done(line: bytes) -> bool:
    """Whether this line ends its request. Raises BadDataError where it is no message at all."""
    if _TOKEN_START.match(line):
        return False
    return bool(_DONE_START.match(line)) or parse(line).get("done") is True
