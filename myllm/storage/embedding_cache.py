"""Vectors kept by what they were made of: one file in the cache folder, least recently used goes first.

Owns the key of an entry and the fate of a file that cannot be used: a cache never fails, it is done
without, said once. Must not know models or requests. Blocking; for one thread, except `close`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from myllm.errors import MyllmError
from myllm.storage.database import (
    BrokenDatabaseError,
    broken_noticed,
    open_database,
    primary_code,
    reason,
    set_aside,
    transaction,
)

FILE: Final = "embeddings.sqlite"
MAX_BYTES: Final = 1024**3
KEPT: Final = 0.9
"""The part of the cap that eviction leaves, so that it is seldom needed."""
IN_ONE_QUERY: Final = 500
"""Keys in one IN: SQLite before 3.32 takes 999 parameters."""
MOST_USED: Final = 4096
"""Entries read, after which that is noted."""
MOST_PUTS: Final = 2**62
"""What nobody reaches by putting, and SQLite's integers still hold the next of."""
_WINDOW: Final = struct.Struct("<3q")

T = TypeVar("T")


class CachedVectors(NamedTuple):
    """One text's entry: `windows` as (start, end, tokens), in order, start and end in characters of the
    text; `vectors` is float32 little-endian, all windows' one after the other.
    """

    windows: list[tuple[int, int, int]]
    vectors: bytes


def cache_keys(
    texts: Iterable[str],
    *,
    fingerprint: str,
    window: int | None,
    overlap: int,
    pool: str,
    purpose: str | None,
    on_overflow: str,
) -> list[bytes]:
    """Of each text the SHA-256 digest of all that its vectors depend on; `fingerprint` is the model's."""
    settings = json.dumps([1, fingerprint, window, overlap, pool, purpose, on_overflow])
    beginning = hashlib.sha256(settings.encode() + b"\0")
    keys = []
    for text in texts:
        digest = beginning.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return keys


def cache_file(folder: Path) -> Path:
    """Where the cache of a cache folder is."""
    return folder / FILE


class EmbeddingCache:
    """The cache in `folder`, opened when it is first asked. No method but the constructor's `note` raises.

    `max_bytes` is about the size of the file. `note` is told what the user should know: a broken file
    that was set aside, a cache that is done without.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int = MAX_BYTES, note: Callable[[str], None] = lambda text: None
    ) -> None:
        self._path = cache_file(folder)
        self._max_bytes = max_bytes
        self._note = note
        self._connection: sqlite3.Connection | None = None
        self._usable = self._writable = True
        self._rebuilt = False
        self._used: set[bytes] = set()
        """Entries that were read since it was last noted, and are not the newest anyway."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, CachedVectors]:
        """The entries there are; they count as used now, which is noted for many at once, later."""
        if not keys:
            return {}
        found, outdated = self._attempt(lambda connection: _lookup(connection, keys)) or ({}, set())
        self._used |= outdated
        if len(self._used) > MOST_USED:
            self._touch()
        return found

    def put(self, entries: Mapping[bytes, CachedVectors]) -> None:
        """Keeps entries, all or none; the oldest make room where the cap is passed."""
        if entries and self._writable:
            self._touch()  # first, or what is in use could make room
            self._attempt(lambda connection: _store(connection, entries, self._max_bytes), writes=True)

    def close(self) -> None:
        """Ends the connection; what has been put is kept."""
        self._touch()
        self._usable = False
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _touch(self) -> None:
        used, self._used = list(self._used), set()
        if used and self._writable:
            self._attempt(lambda connection: _touch(connection, used), writes=True)

    def _attempt(self, action: Callable[[sqlite3.Connection], T], *, writes: bool = False) -> T | None:
        """Runs `action`; a broken file is replaced once, anything else ends the use of the cache."""
        while self._usable:
            try:
                if self._connection is None:
                    self._connection = open_database(self._path, MIGRATIONS, synchronous="NORMAL")
                with broken_noticed(self._path):
                    return action(self._connection)
            except BrokenDatabaseError as error:
                self._replace(error)
            except (sqlite3.Error, OSError, MyllmError) as error:
                self._do_without(error, writes=writes)
                return None
        return None

    def _replace(self, error: BrokenDatabaseError) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._rebuilt:
            self._do_without(error)
            return
        self._rebuilt = True
        try:
            kept = set_aside(self._path)
        except FileNotFoundError:
            return  # another process was first
        except OSError as failure:
            self._do_without(failure)
        else:
            self._note(f"embedding cache: {error}; set aside as {kept.name}, and begun anew")

    def _do_without(self, error: Exception, *, writes: bool = False) -> None:
        """A disk that is full, or not writable, still gives what it has; all else is not asked again."""
        code = primary_code(error) if isinstance(error, sqlite3.Error) else None
        if writes and code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            self._writable = False
            self._note(f"embedding cache: {self._path}: {reason(error)}; nothing more is kept in it")
            return
        self.close()
        self._note(f"embedding cache: {self._path}: {reason(error)}; going on without it")


# ── tables and statements ───────────────────────────────────────────────────────────────────


def _create(database: Any) -> None:
    columns = {"key": bytes, "used": int, "windows": bytes, "vectors": bytes}
    database.execute(database.create_table_sql("embeddings", columns, pk="key", not_null=set(columns)))
    database.execute("CREATE INDEX embeddings_used ON embeddings (used)")


MIGRATIONS: Final = (_create,)


def _lookup(
    connection: sqlite3.Connection, keys: Sequence[bytes]
) -> tuple[dict[bytes, CachedVectors], set[bytes]]:
    """The entries there are, and the keys of those that something newer has been put since they were used."""
    found: dict[bytes, CachedVectors] = {}
    outdated = set()
    newest = _newest(connection)
    for part, marks in _parts(keys):
        rows = connection.execute(
            f"SELECT key, used, windows, vectors FROM embeddings WHERE key IN ({marks})",  # noqa: S608 — marks only
            part,
        )
        for key, used, packed, vectors in rows:
            if entry := _entry(packed, vectors):
                found[key] = entry
                if used < newest:
                    outdated.add(key)
    return found, outdated


def _entry(packed: Any, vectors: Any) -> CachedVectors | None:
    """What a row holds; None where that is no entry of ours, whatever it is."""
    if not (isinstance(packed, bytes) and isinstance(vectors, bytes) and packed and vectors):
        return None
    n_windows, odd = divmod(len(packed), _WINDOW.size)
    if odd or len(vectors) % (4 * n_windows):
        return None
    return CachedVectors(list(_WINDOW.iter_unpack(packed)), vectors)


def _touch(connection: sqlite3.Connection, keys: Sequence[bytes]) -> None:
    with transaction(connection):
        newest = _newest(connection)
        for part, marks in _parts(keys):
            connection.execute(
                f"UPDATE embeddings SET used = ? WHERE key IN ({marks})",  # noqa: S608 — marks only
                (newest, *part),
            )


def _store(connection: sqlite3.Connection, entries: Mapping[bytes, CachedVectors], max_bytes: int) -> None:
    with transaction(connection):
        now = _newest(connection) + 1
        connection.executemany(
            "INSERT OR REPLACE INTO embeddings (key, used, windows, vectors) VALUES (?, ?, ?, ?)",
            (
                (key, now, b"".join(_WINDOW.pack(*window) for window in entry.windows), entry.vectors)
                for key, entry in entries.items()
            ),
        )
        if _used_bytes(connection) > max_bytes:
            _evict(connection, int(max_bytes * KEPT))


def _evict(connection: sqlite3.Connection, target: int) -> None:
    """Deletes the entries that were used longest ago until the pages in use are under `target` bytes."""
    while (size := _used_bytes(connection)) > target:
        (count,) = connection.execute("SELECT count(*) FROM embeddings").fetchone()
        if not count:
            return
        surplus = max(1, count * (size - target) // size)
        connection.execute(
            "DELETE FROM embeddings WHERE rowid IN "
            "(SELECT rowid FROM embeddings ORDER BY used, rowid LIMIT ?)",
            (surplus,),
        )


def _newest(connection: sqlite3.Connection) -> int:
    """The clock that orders uses: it ticks with each put, so that reading the same again writes nothing.

    Raises BrokenDatabaseError where it shows what no number of puts is.
    """
    (newest,) = connection.execute("SELECT max(used) FROM embeddings").fetchone()
    if newest is None:
        return 0
    if not isinstance(newest, int) or newest > MOST_PUTS:  # SQLite orders text and blobs after all numbers
        raise BrokenDatabaseError(f"{FILE}: an entry's use is {newest!r:.40}")
    return newest


def _used_bytes(connection: sqlite3.Connection) -> int:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def _parts(keys: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], str]]:
    """The keys, as many at once as one statement takes, each with its question marks."""
    for at in range(0, len(keys), IN_ONE_QUERY):
        part = keys[at : at + IN_ONE_QUERY]
        yield part, ",".join("?" * len(part))
