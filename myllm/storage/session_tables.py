"""The tables of sessions.py, and their rows as values.

Owns columns, triggers, migrations, and what every new row must be. Must not know transactions or locks.

A message's number is its id and its row's number, so that the search index, which goes by row numbers, is
in the order of time. A parent's is less than its child's, so that no path runs in a circle, and `depth`
counts a path without walking it. The index of words leaves out OPEN answers: one that is kept every second
while it grows would be taken in every time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any, Final

from myllm.conversation import Message, Session, State
from myllm.errors import UsageError
from myllm.storage.session_ids import number_after, written
from myllm.storage.session_store import check_name

_TABLES: Final = (
    # AUTOINCREMENT: sqlite_sequence remembers the greatest number, so that none is given out twice
    """CREATE TABLE sessions (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        owner TEXT NOT NULL,
        name TEXT,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        head INTEGER REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED,
        parent INTEGER,  -- kept after that session is removed
        forked_at INTEGER,  -- likewise
        directory TEXT,
        model TEXT,
        system TEXT,
        settings TEXT NOT NULL,
        extra TEXT NOT NULL,
        UNIQUE (owner, name)
    )""",
    "CREATE INDEX sessions_updated ON sessions (owner, updated, id)",
    "CREATE INDEX sessions_head ON sessions (head)",
    "CREATE INDEX sessions_forked_at ON sessions (forked_at)",
    # what is looked at along a path comes first: a row's later columns may lie on further pages
    """CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        session INTEGER NOT NULL REFERENCES sessions (id),
        parent INTEGER REFERENCES messages (id) CHECK (parent < id),
        depth INTEGER NOT NULL,
        unsettled INTEGER NOT NULL,  -- an answer that is being written, or a user's turn that awaits one
        state TEXT NOT NULL,
        role TEXT NOT NULL,
        created REAL NOT NULL,
        content TEXT NOT NULL,
        reasoning TEXT NOT NULL,
        extra TEXT NOT NULL,
        tokens TEXT NOT NULL,
        answer TEXT NOT NULL
    )""",
    "CREATE INDEX messages_session ON messages (session)",
    "CREATE INDEX messages_parent ON messages (parent)",
    "CREATE INDEX messages_unsettled ON messages (session) WHERE unsettled",
    # whose 10,000 hits of a search are: 12 ms from this, 23 from the table, among 1,000,000 messages
    "CREATE INDEX messages_owner ON messages (id, session)",
    "CREATE VIEW searched AS SELECT id, content FROM messages WHERE state <> 'open'",
    """CREATE VIRTUAL TABLE words USING fts5 (
        content, content = 'searched', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2'
    )""",
    """CREATE TRIGGER words_of_new AFTER INSERT ON messages WHEN new.state <> 'open' BEGIN
        INSERT INTO words (rowid, content) VALUES (new.id, new.content);
    END""",
    """CREATE TRIGGER words_of_removed AFTER DELETE ON messages WHEN old.state <> 'open' BEGIN
        INSERT INTO words (words, rowid, content) VALUES ('delete', old.id, old.content);
    END""",
    # before, and the next one after: of two triggers at one moment either may go first
    """CREATE TRIGGER words_of_old BEFORE UPDATE OF content, state ON messages
    WHEN old.state <> 'open' BEGIN
        INSERT INTO words (words, rowid, content) VALUES ('delete', old.id, old.content);
    END""",
    """CREATE TRIGGER words_of_changed AFTER UPDATE OF content, state ON messages
    WHEN new.state <> 'open' BEGIN
        INSERT INTO words (rowid, content) VALUES (new.id, new.content);
    END""",
)


def _create(database: Any) -> None:
    for statement in _TABLES:
        database.execute(statement)


MIGRATIONS: Final = (_create,)


def next_number(connection: sqlite3.Connection, table: str, now: float) -> int:
    """For a new row at `now`, in seconds since the epoch: greater than any that the table ever had."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return number_after(row[0] if row else 0, now)


# ── sessions ────────────────────────────────────────────────────────────────────────────────

SESSIONS: Final = (
    "SELECT s.id, s.name, s.created, s.updated, s.head, s.model, s.system, s.settings, s.parent, s.forked_at,"
    " s.owner, s.directory, coalesce(m.depth, 0), s.extra"
    " FROM sessions AS s LEFT JOIN messages AS m ON m.id = s.head"
)
_INSERT_SESSION: Final = (
    "INSERT INTO sessions (id, name, created, updated, head, model, system, settings, parent, forked_at,"
    " owner, directory, extra) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def insert_session(
    connection: sqlite3.Connection,
    number: int,
    session: Session,
    *,
    head: int | None = None,
    parent: int | None = None,
    forked_at: int | None = None,
) -> None:
    """The ids of `session` itself are not looked at. Raises UsageError as `SessionStore.create`."""
    check_name_free(connection, session.owner, session.name)
    row = (
        number,
        session.name,
        session.created,
        session.updated,
        head,
        _text(session.model),
        _text(session.system),
        packed(session.settings),
        parent,
        forked_at,
        _text(session.owner),
        _text(session.directory),
        packed(session.extra),
    )
    connection.execute(_INSERT_SESSION, row)


def check_name_free(connection: sqlite3.Connection, owner: str, name: str | None) -> None:
    """Raises UsageError for a bad name, and for one that a session of the owner's has."""
    if name is None:
        return
    check_name(name)
    query = "SELECT id FROM sessions WHERE owner = ? AND name = ?"
    if (row := connection.execute(query, (owner, name)).fetchone()) is not None:
        raise UsageError(
            f"session name {name!r}: taken by session {written(row[0])}; choose another, or rename that one"
        )


def session_of(row: tuple[Any, ...]) -> Session:
    """From a row of `SESSIONS`."""
    number, name, created, updated, head, model, system, settings, parent, forked_at, *rest = row
    owner, directory, n_messages, extra = rest
    return Session(
        id=written(number),
        name=name,
        created=created,
        updated=updated,
        head=_id(head),
        model=model,
        system=system,
        settings=json.loads(settings),
        parent=_id(parent),
        forked_at=_id(forked_at),
        owner=owner,
        directory=directory,
        n_messages=n_messages,
        extra=json.loads(extra),
    )


# ── messages ────────────────────────────────────────────────────────────────────────────────

MESSAGE_COLUMNS: Final = (
    "m.id, m.parent, m.role, m.content, m.created, m.state, m.reasoning, m.extra, m.tokens, m.answer"
)
_INSERT_MESSAGE: Final = (
    "INSERT INTO messages (id, session, parent, depth, unsettled,"
    " role, content, created, state, reasoning, extra, tokens, answer)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_UPDATE_MESSAGE: Final = (
    "UPDATE messages SET unsettled = ?, content = ?, state = ?, reasoning = ?, extra = ?, tokens = ?,"
    " answer = ? WHERE id = ?"
)


def insert_message(
    connection: sqlite3.Connection,
    place: tuple[int, int, int | None, int],
    message: Message,
    *,
    unsettled: bool = False,
) -> None:
    """`place` is the message's number, its session's, its parent's, and its depth."""
    content, *rest = _written_parts(message)
    row = (*place, unsettled, _text(message.role), content, message.created, *rest)
    connection.execute(_INSERT_MESSAGE, row)


def update_message(connection: sqlite3.Connection, number: int, message: Message) -> None:
    """All but the role, the time and the place."""
    unsettled = message.state is State.OPEN
    connection.execute(_UPDATE_MESSAGE, (unsettled, *_written_parts(message), number))


def message_of(row: tuple[Any, ...]) -> Message:
    """From a row of `MESSAGE_COLUMNS`."""
    number, parent, role, content, created, state, reasoning, extra, tokens, answer = row
    return Message(
        id=written(number),
        parent=_id(parent),
        role=role,
        content=content,
        created=created,
        state=State(state),
        reasoning=reasoning,
        extra=json.loads(extra),
        tokens=json.loads(tokens),
        answer=json.loads(answer),
    )


def _written_parts(message: Message) -> tuple[str | None, ...]:
    return (
        _text(message.content),
        message.state.value,
        _text(message.reasoning),
        packed(message.extra),
        packed(message.tokens),
        packed(message.answer),
    )


def packed(values: Mapping[str, Any]) -> str:
    """A mapping as JSON."""
    return json.dumps(dict(values), separators=(",", ":"))


def _text(text: str | None) -> str | None:
    """What UTF-8 cannot say, lone surrogates, becomes U+FFFD: a conversation is not lost for a character."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _id(number: int | None) -> str | None:
    return None if number is None else written(number)
