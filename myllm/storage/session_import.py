"""A whole session into the tables of sessions.py: checked, and given new ids where its own cannot be kept.

Owns what is accepted of a tree that somebody else wrote. Must not know formats of files.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from myllm.conversation import Message, Session, State
from myllm.errors import BadDataError
from myllm.storage.session_ids import number_at, parsed
from myllm.storage.session_queries import messages_at
from myllm.storage.session_tables import insert_message, insert_session

AHEAD_SECONDS: Final = 86400.0
"""How far in the future an id may be that is kept: all that are made later count on from the greatest."""

Numbers = dict[str, int]
"""Of messages, by the ids they came with."""


def import_session(
    connection: sqlite3.Connection, session: Session, messages: Sequence[Message], now: float
) -> int:
    """As `SessionStore.import_session`, inside a transaction; the number that the session has now."""
    _check(session, messages)
    settled = [
        replace(message, state=State.CUT) if message.state is State.OPEN else message for message in messages
    ]
    shared = _shared_numbers(connection, session, settled)
    own_messages = [message for message in settled if message.id not in shared]
    numbers = _kept_numbers(connection, own_messages, shared, now)
    if numbers is None:
        numbers = _new_numbers(connection, own_messages, shared, now)
    own = parsed(session.id)
    if own is None or own > _greatest(now) or _taken(connection, "sessions", own):
        own = _free(connection, "sessions", number_at(min(session.created, now)))
    depths: dict[str | None, int] = {None: 0}
    insert_session(
        connection,
        own,
        session,
        head=numbers.get(session.head or ""),
        parent=parsed(session.parent or ""),
        forked_at=numbers.get(session.forked_at or ""),
    )
    for message in settled:
        depths[message.id] = depths[message.parent] + 1
        if message.id not in shared:
            place = (numbers[message.id], own, numbers.get(message.parent or ""), depths[message.id])
            insert_message(connection, place, message)
    return own


def _check(session: Session, messages: Sequence[Message]) -> None:
    seen: set[str | None] = {None}
    for message in messages:
        if message.parent not in seen:
            raise BadDataError(f"import: message {message.id!r} comes before its parent {message.parent!r}")
        if message.id in seen:
            raise BadDataError(f"import: two messages have the id {message.id!r}")
        seen.add(message.id)
    for what, id_ in (("head", session.head), ("fork", session.forked_at)):
        if id_ not in seen:
            raise BadDataError(f"import: the session's {what} {id_!r} is none of its messages")


def _shared_numbers(connection: sqlite3.Connection, session: Session, messages: Sequence[Message]) -> Numbers:
    """Of all messages up to where it was forked, if they are there just the same: a fork shares them."""
    by_id = {message.id: message for message in messages}
    numbers: Numbers = {}
    place = session.forked_at
    while place is not None:
        number = parsed(place)
        if number is None or messages_at(connection, [number]) != [by_id[place]]:
            return {}
        numbers[place] = number
        place = by_id[place].parent
    return numbers


def _kept_numbers(
    connection: sqlite3.Connection, messages: Sequence[Message], shared: Numbers, now: float
) -> Numbers | None:
    """The shared ones, and those that the ids of the others are; None where one cannot be kept."""
    numbers = dict(shared)
    for message in messages:
        number = parsed(message.id)
        if number is None or number > _greatest(now) or number <= numbers.get(message.parent or "", -1):
            return None
        if _taken(connection, "messages", number):
            return None
        numbers[message.id] = number
    return numbers


def _new_numbers(
    connection: sqlite3.Connection, messages: Sequence[Message], shared: Numbers, now: float
) -> Numbers:
    """The shared ones, and free ones in the order of the messages, and of their times if that allows."""
    numbers = dict(shared)
    last = max(shared.values(), default=-1)
    for message in messages:
        last = _free(connection, "messages", max(number_at(min(message.created, now)), last + 1))
        numbers[message.id] = last
    return numbers


def _free(connection: sqlite3.Connection, table: str, number: int) -> int:
    while _taken(connection, table, number):
        number += 1
    return number


def _taken(connection: sqlite3.Connection, table: str, number: int) -> bool:
    query = f"SELECT 1 FROM {table} WHERE id = ?"  # noqa: S608 — one of two names
    return connection.execute(query, (number,)).fetchone() is not None


def _greatest(now: float) -> int:
    return number_at(now + AHEAD_SECONDS)
