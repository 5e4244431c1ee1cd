"""SQLite files of MyLLM's own: opening, permissions, migrations; what is wrong with one, as errors.

Owns the pragmas and the version of a file's tables. Must not know what any table holds. sqlite_utils
is imported only where a migration has to run: an up-to-date file opens with the standard library alone.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from myllm import paths
from myllm.errors import BadDataError, MyllmError

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION_ID: Final = 0x6D796C6D
"""`mylm`: in the header of each of our files, so that no other program's file is taken for ours."""
BUSY_SECONDS: Final = 2.0
"""How long a statement waits for another process's lock."""
BUSY_LOOK: Final = 0.01
PRIVATE: Final = 0o600
COMPANIONS: Final = ("-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database in WAL mode."""
_MAKING: Final = threading.Lock()
_BROKEN: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Migration = Callable[[Any], None]
"""Changes the tables from one version to the next, through a `sqlite_utils.Database`."""


class BrokenDatabaseError(BadDataError):
    """A file that is damaged, or not one of ours."""


class NewerDatabaseError(BrokenDatabaseError):
    """A file of ours whose tables only a newer MyLLM knows."""


def open_database(
    path: Path,
    migrations: Sequence[Migration],
    *,
    synchronous: str = "FULL",
    busy_seconds: float | None = None,
) -> sqlite3.Connection:
    """A connection in WAL mode and autocommit, its tables up to date; made, 0600, where there is none.

    It and its statements block up to `busy_seconds` for a lock, or `BUSY_SECONDS`. May be used by other
    threads than its own, one at a time. Raises BrokenDatabaseError, CannotCreateError, OSError, and
    sqlite3.Error for what is none of these.
    """
    paths.make_private(path.parent)
    _make(path)
    seconds = BUSY_SECONDS if busy_seconds is None else busy_seconds
    connection = sqlite3.connect(path, timeout=seconds, isolation_level=None, check_same_thread=False)
    with _closed_on_failure(connection), broken_noticed(path):
        _set_up(connection, path, migrations, synchronous, seconds)
    return connection


def _make(path: Path) -> None:
    """Makes an empty file, 0600, where there is none. Raises OSError, also where it may not be written.

    A file that is there is not opened: closing it would drop the locks that other connections of this process
    have on it (sqlite.org/howtocorrupt.html §2.2), and who then comes last would delete their journal.
    """
    with _MAKING:  # until it is closed again, nobody may go on to connect to it
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE))
        except FileExistsError:
            if not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None


def open_unwritable(path: Path, migrations: Sequence[Migration]) -> sqlite3.Connection:
    """A connection that only reads, to a file or in a folder that may not be written.

    Raises as `open_database`, and BrokenDatabaseError for tables that would have to be migrated.
    """
    try:
        return _open_to_read(path, migrations, "mode=ro")
    except sqlite3.OperationalError as error:
        if primary_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        # WAL mode wants an index beside the file, and that can neither be found nor made: read it as it is
        return _open_to_read(path, migrations, "immutable=1")


def _open_to_read(path: Path, migrations: Sequence[Migration], how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?{how}", uri=True, isolation_level=None, check_same_thread=False
    )
    with _closed_on_failure(connection), broken_noticed(path):
        version = _version(connection, path, len(migrations))
        if version != len(migrations):
            raise BrokenDatabaseError(f"{path}: of an older MyLLM, and cannot be written")
    return connection


def set_aside(path: Path) -> Path:
    """Renames a broken file, and what belongs to it, to `NAME.corrupt-TIME`. Raises OSError."""
    kept = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
    path.rename(kept)
    for suffix in COMPANIONS:  # a new file must never meet the journal of an old one
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(kept.with_name(kept.name + suffix))
    return kept


@contextmanager
def broken_noticed(path: Path) -> Iterator[None]:
    """Raises BrokenDatabaseError for SQLite's words of a damaged file; other errors pass."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if primary_code(error) in _BROKEN:
            raise BrokenDatabaseError(f"{path}: {error}") from error
        raise


def primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's result code without its extension; None for an error of the Python module."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One write transaction: all of what happens inside, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")  # which a full disk may refuse
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _closed_on_failure(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _use_wal(connection: sqlite3.Connection, busy_seconds: float = BUSY_SECONDS) -> None:
    """Where two processes open a new file at once, SQLite tells one of them at once that it is locked,
    whatever the timeout: to wait could be a deadlock. So this tries again.
    """
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(BUSY_LOOK)
        else:
            return


def _set_up(
    connection: sqlite3.Connection,
    path: Path,
    migrations: Sequence[Migration],
    synchronous: str,
    busy_seconds: float,
) -> None:
    version = _version(connection, path, len(migrations))
    _use_wal(connection, busy_seconds)
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    if version == len(migrations):
        return
    from sqlite_utils import Database

    with transaction(connection):
        version = _version(connection, path, len(migrations))  # another process may have been first
        database = Database(connection, execute_plugins=False)
        for migrate in migrations[version:]:
            migrate(database)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")


def _version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    """The version of the file's tables, 0 for an empty file. Raises BrokenDatabaseError for a stranger's."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        return 0
    if application != APPLICATION_ID:
        raise BrokenDatabaseError(f"{path}: another program's database")
    if version > newest:
        raise NewerDatabaseError(f"{path}: of a newer MyLLM")
    return int(version)


def reason(error: Exception) -> str:
    """What an error of this module says, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, MyllmError):
        return str(error)
    if isinstance(error, sqlite3.Error) and primary_code(error) in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    ):
        return "locked by another process"
    return str(error)
