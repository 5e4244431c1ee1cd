"""The registry: model names → files. The one place that pulls, adds, names and removes models.

Owns what a name means, in this order: a path, a recorded name or alias, a catalog name, a model
found in place. Must not know how a source gets its bytes, nor anything of engines. Resolving a
recorded name reads one small file and imports nothing heavy; only the rest looks further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from myllm.errors import BadDataError, CannotCreateError, NotFoundError, PermissionDeniedError
from myllm.models.names import checked_name, has_prefix, is_path
from myllm.models.records import Record, Records
from myllm.models.store import Store, checked_digest, file_digest, read_errors
from myllm.paths import cache_dir, data_dir

if TYPE_CHECKING:
    from myllm.models.catalog import CatalogEntry
    from myllm.models.discovery import Found
    from myllm.models.index import Summary
    from myllm.models.sources import Fetched, Progress, Source
    from myllm.settings import Settings


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is here. `path` is its file (the first part of a split one); `sha256` where known."""

    name: str
    path: Path
    source: str
    sha256: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """What `Registry.remove` did: files `deleted`, and files `left` because they are not the store's."""

    name: str
    deleted: tuple[Path, ...] = ()
    left: tuple[Path, ...] = ()


class NotPulledError(NotFoundError):
    """A catalog name whose model is not here yet; `Registry.pull` gets it."""


def ignore_progress(done: int, total: int | None) -> None:
    """For callers that show none."""


class Registry:
    """Making one touches nothing; every method may be called from any thread or process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._records = Records(data_dir())
        self._store = Store(data_dir() / "models")

    # ── names → files ───────────────────────────────────────────────────────────────────────

    def resolve(self, name: str) -> Model:
        """The model that `name` means. Raises NotPulledError for a catalog name not pulled yet,
        NotFoundError (66) with the nearest names for any other, or where its file is gone.
        """
        if is_path(name):
            return self._at_path(Path(name).expanduser().absolute())
        record = self._records.find_source(name) if has_prefix(name) else self._records.find(name)
        if record is not None and Path(record.files[0]).is_file():
            return _model(record)

        from myllm.models.catalog import catalog

        if name in catalog():
            raise NotPulledError(f"{name}: not pulled yet; type `myllm models pull {name}`")
        if record is not None:
            raise NotFoundError(
                f"{name}: its file {record.files[0]} is gone; put it back, "
                f"or type `myllm models rm {record.name}` and get it again"
            )
        if has_prefix(name):
            raise NotFoundError(f"{name}: not pulled; type `myllm models pull {name}`")
        found = self._found()
        if name in found:
            return _in_place(found[name])
        raise NotFoundError(f"{name!r:.120}: no such model; {self._nearest(name, found)}")

    def _at_path(self, path: Path) -> Model:
        if path.is_dir():
            raise NotFoundError(
                f"{path}: a folder; a checkpoint in it is used after `myllm models add {path}`"
            )
        if not path.is_file():
            raise NotFoundError(f"{path}: no such model file; check the path")
        record = self._records.find_file(str(path))
        return _model(record) if record else Model(str(path), path, f"file:{path}")

    def _nearest(self, name: str, found: Iterable[str]) -> str:
        from difflib import get_close_matches

        from myllm.models.catalog import catalog

        known = [n for record in self._records.read().values() for n in record.names]
        by_lower = {n.lower(): n for n in (*found, *catalog(), *known)}
        nearest = [by_lower[n] for n in get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
        if nearest:
            return f"did you mean {' or '.join(nearest)}?"
        return "see `myllm models list`"

    def _found(self) -> dict[str, Found]:
        """Models found in place by name, without those on record."""
        from myllm.models.discovery import find_models

        recorded = {file for record in self._records.read().values() for file in record.files}
        found = find_models(self._settings.models_paths)
        return {each.name: each for each in found if each.path not in recorded}

    def models(self) -> Iterator[tuple[Model, Summary]]:
        """Every model that is here with what its header says: those on record, then those found in place.

        Names are unique: one on record hides one found in place. What is not a model is left out.
        """
        from myllm.models.index import Index

        recorded = self.recorded()
        taken = {name for model in recorded for name in (model.name, *model.aliases)}
        found = [each for each in self._found().values() if each.name not in taken]
        paths = [*(str(model.path) for model in recorded), *(each.path for each in found)]
        summaries = Index(cache_dir()).summaries(paths)
        for model in (*recorded, *map(_in_place, found)):
            if said := summaries.get(str(model.path)):
                yield model, said

    def recorded(self) -> list[Model]:
        """The models on record, whether their files are still there or not."""
        return [_model(record) for record in self._records.read().values()]

    def not_pulled(self) -> list[CatalogEntry]:
        """What the catalog has and this machine has not."""
        from myllm.models.catalog import catalog

        here = {name for record in self._records.read().values() for name in record.names}
        return [entry for name, entry in catalog().items() if name not in here]

    # ── getting models ──────────────────────────────────────────────────────────────────────

    def pull(
        self,
        source: str,
        progress: Progress = ignore_progress,
        *,
        name: str | None = None,
        sha256: str | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> Model:
        """Gets the model `source` (a catalog name, or PREFIX:PLACE) unless it is here; blocks.

        The model appears whole or not at all. `progress(bytes, total)` is called several times a
        second, from this thread, and may raise to stop. `on_wait` is called while another process
        pulls the same (by default it is progress(0, None)). Raises NotFoundError (66, also when
        offline), BadDataError (65: hash, not a model), UnavailableError (69), CannotCreateError
        (73), IOFailureError (74), PermissionDeniedError (77).
        """
        from myllm.models.catalog import catalog

        entry = catalog().get(source)
        where, place, canonical = self._source(entry.source if entry else source)
        if entry:
            name, sha256 = name or entry.name, sha256 or entry.sha256
        if sha256 is not None:
            checked_digest(sha256)
        if name is not None:
            name = self._own_name(name, canonical)
        state = where.state(place)
        if here := self._already(canonical, name, sha256, state):
            return here
        if where.needs_network and self._settings.offline:
            raise NotFoundError(
                f"{source}: not on this machine, and offline is set; "
                f"unset MYLLM_OFFLINE and type `myllm models pull {source}`"
            )
        wait = on_wait or (lambda: progress(0, None))
        with self._store.staging(canonical, wait, resumes=where.resumes) as staging:
            if here := self._already(canonical, name, sha256, state):
                return here
            fetched = where.fetch(place, staging, progress)
            if fetched.sha256 is None and (sha256 is not None or staging.holds(fetched.files[0])):
                fetched = replace(fetched, sha256=file_digest(fetched.files, progress))
            _check(fetched, sha256)
            if entry and entry.checkpoint_sha256 != fetched.checkpoint_sha256:
                raise BadDataError(
                    f"{source}: the SHA-256 of its weights is {fetched.checkpoint_sha256 or 'unknown'} and "
                    f"should be {entry.checkpoint_sha256}; it was deleted, as it is not what was asked for"
                )
            before = self._records.find_source(canonical)
            name = name or (before.name if before else self._free_name(fetched.name, canonical))
            files: Sequence[Path] = fetched.files
            if fetched.sha256 is not None and staging.holds(files[0]):
                files = self._store.install(files, fetched.sha256)
            return self._record(Record(name, canonical, tuple(map(str, files)), fetched.sha256, state=state))

    def add(self, path: Path, name: str | None = None) -> Model:
        """Records a file of the user's, used where it lies, or what a folder's checkpoint is converted to.

        Raises NotFoundError, BadDataError.
        """
        return self.pull(f"file:{path}", name=name)

    def add_copy(self, path: Path, name: str | None = None, progress: Progress = ignore_progress) -> Model:
        """Records a copy of a file of the user's, in the store; blocks. Raises as `add` and `pull`."""
        return self.pull(f"copy:{path}", progress, name=name)

    def alias(self, alias: str, name: str) -> Model:
        """Another name for a model; one found in place goes on record by it. Raises CannotCreateError."""
        from myllm.models.catalog import catalog

        if checked_name(alias) in catalog():
            raise CannotCreateError(f"{alias}: a name of the catalog; choose another")
        model = self.resolve(name)
        if self._records.find(model.name) is None:
            return self.add(model.path, alias)
        return _model(self._records.alias(alias, model.name))

    def remove(self, name: str) -> Removed:
        """Forgets a model, or only an alias, and deletes its files where the store owns them.

        Raises NotFoundError, and PermissionDeniedError (77) for a model found in place.
        """
        record = self._records.find(name)
        if record is None:
            model = self.resolve(name)
            raise PermissionDeniedError(
                f"{name}: found at {model.path}, where MyLLM did not put it; "
                "delete it with the program that did"
            )
        if name != record.name:
            self._records.remove_alias(name)
            return Removed(name)
        record, last = self._records.remove(name)
        files = [file for file in map(Path, record.files) if last and self._store.owns(file)]
        self._store.remove(files)
        left = [file for file in map(Path, record.files) if file not in files]
        return Removed(name, tuple(files), tuple(left))

    def verify(self, name: str, progress: Progress = ignore_progress) -> Model:
        """Reads all bytes of a model and computes their SHA-256; blocks. One not known yet is recorded.

        Raises BadDataError (65) where it is not the one it had when it was pulled.
        """
        from myllm.models.gguf import read_model

        model = self.resolve(name)
        with read_errors(str(model.path)):
            sha256 = file_digest(read_model(model.path).paths, progress)
        if model.sha256 is not None and sha256 != model.sha256:
            raise BadDataError(
                f"{model.name}: its SHA-256 is {sha256} and should be {model.sha256}: the file has changed; "
                f"type `myllm models rm {model.name}` and get it again"
            )
        record = self._records.find(model.name)
        if record is not None and record.sha256 is None:
            self._records.add(replace(record, sha256=sha256))
        return replace(model, sha256=sha256)

    def _source(self, text: str) -> tuple[Source, str, str]:
        from myllm.models.sources import PREFIXES, find_source

        found = find_source(f"file:{text}" if is_path(text) else text)
        if found is None:
            kinds = ", ".join(f"{prefix}:" for prefix in PREFIXES)
            raise NotFoundError(
                f"{text!r:.120}: neither in the catalog, nor a path, nor one of {kinds}; "
                f"{self._nearest(text, ())}"
            )
        return found

    def _already(self, source: str, name: str | None, sha256: str | None, state: str | None) -> Model | None:
        """The model from `source` in `state` where it is here whole, under `name` from now on."""
        here = [
            record
            for record in self._records.read().values()
            if (record.source, record.state) == (source, state)
            and sha256 in (None, record.sha256)
            and all(Path(file).is_file() for file in record.files)
        ]
        if not here:
            return None
        if name is None:
            return _model(here[0])
        named = next((record for record in here if record.name == name), None)
        return _model(named) if named else self._record(replace(here[0], name=name, aliases=()))

    def _record(self, record: Record) -> Model:
        """Records a model. Files of one that had its name go, where they are the store's and no other's."""
        before = self._records.read().get(record.name)
        model = _model(self._records.add(record))
        if before is not None:
            needed = {file for other in self._records.read().values() for file in other.files}
            unneeded = [Path(file) for file in before.files if file not in needed]
            self._store.remove([file for file in unneeded if self._store.owns(file)])
        return model

    def _own_name(self, name: str, source: str) -> str:
        """The name to record a model by: `name`, or what it is an alias of. Refuses, before anything is
        downloaded, one that is bad or another model's.
        """
        from myllm.models.catalog import catalog

        entry = catalog().get(checked_name(name))
        record = self._records.find(name)
        if entry is not None and entry.source != source:
            raise CannotCreateError(f"{name}: a name of the catalog; give another with --name")
        if record is not None and record.source != source:
            raise CannotCreateError(
                f"{name}: the name of a model from {record.source}; give another with --name"
            )
        return record.name if record is not None else name

    def _free_name(self, wanted: str, source: str) -> str:
        """The name a source proposes, with a number where another model has it already."""
        from myllm.models.catalog import catalog

        taken = {
            n for record in self._records.read().values() if record.source != source for n in record.names
        }
        numbered = (wanted, *(f"{wanted}-{n}" for n in range(2, len(taken) + 3)))
        return next(name for name in numbered if name not in taken and name not in catalog())


def _model(record: Record) -> Model:
    return Model(record.name, Path(record.files[0]), record.source, record.sha256, record.aliases)


def _in_place(found: Found) -> Model:
    return Model(found.name, Path(found.path), found.source, found.sha256)


def _check(fetched: Fetched, sha256: str | None) -> None:
    """Refuses what is not what it should be. Raises BadDataError (65)."""
    from myllm.models.gguf import read_model

    if sha256 is not None and fetched.sha256 != sha256:
        raise BadDataError(
            f"{fetched.name}: its SHA-256 is {fetched.sha256 or 'unknown'} and should be {sha256}; "
            "it was deleted, as it is not the file that was asked for"
        )
    header = read_model(fetched.files[0])
    if not header.is_language_model:
        raise BadDataError(f"{fetched.name}: a GGUF file, but not of a language model ({header.kind})")
    if header.paths != fetched.files:
        raise BadDataError(f"{fetched.name}: a model in {len(header.paths)} files, {len(fetched.files)} came")
