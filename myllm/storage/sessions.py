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
    PermissionDeniedError,
    TryAgainError,
    UsageError,
)
from myllm.storage import session_search
from myllm.storage.session_file import SessionFile, errors_named
from myllm.storage.session_ids import parsed, written
from myllm.storage.session_import import import_session
from myllm.storage.session_queries import (
    depth,
    message_at,
    message_found,
    message_number,
    messages_at,
    newest_of_path,
    own_messages,
    place,
    session_at,
    session_found,
    session_number,
    shared_numbers,
)
from myllm.storage.session_store import HEAD, PAGE, TURN_SECONDS, Hit, Order
from myllm.storage.session_tables import (
    SESSIONS,
    check_name_free,
    insert_message,
    insert_session,
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
_NOT_OURS_TO_END: Final = (TryAgainError, PermissionDeniedError, CannotCreateError)
"""A turn that is alive, and all where nothing can be written."""

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
            return session_at(connection, number)

    def find(self, wanted: str, *, owner: str = LOCAL) -> Session:
        with self._file.reading() as connection:
            return session_found(connection, wanted, owner)

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
            old = session_at(connection, session_number(session))
            if name != old.name:
                check_name_free(connection, old.owner, name)
            return self._changed(connection, old, "name = ?", name)

    def update(self, session: Session) -> Session:
        with self._file.writing() as connection:
            old = session_at(connection, session_number(session.id))
            values = (session.model, session.system, packed(session.settings))
            return self._changed(connection, old, "model = ?, system = ?, settings = ?", *values)

    def fork(self, session: str, at: str | None = HEAD, name: str | None = None) -> Session:
        now = self._now()
        with self._file.writing() as connection:
            source = session_at(connection, session_number(session))
            at_number = place(connection, source, at)
            number = next_number(connection, "sessions", now)
            insert_session(
                connection,
                number,
                replace(source, name=name, created=now, updated=now),
                head=at_number,
                parent=session_number(session),
                forked_at=at_number,
            )
            return session_at(connection, number)

    def remove(self, session: str) -> None:
        number = session_number(session)
        with self._file.writing() as connection:
            session_at(connection, number)
            for heir, message in connection.execute(_NEEDED, {"session": number}).fetchall():
                connection.execute(_INHERIT, {"session": number, "heir": heir, "message": message})
            connection.execute("DELETE FROM messages WHERE session = ?", (number,))
            connection.execute("DELETE FROM sessions WHERE id = ?", (number,))

    def import_session(self, session: Session, messages: Iterable[Message]) -> Session:
        tree = list(messages)
        with self._file.writing() as connection:
            return session_at(connection, import_session(connection, session, tree, self._now()))

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def path(self, session: str, newest: int | None = None) -> list[Message]:
        number = session_number(session)
        with self._file.reading() as connection:
            if not (path := newest_of_path(connection, number, newest)):
                session_at(connection, number)
            return path

    def find_message(self, session: str, wanted: str) -> Message:
        with self._file.reading() as connection:
            within = session_at(connection, session_number(session))
            return message_at(connection, message_found(connection, within, wanted))

    def tree(self, session: str) -> Iterator[Message]:
        number = session_number(session)
        with self._file.reading() as connection:
            session_at(connection, number)
            shared = shared_numbers(connection, number)
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
            into = session_at(connection, session_number(session))
            after = place(connection, into, parent)
            number = next_number(connection, "messages", new.created)
            where = (number, session_number(session), after, depth(connection, after) + 1)
            insert_message(connection, where, new, unsettled=unsettled)
            connection.execute(_ANSWERED, (after,))
            self._changed(connection, into, "head = ?", number)
            return message_at(connection, number)

    def write_answer(self, answer: Message) -> None:
        number = message_number(answer.id)
        with self._file.writing() as connection:
            if message_at(connection, number).state not in (State.OPEN, State.CUT):
                raise UsageError(f"message {answer.id}: it is whole, and stays as it is")
            update_message(connection, number, answer)
            connection.execute(_TOUCH, (self._now(), number))

    def move_head(self, session: str, to: str | None) -> Session:
        with self._file.writing() as connection:
            old = session_at(connection, session_number(session))
            return self._changed(connection, old, "head = ?", place(connection, old, to))

    def search(
        self, words: str, *, owner: str = LOCAL, order: Order = "newest", limit: int = PAGE
    ) -> list[Hit]:
        with self._file.reading() as connection:
            return session_search.search(connection, words, owner=owner, order=order, limit=limit)

    # ── turns ───────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def turn(self, session: str, wait_seconds: float = TURN_SECONDS) -> Iterator[None]:
        number = session_number(session)
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
            session_at(connection, number)

    # ── pieces ──────────────────────────────────────────────────────────────────────────────

    def _changed(
        self, connection: sqlite3.Connection, session: Session, assignments: str, *values: Any
    ) -> Session:
        number = session_number(session.id)
        statement = f"UPDATE sessions SET {assignments}, updated = ? WHERE id = ?"  # noqa: S608 — constants only
        connection.execute(statement, (*values, self._now(), number))
        return session_at(connection, number)

    def _those(self, numbers: list[int]) -> Iterator[Message]:
        """Messages by their numbers, which ascend, a few at a time."""
        for at in range(0, len(numbers), TREE_ROWS):
            part = numbers[at : at + TREE_ROWS]
            with self._file.reading() as connection:
                found = messages_at(connection, part)
            yield from found

    def _own(self, number: int) -> Iterator[Message]:
        """Messages written in a session, in the order of their numbers, a few at a time."""
        last = -1
        while True:
            with self._file.reading() as connection:
                found = own_messages(connection, number, last, TREE_ROWS)
            yield from found
            if len(found) < TREE_ROWS:
                return
            last = message_number(found[-1].id)
