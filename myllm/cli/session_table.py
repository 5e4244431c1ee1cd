"""Sessions and places found in them, as `myllm sessions` lists them: tables, lines and JSONL records.

Owns columns, and which of them go where a terminal is narrow. Must not know how they were chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from myllm.cli.console import visible
from myllm.cli.table import duration, on_one_line, table

if TYPE_CHECKING:
    from myllm.conversation import Session
    from myllm.storage.session_store import Hit

GAP: Final = 2
"""Spaces between columns."""
ENOUGH: Final = 20
"""Characters of a name that are worth more than another column."""
LEAST: Final = ("DIRECTORY", "MODEL", "FORK OF", "MESSAGES")
"""Columns that can be done without, the least wanted first."""
FOUND: Final = ("\x1b[1;31m", "\x1b[0m")
"""As grep marks what it has found."""


class Row(NamedTuple):
    """A session as a table shows it."""

    session: Session
    short_id: str
    parent_name: str | None
    """What the session is called that it was forked from; None for what is no fork."""


def session_record(session: Session, parent_name: str | None) -> dict[str, Any]:
    """Its line of JSONL; times are seconds since the epoch."""
    return {
        "id": session.id,
        "name": session.name,
        "title": session.extra.get("title"),
        "messages": session.n_messages,
        "model": session.model,
        "created": session.created,
        "updated": session.updated,
        "directory": session.directory,
        "parent": session.parent,
        "parent_name": parent_name,
        "forked_at": session.forked_at,
    }


def described(session: Session) -> str:
    """A session in a few words."""
    named = f"{session.name} ({session.id})" if session.name else session.id
    return f"{named}, {session.n_messages:,} message{'s' if session.n_messages != 1 else ''}"


def session_table(rows: Sequence[Row], now: float, columns: int | None) -> bytes:
    """One row a session, within so many columns; None is no limit."""
    cells = [_cells(row, now) for row in rows]
    heads = [head for head in cells[0] if head != "FORK OF" or any(row[head] for row in cells)]
    if columns is not None:
        _fit(heads, cells, columns)
    return table([heads, *([row[head] for head in heads] for row in cells)])


def _fit(heads: list[str], cells: Sequence[dict[str, str]], columns: int) -> None:
    """Takes columns away until there is room for names, and cuts those that are longer than it."""
    wanted = min(max(len(row["NAME"]) for row in cells), ENOUGH)
    for head in LEAST:
        if _room(heads, cells, columns) < wanted and head in heads:
            heads.remove(head)
    room = max(_room(heads, cells, columns), len("NAME"))
    for row in cells:
        row["NAME"] = row["NAME"] if len(row["NAME"]) <= room else f"{row['NAME'][: room - 1]}…"


def _room(heads: Sequence[str], cells: Sequence[dict[str, str]], columns: int) -> int:
    """Characters that are left for names."""
    others = [max(len(head), *(len(row[head]) for row in cells)) for head in heads if head != "NAME"]
    return columns - sum(others) - GAP * len(others)


def _cells(row: Row, now: float) -> dict[str, str]:
    session = row.session
    title = session.extra.get("title")
    cells = {
        "ID": row.short_id,
        "NAME": session.name or (f"({title})" if title else ""),  # a title names nothing
        "MESSAGES": f"{session.n_messages:,}",
        "MODEL": (session.model or "").rpartition("/")[2],
        "AGE": duration(max(now - session.updated, 0.0)),
        "FORK OF": row.parent_name or "",
        "DIRECTORY": _from_home(session.directory or ""),
    }
    return {head: on_one_line(cell) for head, cell in cells.items()}


def _from_home(directory: str) -> str:
    try:
        return f"~/{Path(directory).relative_to(Path.home())}" if directory else ""
    except (ValueError, RuntimeError):  # it is elsewhere, or there is no home
        return directory


# ── what a search found ─────────────────────────────────────────────────────────────────────


def hit_record(hit: Hit) -> dict[str, Any]:
    """Its line of JSONL: the snippet whole, and the words in it that were found."""
    return {
        "session": hit.session,
        "name": hit.name,
        "message": hit.message,
        "role": hit.role,
        "created": hit.created,
        "snippet": "".join(hit.snippet),
        "found": list(hit.snippet[1::2]),
    }


def hit_line(hit: Hit, *, coloured: bool) -> str:
    """A line for people: session, message, who said it, and the snippet with its words marked."""
    begin, end = FOUND if coloured else ("", "")
    pieces = [visible(re.sub(r"\s+", " ", piece)) for piece in hit.snippet]
    pieces[1::2] = [f"{begin}{piece}{end}" for piece in pieces[1::2]]
    where = on_one_line(hit.name or hit.session)
    return f"{where}  {hit.message}  {on_one_line(hit.role)}: {''.join(pieces)}\n"
