"""The session store in SQLite: one file in the state folder, and beside it the locks of turns under way.

Owns what each call does to the tables of session_tables.py. Must not know models, requests or commands.
Thread-safe: calls take turns on one connection.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from heapq import merge
from pathlib import Path
from typing import Any, Final

from myllm.conversation import LOCAL, NOTHING, Message, Session, State
from myllm.errors import (
    CannotCreateError,
    MyllmError,
    NotFoundError,
    PermissionDeniedError,
    TryAgainError,
    UsageError,
)
from myllm.storage import session_search
from myllm.storage.session_file import SessionFile, errors_named
from myllm.storage.session_ids import parsed, prefix_span, written
from myllm.storage.session_import import import_session
from myllm.storage.session_store import HEAD, PAGE, TURN_SECONDS, Hit, Order
from myllm.storage.session_tables import (
    MESSAGE_COLUMNS,
    SESSIONS,
    check_name_free,
    insert_message,
    insert_session,
    message_of,
    messages_of,
    next_number,
    packed,
    session_of,
    update_message,
)
from myllm.storage.turn_locks import TurnLocks

FILE: Final = "sessions.sqlite"
TURNS: Final = "turns"
TREE_ROWS: Final = 500
"""Messages that one statement of `tree` reads; between two of them others may use the store."""
NAMED: Final = 3
"""Sessions that an error names."""
_NOT_OURS_TO_END: Final = (TryAgainError, PermissionDeniedError, CannotCreateError)
"""A turn that is alive, and all where nothing can be written."""


def sessions_file(folder: Path) -> Path:
    """Where the sessions of a state folder are."""
    return folder / FILE


class SQLiteSessions:
    """The `SessionStore` in `folder`; made when it is first used. `now` is in seconds since the epoch."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self._file = SessionFile(sessions_file(folder))
        self._turns = TurnLocks(folder / TURNS)
        self._now = now

    def close(self) -> None:
        self._file.close()

    # ── sessions ────────────────────────────────────────────────────────────────────────────

    def create(
        self,
        name: str | None = None,
        *,
        owner: str = LOCAL,
        model: str | None = None,
        system: str | None = None,
        settings: Mapping[str, Any] = NOTHING,
        directory: str | None = None,
    ) -> Session:
        now = self._now()
        new = Session(
            id="",
            name=name,
            created=now,
            updated=now,
            owner=owner,
            model=model,
            system=system,
            settings=settings,
            directory=directory,
        )
        with self._file.writing() as connection:
            number = next_number(connection, "sessions", now)
            insert_session(connection, number, new)
            return _session(connection, number)

    def find(self, wanted: str, *, owner: str = LOCAL) -> Session:
        with self._file.reading() as connection:
            named = f"{SESSIONS} WHERE s.owner = ? AND s.name = ?"
            if (row := connection.execute(named, (owner, wanted)).fetchone()) is not None:
                return session_of(row)
            found = _by_prefix(connection, wanted, owner)
            if not found:
                raise _no_session(connection, wanted, owner)
        if len(found) > 1:
            ids = ", ".join(session.id for session in found[:NAMED])
            raise UsageError(f"session {wanted!r}: several ids begin so: {ids}; give more of it")
        return found[0]

    def last(self, *, owner: str = LOCAL, directory: str | None = None) -> Session | None:
        begun_here = self.page(owner=owner, directory=directory, limit=1) if directory is not None else []
        found = begun_here or self.page(owner=owner, limit=1)
        return found[0] if found else None

    def page(
        self,
        *,
        owner: str = LOCAL,
        model: str | None = None,
        directory: str | None = None,
        updated_before: float | None = None,
        updated_since: float | None = None,
        after: Session | None = None,
        limit: int = PAGE,
    ) -> list[Session]:
        conditions: dict[str, tuple[Any, ...] | None] = {
            "s.owner = ?": (owner,),
            "s.model = ?": (model,) if model is not None else None,
            "s.directory = ?": (directory,) if directory is not None else None,
            "s.updated < ?": (updated_before,) if updated_before is not None else None,
            "s.updated >= ?": (updated_since,) if updated_since is not None else None,
            "(s.updated, s.id) < (?, ?)": (after.updated, parsed(after.id)) if after is not None else None,
        }
        asked = {condition: values for condition, values in conditions.items() if values is not None}
        query = f"{SESSIONS} WHERE {' AND '.join(asked)} ORDER BY s.updated DESC, s.id DESC LIMIT ?"
        parameters = [value for values in asked.values() for value in values]
        with self._file.reading() as connection:
            return [session_of(row) for row in connection.execute(query, (*parameters, limit))]

    def rename(self, session: str, name: str | None) -> Session:
        with self._file.writing() as connection:
            old = _session(connection, _session_number(session))
            if name != old.name:
                check_name_free(connection, old.owner, name)
            return self._changed(connection, old, "name = ?", name)

    def update(self, session: Session) -> Session:
        with self._file.writing() as connection:
            old = _session(connection, _session_number(session.id))
            values = (session.model, session.system, packed(session.settings))
            return self._changed(connection, old, "model = ?, system = ?, settings = ?", *values)

    def fork(self, session: str, at: str | None = HEAD, name: str | None = None) -> Session:
        now = self._now()
        with self._file.writing() as connection:
            source = _session(connection, _session_number(session))
            place = _place(connection, source, at)
            number = next_number(connection, "sessions", now)
            insert_session(
                connection,
                number,
                replace(source, name=name, created=now, updated=now),
                head=place,
                parent=_session_number(session),
                forked_at=place,
            )
            return _session(connection, number)

    def remove(self, session: str) -> None:
        number = _session_number(session)
        with self._file.writing() as connection:
            _session(connection, number)
            for heir, message in connection.execute(_NEEDED, {"session": number}).fetchall():
                connection.execute(_INHERIT, {"session": number, "heir": heir, "message": message})
            connection.execute("UPDATE sessions SET head = NULL WHERE id = ?", (number,))
            connection.execute("DELETE FROM messages WHERE session = ?", (number,))
            connection.execute("DELETE FROM sessions WHERE id = ?", (number,))

    def import_session(self, session: Session, messages: Iterable[Message]) -> Session:
        tree = list(messages)
        with self._file.writing() as connection:
            return _session(connection, import_session(connection, session, tree, self._now()))

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def path(self, session: str, newest: int | None = None) -> list[Message]:
        number = _session_number(session)
        limit = -1 if newest is None else newest
        with self._file.reading() as connection:
            rows = connection.execute(_PATH, {"session": number, "newest": limit}).fetchall()
            if not rows:
                _session(connection, number)
        return messages_of(rows)

    def tree(self, session: str) -> Iterator[Message]:
        number = _session_number(session)
        with self._file.reading() as connection:
            _session(connection, number)
            shared = [row[0] for row in connection.execute(_SHARED, {"session": number})]
        return merge(self._those(shared), self._own(number), key=lambda message: message.id)

    def append(
        self,
        session: str,
        role: str,
        content: str,
        *,
        parent: str | None = HEAD,
        state: State = State.WHOLE,
        reasoning: str = "",
        extra: Mapping[str, Any] = NOTHING,
        tokens: Mapping[str, int] = NOTHING,
        answer: Mapping[str, Any] = NOTHING,
    ) -> Message:
        new = Message(
            id="",
            parent=None,
            role=role,
            content=content,
            created=self._now(),
            state=state,
            reasoning=reasoning,
            extra=extra,
            tokens=tokens,
            answer=answer,
        )
        unsettled = state is State.OPEN or (role == "user" and state is State.WHOLE)
        with self._file.writing() as connection:
            into = _session(connection, _session_number(session))
            after = _place(connection, into, parent)
            number = next_number(connection, "messages", new.created)
            place = (number, _session_number(session), after, _depth(connection, after) + 1)
            insert_message(connection, place, new, unsettled=unsettled)
            connection.execute(_ANSWERED, (after,))
            self._changed(connection, into, "head = ?", number)
            return _message(connection, number)

    def write_answer(self, answer: Message) -> None:
        number = _message_number(answer.id)
        with self._file.writing() as connection:
            if _message(connection, number).state not in (State.OPEN, State.CUT):
                raise UsageError(f"message {answer.id}: it is whole, and stays as it is")
            update_message(connection, number, answer)
            connection.execute(_TOUCH, (self._now(), number))

    def move_head(self, session: str, to: str | None) -> Session:
        with self._file.writing() as connection:
            old = _session(connection, _session_number(session))
            return self._changed(connection, old, "head = ?", _place(connection, old, to))

    def search(
        self, words: str, *, owner: str = LOCAL, order: Order = "newest", limit: int = PAGE
    ) -> list[Hit]:
        with self._file.reading() as connection:
            return session_search.search(connection, words, owner=owner, order=order, limit=limit)

    # ── turns ───────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def turn(self, session: str, wait_seconds: float = TURN_SECONDS) -> Iterator[None]:
        number = _session_number(session)
        self._check_there(number)
        with self._turn_held(session, wait_seconds):
            self._check_there(number)  # it may have been removed while we waited
            self._settle(number)
            try:
                yield
            finally:
                with suppress(MyllmError):  # the next turn does it; what went wrong was said by its own call
                    self._settle(number)

    def recover(self) -> None:
        with self._file.reading() as connection:
            rows = connection.execute("SELECT DISTINCT session FROM messages WHERE unsettled").fetchall()
        begun = {written(number) for (number,) in rows}
        for session in sorted(begun.union(self._turns.left())):
            with suppress(*_NOT_OURS_TO_END), self._turn_held(session, wait_seconds=0):
                if (number := parsed(session)) is not None:
                    self._settle(number)

    @contextmanager
    def _turn_held(self, session: str, wait_seconds: float) -> Iterator[None]:
        with ExitStack() as ending:
            with errors_named(self._turns.folder):
                ending.enter_context(self._turns.held(session, wait_seconds))
            yield

    def _settle(self, number: int) -> None:
        """Ends what a turn left, its lock being held."""
        with self._file.reading() as connection:
            if connection.execute(_IS_UNSETTLED, (number,)).fetchone() is None:
                return  # as nearly always: no write, no sync
        with self._file.writing() as connection:
            connection.execute(_SETTLE, (number,))

    def _check_there(self, number: int) -> None:
        with self._file.reading() as connection:
            _session(connection, number)

    # ── pieces ──────────────────────────────────────────────────────────────────────────────

    def _changed(
        self, connection: sqlite3.Connection, session: Session, assignments: str, *values: Any
    ) -> Session:
        number = _session_number(session.id)
        statement = f"UPDATE sessions SET {assignments}, updated = ? WHERE id = ?"  # noqa: S608 — constants only
        connection.execute(statement, (*values, self._now(), number))
        return _session(connection, number)

    def _those(self, numbers: list[int]) -> Iterator[Message]:
        """Messages by their numbers, which ascend, a few at a time."""
        for at in range(0, len(numbers), TREE_ROWS):
            part = numbers[at : at + TREE_ROWS]
            with self._file.reading() as connection:
                query = f"SELECT {MESSAGE_COLUMNS} FROM messages AS m WHERE m.id IN ({','.join('?' * len(part))}) ORDER BY m.id"  # noqa: S608, E501 — marks only
                found = messages_of(connection.execute(query, part))
            yield from found

    def _own(self, number: int) -> Iterator[Message]:
        """Messages written in a session, in the order of their numbers, a few at a time."""
        last = -1
        while True:
            with self._file.reading() as connection:
                found = connection.execute(_OWN, (number, last, TREE_ROWS)).fetchall()
            yield from messages_of(found)
            if len(found) < TREE_ROWS:
                return
            last = found[-1][0]


# ── statements ──────────────────────────────────────────────────────────────────────────────

_PATH: Final = f"""
    WITH RECURSIVE back (id, parent, n) AS (
        SELECT m.id, m.parent, 1 FROM sessions AS s JOIN messages AS m ON m.id = s.head WHERE s.id = :session
        UNION ALL SELECT m.id, m.parent, n + 1 FROM back JOIN messages AS m ON m.id = back.parent
        LIMIT :newest
    )
    SELECT {MESSAGE_COLUMNS} FROM back CROSS JOIN messages AS m ON m.id = back.id ORDER BY back.n DESC
"""  # noqa: S608 — constants only
_UP: Final = """
    WITH RECURSIVE up (id, parent, session) AS (
        SELECT m.id, m.parent, m.session FROM sessions AS s JOIN messages AS m ON m.id = s.forked_at
        WHERE s.id = :session
        UNION ALL SELECT m.id, m.parent, m.session FROM up JOIN messages AS m ON m.id = up.parent
    )
"""
"""The path that a fork shares, from where it was forked up."""
_SHARED: Final = f"{_UP} SELECT id FROM up WHERE session <> :session ORDER BY id"  # noqa: S608
_IS_SHARED: Final = f"{_UP} SELECT 1 FROM up WHERE id = :message"  # noqa: S608
_OWN: Final = (
    f"SELECT {MESSAGE_COLUMNS} FROM messages AS m WHERE m.session = ? AND m.id > ? ORDER BY m.id LIMIT ?"  # noqa: S608 — constants only
)
_NEEDED: Final = """
    SELECT child.session, child.parent FROM messages AS m JOIN messages AS child ON child.parent = m.id
    WHERE m.session = :session AND child.session <> :session
    UNION SELECT s.id, s.forked_at FROM messages AS m JOIN sessions AS s ON s.forked_at = m.id
    WHERE m.session = :session AND s.id <> :session
"""
"""Which sessions go on from which messages of this one."""
_INHERIT: Final = """
    WITH RECURSIVE up (id, parent) AS (
        SELECT id, parent FROM messages WHERE id = :message AND session = :session
        UNION ALL SELECT m.id, m.parent FROM up JOIN messages AS m ON m.id = up.parent
        WHERE m.session = :session
    )
    UPDATE messages SET session = :heir WHERE id IN (SELECT id FROM up)
"""
_ANSWERED: Final = "UPDATE messages SET unsettled = 0 WHERE id = ? AND unsettled AND state = 'whole'"
_TOUCH: Final = (
    "UPDATE sessions SET updated = ? WHERE id = (SELECT m.session FROM messages AS m WHERE m.id = ?)"
)
_IS_UNSETTLED: Final = "SELECT 1 FROM messages WHERE session = ? AND unsettled LIMIT 1"
_SETTLE: Final = (
    "UPDATE messages SET unsettled = 0, state = CASE state WHEN 'open' THEN 'cut' ELSE 'failed' END"
    " WHERE session = ? AND unsettled"
)


def _session(connection: sqlite3.Connection, number: int) -> Session:
    row = connection.execute(f"{SESSIONS} WHERE s.id = ?", (number,)).fetchone()
    if row is None:
        raise NotFoundError(f"session {written(number)}: there is none of this id; see `myllm sessions`")
    return session_of(row)


def _message(connection: sqlite3.Connection, number: int) -> Message:
    query = f"SELECT {MESSAGE_COLUMNS} FROM messages AS m WHERE m.id = ?"  # noqa: S608 — constants only
    row = connection.execute(query, (number,)).fetchone()
    if row is None:
        raise NotFoundError(f"message {written(number)}: there is none of this id")
    return message_of(row)


def _place(connection: sqlite3.Connection, session: Session, message: str | None) -> int | None:
    """The number of a message of the session's. Raises NotFoundError where it is not in the session."""
    if message == HEAD:
        message = session.head
    if message is None:
        return None
    number = _message_number(message)
    if message == session.head:
        return number
    own = _session_number(session.id)
    row = connection.execute("SELECT session FROM messages WHERE id = ?", (number,)).fetchone()
    shared = {"session": own, "message": number}
    if row != (own,) and connection.execute(_IS_SHARED, shared).fetchone() is None:
        raise NotFoundError(f"message {message}: it is not in session {session.name or session.id}")
    return number


def _depth(connection: sqlite3.Connection, number: int | None) -> int:
    row = connection.execute("SELECT depth FROM messages WHERE id = ?", (number,)).fetchone()
    return int(row[0]) if row else 0


def _by_prefix(connection: sqlite3.Connection, prefix: str, owner: str) -> list[Session]:
    """Sessions whose id begins so, one more than an error names at most."""
    if (span := prefix_span(prefix)) is None:
        return []
    query = f"{SESSIONS} WHERE s.id BETWEEN ? AND ? AND s.owner = ? ORDER BY s.id LIMIT ?"
    return [session_of(row) for row in connection.execute(query, (*span, owner, NAMED + 1))]


def _no_session(connection: sqlite3.Connection, wanted: str, owner: str) -> NotFoundError:
    from difflib import get_close_matches

    query = "SELECT name FROM sessions WHERE owner = ? AND name IS NOT NULL"
    names = [name for (name,) in connection.execute(query, (owner,))]
    near = ", ".join(get_close_matches(wanted, names, NAMED))
    hint = f"did you mean {near}?" if near else "see `myllm sessions`"
    return NotFoundError(f"session {wanted!r}: none has this name, or an id that begins so; {hint}")


def _session_number(session: str) -> int:
    if (number := parsed(session)) is None:
        raise NotFoundError(f"session {session!r}: this is no session's id")
    return number


def _message_number(message: str) -> int:
    if (number := parsed(message)) is None:
        raise NotFoundError(f"message {message!r}: this is no message's id")
    return number
