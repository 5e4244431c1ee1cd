"""What is asked of the tables of sessions.py, given a connection: sessions, places in trees, messages.

Owns statements. Must not know transactions, locks or files. Numbers are those behind ids.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from myllm.conversation import Message, Session
from myllm.errors import NotFoundError, UsageError
from myllm.storage.session_ids import parsed, prefix_span, written
from myllm.storage.session_store import HEAD
from myllm.storage.session_tables import MESSAGE_COLUMNS, SESSIONS, message_of, session_of

NAMED: Final = 3
"""Alternatives that an error names."""

# ── sessions ────────────────────────────────────────────────────────────────────────────────


def session_number(session: str) -> int:
    """Raises NotFoundError for what is no id."""
    if (number := parsed(session)) is None:
        raise NotFoundError(f"session {session!r}: this is no session's id")
    return number


def session_at(connection: sqlite3.Connection, number: int) -> Session:
    """Raises NotFoundError."""
    row = connection.execute(f"{SESSIONS} WHERE s.id = ?", (number,)).fetchone()
    if row is None:
        raise NotFoundError(f"session {written(number)}: there is none of this id; see `myllm sessions`")
    return session_of(row)


def session_found(connection: sqlite3.Connection, wanted: str, owner: str) -> Session:
    """As `SessionStore.find`."""
    named = f"{SESSIONS} WHERE s.owner = ? AND s.name = ?"
    if (row := connection.execute(named, (owner, wanted)).fetchone()) is not None:
        return session_of(row)
    begins = f"{SESSIONS} WHERE s.id BETWEEN ? AND ? AND s.owner = ? LIMIT ?"
    span = prefix_span(wanted)
    rows = connection.execute(begins, (*span, owner, NAMED)).fetchall() if span else []
    sessions = [session_of(row) for row in rows]
    if not sessions:
        raise _no_session(connection, wanted, owner)
    _check_single(f"session {wanted!r}", [session.id for session in sessions])
    return sessions[0]


def _no_session(connection: sqlite3.Connection, wanted: str, owner: str) -> NotFoundError:
    from difflib import get_close_matches

    query = "SELECT name FROM sessions WHERE owner = ? AND name IS NOT NULL"
    names = [name for (name,) in connection.execute(query, (owner,))]
    near = ", ".join(get_close_matches(wanted, names, NAMED))
    hint = f"did you mean {near}?" if near else "see `myllm sessions`"
    return NotFoundError(f"session {wanted!r}: none has this name, or an id that begins so; {hint}")


def _check_single(what: str, ids: Sequence[str]) -> None:
    if len(ids) > 1:
        raise UsageError(f"{what}: several ids begin so, such as {', '.join(ids)}; give more of it")


# ── messages ────────────────────────────────────────────────────────────────────────────────

_UP: Final = """
    WITH RECURSIVE up (id, parent, session) AS (
        SELECT m.id, m.parent, m.session FROM sessions AS s JOIN messages AS m ON m.id = s.forked_at
        WHERE s.id = :session
        UNION ALL SELECT m.id, m.parent, m.session FROM up JOIN messages AS m ON m.id = up.parent
        WHERE m.id >= :least
    )
"""
"""The path that a fork shares, from where it was forked up; numbers fall on the way."""
_SHARED: Final = f"{_UP} SELECT id FROM up WHERE session <> :session ORDER BY id"  # noqa: S608 — constants only
_WITHIN: Final = f"""
    {_UP} SELECT id FROM up WHERE id BETWEEN :least AND :greatest
    UNION SELECT id FROM messages WHERE session = :session AND id BETWEEN :least AND :greatest
    ORDER BY id LIMIT :limit
"""  # noqa: S608 — constants only
_PATH: Final = f"""
    WITH RECURSIVE back (id, parent, n) AS (
        SELECT m.id, m.parent, 1 FROM sessions AS s JOIN messages AS m ON m.id = s.head WHERE s.id = :session
        UNION ALL SELECT m.id, m.parent, n + 1 FROM back JOIN messages AS m ON m.id = back.parent
        LIMIT :newest
    )
    SELECT {MESSAGE_COLUMNS} FROM back CROSS JOIN messages AS m ON m.id = back.id ORDER BY back.n DESC
"""  # noqa: S608 — constants only
_ONE: Final = f"SELECT {MESSAGE_COLUMNS} FROM messages AS m WHERE m.id = ?"  # noqa: S608 — constants only
_OWN: Final = (
    f"SELECT {MESSAGE_COLUMNS} FROM messages AS m WHERE m.session = ? AND m.id > ? ORDER BY m.id LIMIT ?"  # noqa: S608 — constants only
)


def message_number(message: str) -> int:
    """Raises NotFoundError for what is no id."""
    if (number := parsed(message)) is None:
        raise NotFoundError(f"message {message!r}: this is no message's id")
    return number


def message_at(connection: sqlite3.Connection, number: int) -> Message:
    """Raises NotFoundError."""
    row = connection.execute(_ONE, (number,)).fetchone()
    if row is None:
        raise NotFoundError(f"message {written(number)}: there is none of this id")
    return message_of(row)


def messages_at(connection: sqlite3.Connection, numbers: Sequence[int]) -> list[Message]:
    """Those that are there, in the order given."""
    rows = (connection.execute(_ONE, (number,)).fetchone() for number in numbers)
    return [message_of(row) for row in rows if row is not None]


def own_messages(connection: sqlite3.Connection, session: int, after: int, limit: int) -> list[Message]:
    """Of those written in a session, the first ones whose numbers are greater than `after`."""
    return [message_of(row) for row in connection.execute(_OWN, (session, after, limit))]


def newest_of_path(connection: sqlite3.Connection, session: int, newest: int | None) -> list[Message]:
    """As `SessionStore.path`, but for a session that is not there."""
    asked = {"session": session, "newest": -1 if newest is None else newest}
    return [message_of(row) for row in connection.execute(_PATH, asked)]


def shared_numbers(connection: sqlite3.Connection, session: int) -> list[int]:
    """Of the messages that a fork shares with others, ascending."""
    return [number for (number,) in connection.execute(_SHARED, {"session": session, "least": 0})]


def message_found(connection: sqlite3.Connection, session: Session, wanted: str) -> int:
    """As `SessionStore.find_message`, its number."""
    span = prefix_span(wanted)
    found = _numbers_within(connection, session_number(session.id), *span) if span else []
    if not found:
        raise NotFoundError(f"message {wanted!r}: session {session.name or session.id} has none such")
    _check_single(f"message {wanted!r}", [written(number) for number in found])
    return found[0]


def place(connection: sqlite3.Connection, session: Session, message: str | None) -> int | None:
    """The number of a message of the session's, or of its head. Raises NotFoundError."""
    if message == HEAD:
        message = session.head
    if message is None:
        return None
    number = message_number(message)
    if message != session.head and not _numbers_within(
        connection, session_number(session.id), number, number
    ):
        raise NotFoundError(f"message {message}: it is not in session {session.name or session.id}")
    return number


def depth(connection: sqlite3.Connection, number: int | None) -> int:
    """How many messages there are from a root to this one; none above a root."""
    row = connection.execute("SELECT depth FROM messages WHERE id = ?", (number,)).fetchone()
    return int(row[0]) if row else 0


def _numbers_within(connection: sqlite3.Connection, session: int, least: int, greatest: int) -> list[int]:
    """The first few of a session's messages with such numbers, shared ones as well."""
    asked = {"session": session, "least": least, "greatest": greatest, "limit": NAMED}
    return [number for (number,) in connection.execute(_WITHIN, asked)]
