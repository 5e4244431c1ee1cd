"""Code blocks of an answer, and how a terminal is asked to put a text on the clipboard.

Pure. Must not know where answers come from.
"""

from __future__ import annotations

import base64
import re
from typing import Final

from myllm.cli.console import visible
from myllm.errors import BadDataError

LONGEST: Final = 74_994
"""Bytes: terminals that follow hterm take 100,000 of a sequence, a third of which is base64's."""
_OPENING: Final = re.compile(r" {0,3}(`{3,}|~{3,})[^`]*")


def code_blocks(answer: str) -> list[str]:
    """The insides of the fenced blocks (CommonMark 0.31, §4.5), also of one that the answer's end cut off."""
    blocks: list[str] = []
    fence = ""
    for line in answer.split("\n"):
        if fence:
            bare = line.strip(" \t")
            if len(bare) >= len(fence) and set(bare) == {fence[0]}:
                fence = ""
            else:
                blocks[-1] += f"{line}\n"
        elif opening := _OPENING.fullmatch(line):
            fence = opening[1]
            blocks.append("")
    return blocks


def clipboard_sequence(text: str) -> str:
    """What sets the terminal's clipboard (xterm's OSC 52). Raises BadDataError for what is too long.

    Control characters are escaped here as well: pasted into a shell they could end a bracketed paste.
    """
    data = visible(text).encode("utf-8", "replace")
    if len(data) > LONGEST:
        raise BadDataError(
            f"copy: {len(data):,} bytes, of which terminals take {LONGEST:,}; copy a code block"
        )
    return f"\x1b]52;c;{base64.b64encode(data).decode()}\x07"
