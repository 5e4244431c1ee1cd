"""Tables for people: columns aligned, cells safe for a terminal.

Owns how a cell looks: one line, sizes in MB or GB, durations in one unit. Must not know what is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from myllm.cli.console import visible

UNITS: Final = (("d", 86400), ("h", 3600), ("m", 60))


def table(rows: Sequence[Sequence[str]]) -> bytes:
    """The rows, the first of which is the head, two spaces between columns."""
    shown = [[on_one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    )
    return printed("".join(f"{line}\n" for line in lines))


def on_one_line(text: str) -> str:
    """Names and metadata come from strangers' files: no control characters, and no lines of their own."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def printed(text: str) -> bytes:
    """As for a terminal, whatever stdout is: a table is for people."""
    return visible(text).encode("utf-8", "replace")


def size(size_bytes: int) -> str:
    """In powers of ten, as shops and file managers count."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """In the largest unit that it fills, rounded: 45s, 30m, 2h."""
    for unit, length in UNITS:
        if round(seconds) >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
