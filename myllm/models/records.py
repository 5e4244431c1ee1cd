"""The records: which model names exist, which file each means, and where it came from.

Owns one small JSON file in the data folder, written whole and atomically under a lock. Must not
know how models are found, fetched or read. A reader takes no lock: it sees the old file or the new.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson

from myllm.errors import BadDataError, CannotCreateError, NotFoundError
from myllm.locks import locked
from myllm.models.store import create_private, read_errors, sync_folder, write_errors
from myllm.paths import make_private

FORMAT: Final = 1
"""The file's version; a file of a later one is refused, not guessed at."""


@dataclass(frozen=True, slots=True)
class Record:
    """One known model. `files` are absolute paths, the parts of a split model in order; `state` is that of
    its source when they were made."""

    name: str
    source: str
    files: tuple[str, ...]
    sha256: str | None = None
    aliases: tuple[str, ...] = field(default=())
    state: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


class Records:
    """The file `models.json`; making one touches nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "models.json"

    def read(self) -> dict[str, Record]:
        """All records by name. Raises BadDataError (65) for a file that cannot be understood."""
        try:
            with read_errors(str(self._file)):
                content = orjson.loads(self._file.read_bytes())
        except NotFoundError:
            return {}
        except ValueError as error:
            raise BadDataError(f"{self._file}: cannot be read ({error}); repair or remove it") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BadDataError(f"{self._file}: not a format this version knows; repair or remove it")
        try:
            return {name: _record(name, fields) for name, fields in content["models"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise BadDataError(f"{self._file}: broken ({error!r}); repair or remove it") from error

    def find(self, name: str) -> Record | None:
        """The record that has `name` as its name or as an alias."""
        records = self.read()
        return records.get(name) or next((r for r in records.values() if name in r.aliases), None)

    def find_file(self, file: str) -> Record | None:
        """The record whose first file is `file`."""
        return next((record for record in self.read().values() if record.files[0] == file), None)

    def find_source(self, source: str) -> Record | None:
        """A record of a model that came from `source`."""
        return next((record for record in self.read().values() if record.source == source), None)

    def add(self, record: Record, on_wait: Callable[[], None] = lambda: None) -> Record:
        """Adds a record. Raises CannotCreateError (73) where its name is another model's."""
        with self._changed(on_wait) as records:
            for name in record.names:
                taken = next((other for other in records.values() if name in other.names), None)
                if taken is not None and taken.name != record.name:
                    raise CannotCreateError(f"{name}: an alias of {taken.name}; give another with --name")
                if taken is not None and taken.source != record.source:
                    raise CannotCreateError(
                        f"{name}: already the name of a model from {taken.source}; give another with --name"
                    )
            before = records.get(record.name)
            records[record.name] = record if before is None else replace(record, aliases=before.aliases)
        return records[record.name]

    def alias(self, alias: str, name: str) -> Record:
        """Makes `alias` another name of the record `name`. Raises CannotCreateError, NotFoundError."""
        with self._changed() as records:
            record = records.get(name)
            if record is None:
                raise NotFoundError(f"{name}: no such model; see `myllm models list`")
            taken = next((other for other in records.values() if alias in other.names), None)
            if taken is not None and taken.name != name:
                raise CannotCreateError(f"{alias}: already a name of {taken.name}; choose another")
            if alias not in record.names:
                records[name] = replace(record, aliases=(*record.aliases, alias))
        return records[name]

    def remove(self, name: str) -> tuple[Record, bool]:
        """Forgets the record `name`; also whether no other record has its files. Raises NotFoundError."""
        with self._changed() as records:
            record = records.pop(name, None)
            if record is None:
                raise NotFoundError(f"{name}: no such model; see `myllm models list`")
            last = not any(set(record.files) & set(other.files) for other in records.values())
        return record, last

    def remove_alias(self, alias: str) -> Record:
        """Forgets an alias only. Raises NotFoundError."""
        with self._changed() as records:
            for name, record in records.items():
                if alias in record.aliases:
                    rest = tuple(other for other in record.aliases if other != alias)
                    records[name] = replace(record, aliases=rest)
                    return records[name]
        raise NotFoundError(f"{alias}: no such alias; see `myllm models list`")

    @contextmanager
    def _changed(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[dict[str, Record]]:
        """The records for changing, under the lock; written when the block ends well."""
        with write_errors(str(self._file)):
            make_private(self._folder)
            with locked(self._folder / "models.lock", on_wait):
                records = self.read()
                yield records
                self._write(records)

    def _write(self, records: dict[str, Record]) -> None:
        models = {name: {k: v for k, v in asdict(r).items() if k != "name"} for name, r in records.items()}
        content = orjson.dumps({"format": FORMAT, "models": models}, option=orjson.OPT_INDENT_2)
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}.new")
        new.unlink(missing_ok=True)
        try:
            with os.fdopen(create_private(new), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._file)
            sync_folder(self._folder)
        finally:
            new.unlink(missing_ok=True)


def _record(name: str, fields: dict[str, Any]) -> Record:
    files = tuple(str(file) for file in fields["files"])
    if not files:
        raise KeyError("files")
    aliases = tuple(fields.get("aliases", ()))
    return Record(name, str(fields["source"]), files, fields.get("sha256"), aliases, fields.get("state"))
