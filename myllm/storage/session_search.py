"""Full-text search in the tables of sessions.py.

Owns what a query is and how hits are ordered. Must not know who asks, nor how words came into the index.
"""

from __future__ import annotations

import secrets
import sqlite3
from typing import Final

from myllm.storage.session_ids import written
from myllm.storage.session_store import Hit, Order

RANKED: Final = 10_000
"""So many of the newest messages found are ranked: more would take longer than a user waits."""
SNIPPET_WORDS: Final = 24
ELLIPSIS: Final = "…"

_HITS: Final = (
    " FROM words CROSS JOIN messages AS m ON m.id = words.rowid CROSS JOIN sessions AS s ON s.id = m.session"
    " WHERE words MATCH ? AND s.owner = ? ORDER BY words.rowid DESC LIMIT ?"
)
_NEWEST: Final = f"SELECT m.id {_HITS}"
_BEST: Final = (
    f"SELECT id FROM (SELECT m.id AS id, bm25(words) AS rank {_HITS}) ORDER BY rank, id DESC LIMIT ?"  # noqa: S608 — constants only
)
_SNIPPET: Final = (
    "SELECT s.id, s.name, m.role, m.created, snippet(words, 0, ?, ?, ?, ?)"
    " FROM words CROSS JOIN messages AS m ON m.id = words.rowid CROSS JOIN sessions AS s ON s.id = m.session"
    " WHERE words MATCH ? AND words.rowid = ?"
)


def search(connection: sqlite3.Connection, words: str, *, owner: str, order: Order, limit: int) -> list[Hit]:
    """As `SessionStore.search`."""
    query = _query(words)
    if order == "best":
        found = connection.execute(_BEST, (query, owner, RANKED, limit)).fetchall()
    else:
        found = connection.execute(_NEWEST, (query, owner, limit)).fetchall()
    return [hit for (number,) in found if (hit := _hit(connection, query, number))]


def _query(words: str) -> str:
    """Each word as a string of FTS5's, in which only the quotation mark is special, and NUL the end."""
    return " ".join(f'"{word}"' for word in words.replace('"', " ").replace("\0", " ").split()) or '""'


def _hit(connection: sqlite3.Connection, query: str, number: int) -> Hit | None:
    mark = secrets.token_hex(16)  # nothing that a message can hold by intent
    asked = (mark, mark, ELLIPSIS, SNIPPET_WORDS, query, number)
    row = connection.execute(_SNIPPET, asked).fetchone()
    if row is None:  # removed just now
        return None
    session, name, role, created, snippet = row
    return Hit(written(session), name, written(number), role, created, tuple(snippet.split(mark)))
