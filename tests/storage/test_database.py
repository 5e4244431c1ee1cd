"""How a file of ours is opened, beside others who do the same."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from myllm.storage import database


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[tuple[sqlite3.Connection, sqlite3.Connection]]:
    """Two on one new file, of which neither waits for the other's locks."""
    both = [sqlite3.connect(tmp_path / "file", timeout=0, isolation_level=None) for _ in range(2)]
    yield both[0], both[1]
    for connection in both:
        connection.close()


def journal(connection: sqlite3.Connection) -> str:
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    return str(mode)


class Clock:
    """Time passes only where it is waited for, an eighth of a second at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks: list[float] = []
        self.at_look: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.looks.append(seconds)
        self.now += 0.125
        self.at_look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(database, "time", clock)
    return clock


def test_a_journal_that_another_keeps_locked_is_changed_as_soon_as_it_is_free(
    connections: tuple[sqlite3.Connection, sqlite3.Connection], clock: Clock
) -> None:
    ours, other = connections
    other.execute("BEGIN EXCLUSIVE")
    clock.at_look = lambda: len(clock.looks) == 3 and other.execute("ROLLBACK")
    database._use_wal(ours)
    assert clock.looks == [database.BUSY_LOOK] * 3
    assert journal(ours) == "wal"


def test_a_journal_that_stays_locked_is_given_up(
    connections: tuple[sqlite3.Connection, sqlite3.Connection], clock: Clock
) -> None:
    ours, other = connections
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        database._use_wal(ours)
    assert database.BUSY_SECONDS < clock.now < database.BUSY_SECONDS + 1


def test_a_journal_that_cannot_be_changed_is_not_tried_again(tmp_path: Path, clock: Clock) -> None:
    sqlite3.connect(tmp_path / "file").execute("CREATE TABLE x (y)").connection.close()
    connection = sqlite3.connect(f"file:{tmp_path}/file?mode=ro", uri=True, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        database._use_wal(connection)
    connection.close()
    assert clock.looks == []


def test_a_transaction_that_cannot_be_committed_is_undone_and_the_next_begins(
    connections: tuple[sqlite3.Connection, sqlite3.Connection],
) -> None:
    ours, _ = connections
    ours.execute("PRAGMA foreign_keys = ON")
    ours.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, up REFERENCES t DEFERRABLE INITIALLY DEFERRED)")

    def insert(number: int, up: int | None) -> None:
        with database.transaction(ours):
            ours.execute("INSERT INTO t VALUES (?, ?)", (number, up))

    with pytest.raises(sqlite3.IntegrityError):
        insert(1, up=7)
    insert(2, up=None)
    assert ours.execute("SELECT id FROM t").fetchall() == [(2,)]


def test_a_second_connection_leaves_the_first_one_its_locks(tmp_path: Path) -> None:
    """Without them another process that ends would take the journal away from under both."""
    path = tmp_path / "file"
    first = database.open_database(path, [lambda db: db.execute("CREATE TABLE x (y)")])
    second = database.open_database(path, [lambda db: None])
    write = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('INSERT INTO x VALUES (1)')"
    for n_rows in (1, 2):
        subprocess.run([sys.executable, "-c", f"{write}; c.commit(); c.close()", path], check=True)
        for connection in (first, second):
            assert connection.execute("SELECT count(*) FROM x").fetchall() == [(n_rows,)]
    first.close()
    second.close()
