"""Full-text search in the tables of sessions.py.

Owns what a query is and how hits are ordered. Must not know who asks, nor how words came into the index.

A snippet is made where the index is read anyway, in one run through the hits: to look up one hit's place in
the index takes 0.3 ms among 10,000 (measured by tests/bench/session_store.py's store), its snippet 0.01.
"""

from __future__ import annotations

import secrets
import sqlite3
from typing import Any, Final

from myllm.storage.session_ids import written
from myllm.storage.session_store import RANKED, Hit, Order

SNIPPET_WORDS: Final = 24
ELLIPSIS: Final = "…"

_FOUND: Final = (
    "FROM words CROSS JOIN messages AS m INDEXED BY messages_owner ON m.id = words.rowid"
    " CROSS JOIN sessions AS s ON s.id = m.session WHERE words MATCH :query"
)
_HITS: Final = (
    "SELECT m.id, s.id, s.name, m.role, m.created, snippet(words, 0, :mark, :mark, :ellipsis, :snippet_words)"
    f" {_FOUND}"
)
_OF_OWNER: Final = "AND s.owner = :owner ORDER BY words.rowid DESC LIMIT"
_NEWEST: Final = f"{_HITS} {_OF_OWNER} :limit"
_BEST: Final = (
    f"SELECT id FROM (SELECT m.id AS id, bm25(words) AS rank {_FOUND} {_OF_OWNER} :ranked)"  # noqa: S608 — constants only
    " ORDER BY rank, id DESC LIMIT :limit"
)


def search(connection: sqlite3.Connection, words: str, *, owner: str, order: Order, limit: int) -> list[Hit]:
    """As `SessionStore.search`."""
    mark = secrets.token_hex(16)  # nothing that a message can hold by intent
    asked = {
        "query": _query(words),
        "owner": owner,
        "limit": limit,
        "ranked": RANKED,
        "mark": mark,
        "ellipsis": ELLIPSIS,
        "snippet_words": SNIPPET_WORDS,
    }
    if order == "newest":
        return [_hit(row, mark) for row in connection.execute(_NEWEST, asked)]
    best = [number for (number,) in connection.execute(_BEST, asked)]
    # the plus sign keeps the index from looking up one after the other
    chosen = f"{_HITS} AND +words.rowid IN ({','.join(map(str, best))})"
    hits = {row[0]: _hit(row, mark) for row in connection.execute(chosen, asked)}
    return [hits[number] for number in best if number in hits]  # one may have been removed just now


def _query(words: str) -> str:
    """Each word as a string of FTS5's, in which only the quotation mark is special, and NUL the end."""
    return " ".join(f'"{word}"' for word in words.replace('"', " ").replace("\0", " ").split()) or '""'


def _hit(row: tuple[Any, ...], mark: str) -> Hit:
    number, session, name, role, created, snippet = row
    return Hit(written(session), name, written(number), role, created, tuple(snippet.split(mark)))
