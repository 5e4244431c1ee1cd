"""A SQLite file of another program, read as what it is: something that a stranger may have made.

Owns what such a file may do: be read, from tables that are expected, in bounded time and memory. Must not
know what is in the tables. Defences as sqlite.org/security.html lists them: the schema is not trusted, so
that no view or trigger runs functions; views and virtual tables are not read at all; nothing can be written
or attached.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

from myllm.errors import BadDataError, IOFailureError
from myllm.protocol import MAX_MESSAGE

MAX_ROWS: Final = 5_000_000
"""Of one query."""
WAL_AT: Final = 19
"""Where the header has the version that a reader needs (sqlite.org/fileformat.html §1.3.3)."""
WAL: Final = b"\x02"
STEPS: Final = 100_000
"""Instructions of SQLite's machine between two looks at the count."""
MAX_LOOKS: Final = 50_000
"""Looks at one connection: some minutes of work, which 5,000,000 rows do not need."""
_ALLOWED: Final = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
_TABLES: Final = "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0"
"""A view or a virtual table has no page of its own."""


class Row(dict[str, Any]):
    """A row by its columns' names; a column that this version of the table lacks is None."""

    def __missing__(self, name: str) -> None:
        return None


class ForeignDatabase:
    """A file open for reading, of whose tables only `tables` may be read. Must be closed."""

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self._path = path
        self._looks = 0
        try:
            self._connection = sqlite3.connect(_uri(path), uri=True)
        except sqlite3.Error as error:
            raise self._refused(error) from error
        try:
            self._guard()
            self._tables = {row["name"] for row in self.rows(_TABLES)} & set(tables)
            self._connection.set_authorizer(self._authorized)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def has(self, *tables: str) -> bool:
        """Whether all of these are there."""
        return self._tables.issuperset(tables)

    def rows(self, query: str, parameters: Iterable[Any] = ()) -> Iterator[Row]:
        """The rows of a SELECT, one in memory at a time. Raises BadDataError, IOFailureError."""
        try:
            cursor = self._connection.execute(query, tuple(parameters))
            names = [column[0] for column in cursor.description]
            for number, row in enumerate(cursor):
                if number == MAX_ROWS:
                    raise BadDataError(f"{self._path}: a table of more than {MAX_ROWS:,} rows")
                yield Row(zip(names, row, strict=True))
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def _guard(self) -> None:
        connection = self._connection
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_MESSAGE)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_progress_handler(self._look, STEPS)
        try:
            for setting in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON"):
                connection.execute(f"PRAGMA {setting}")
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def _look(self) -> int:
        self._looks += 1
        return self._looks > MAX_LOOKS  # other than 0 interrupts the query

    def _authorized(self, action: int, table: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT or (action in _ALLOWED and table in self._tables):
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    def _refused(self, error: sqlite3.Error) -> BadDataError | IOFailureError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        kind = IOFailureError if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) else BadDataError
        return kind(f"{self._path}: cannot be read as llm's database: {error}")


def _uri(path: Path) -> str:
    """A file to read and not to change. Raises OSError.

    One in WAL mode without a log is open nowhere; as immutable, SQLite makes no files beside it.
    """
    path = path.resolve()
    with path.open("rb") as file:
        in_wal_mode = file.read(WAL_AT + 1)[WAL_AT:] == WAL
    alone = in_wal_mode and not path.with_name(f"{path.name}-wal").exists()
    return f"file:{quote(str(path))}?mode=ro{'&immutable=1' if alone else ''}"


def text(value: object) -> str:
    """A column that should hold text; anything else counts as none."""
    return value if isinstance(value, str) else ""
