"""The file that sessions are in: a connection to read and one to write, and what errors mean to a user.

Owns opening, the fall-back to reading only, and transactions. A file of sessions is never set aside or
begun anew by itself. Must not know what is asked of it.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from myllm.errors import (
    BadDataError,
    CannotCreateError,
    IOFailureError,
    MyllmError,
    PermissionDeniedError,
    TryAgainError,
)
from myllm.storage.database import (
    BrokenDatabaseError,
    NewerDatabaseError,
    broken_noticed,
    open_database,
    open_unwritable,
    primary_code,
    reason,
    transaction,
)
from myllm.storage.session_tables import MIGRATIONS

BUSY_SECONDS: Final = 5.0
"""How long a call waits for another process's lock: an import of many messages takes some."""
PRAGMAS: Final = ("foreign_keys = ON", "fullfsync = ON", "checkpoint_fullfsync = ON")
"""`fullfsync`: what macOS calls fsync leaves data in the disk's own memory."""
_NOT_PERMITTED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_WRITABLE: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_ADVICE: Final[dict[int, tuple[type[MyllmError], str]]] = {
    sqlite3.SQLITE_BUSY: (TryAgainError, "try again"),
    sqlite3.SQLITE_LOCKED: (TryAgainError, "try again"),
    sqlite3.SQLITE_FULL: (IOFailureError, "what was kept before is whole; make room"),
    sqlite3.SQLITE_IOERR: (IOFailureError, "what was kept before is whole; check the disk"),
    **dict.fromkeys(_NOT_WRITABLE, (PermissionDeniedError, "make it writable, or set XDG_STATE_HOME")),
}


class SessionFile:
    """The database `path`, opened when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = _Connection(path)
        self.writer = _Connection(path)
        """Apart, so that reading does not wait while this process waits to write."""

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection, for this thread alone inside the block. Raises what `SessionStore` lists."""
        with errors_named(self.path), broken_noticed(self.path), self.reader.held() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The same in one transaction, synced to disk at its end."""
        with errors_named(self.path), broken_noticed(self.path), self.writer.held() as connection:
            if self.writer.not_writable is not None:
                raise self.writer.not_writable
            with transaction(connection):
                yield connection

    def close(self) -> None:
        for connection in (self.reader, self.writer):
            connection.close()


class _Connection:
    """One at a time uses it. Raises errors as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.opened: sqlite3.Connection | None = None
        self.not_writable: Exception | None = None
        """Why it only reads."""

    @contextmanager
    def held(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self.opened is None:
                self.opened = self._open()
            yield self.opened

    def close(self) -> None:
        with self._lock:
            if self.opened is not None:
                self.opened.close()
            self.opened = None

    def _open(self) -> sqlite3.Connection:
        try:
            opened = open_database(self._path, MIGRATIONS, busy_seconds=BUSY_SECONDS)
            self.not_writable = None
        except (OSError, sqlite3.OperationalError) as error:
            if not _forbids_writing(error) or not self._path.exists():
                raise
            opened = open_unwritable(self._path, MIGRATIONS)
            self.not_writable = error
        for pragma in PRAGMAS:
            opened.execute(f"PRAGMA {pragma}")
        return opened


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Raises errors of SQLite and of the file system as those of MyLLM; bugs pass."""
    try:
        yield
    except NewerDatabaseError as error:
        raise BadDataError(f"sessions: {error}, left as it is; update MyLLM") from error
    except BrokenDatabaseError as error:
        raise BadDataError(
            f"sessions: {error}; left as it is: put back a copy of it, or move it away to begin anew"
        ) from error
    except sqlite3.Error as error:
        if (known := _ADVICE.get(primary_code(error) or 0)) is None:
            raise
        kind, advice = known
        raise kind(f"sessions: {path}: {reason(error)}; {advice}") from error
    except OSError as error:
        raise _of_file_system(path, error) from error


def _of_file_system(path: Path, error: OSError) -> MyllmError:
    why = f"sessions: {path}: {reason(error)}"
    if error.errno not in _NOT_PERMITTED:
        return IOFailureError(f"{why}; check the disk")
    kind = PermissionDeniedError if path.exists() else CannotCreateError
    return kind(f"{why}; make it writable, or set XDG_STATE_HOME")


def _forbids_writing(error: OSError | sqlite3.OperationalError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NOT_PERMITTED
    return primary_code(error) in _NOT_WRITABLE
