"""An embedding model's checkpoint out of an archive, or out of a folder, and its way to a GGUF.

Owns which members are taken: those that bert_checkpoint.py reads, each to a file that we name; perhaps out of
a zip inside the archive. Must not know pip, hubs or the store's layout.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from myllm.errors import BadDataError
from myllm.models.bert_checkpoint import FILES, MAX_JSON, WEIGHTS, missing_file
from myllm.models.convert import convert
from myllm.models.sources import Progress
from myllm.models.sources.members import check_sizes, member_chunks
from myllm.models.store import Staging, create_private, file_digest, write_errors
from myllm.paths import make_private

MAX_MEMBERS: Final = 10_000


def convert_archive(
    archive: zipfile.ZipFile, staging: Staging, progress: Progress
) -> tuple[Path, str, str] | None:
    """The GGUF made of the one checkpoint in `archive`, its SHA-256 and that of the checkpoint's weights.

    None where there is no checkpoint. Raises BadDataError, IOFailureError; blocks.
    """
    if found := _find(archive):
        return _converted(_take(archive, found, staging, progress), staging, progress)
    inner = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".zip")]
    if len(inner) != 1:
        return None
    zipped = staging.folder / "checkpoint.zip"
    _copy(archive, inner[0], zipped, staging, progress)
    with zipfile.ZipFile(zipped) as within:
        found = _find(within)
        taken = found and _take(within, found, staging, progress)
    zipped.unlink()
    return _converted(taken, staging, progress) if taken else None


def convert_folder(checkpoint: Path, staging: Staging, progress: Progress) -> tuple[Path, str, str]:
    """The GGUF made of a checkpoint in a folder of the user's, its SHA-256 and that of the weights."""
    return _converted(checkpoint, staging, progress)


def _converted(checkpoint: Path, staging: Staging, progress: Progress) -> tuple[Path, str, str]:
    target = staging.part(1, 1)
    convert(checkpoint, target)
    weights = file_digest([checkpoint / WEIGHTS], progress)
    return target, file_digest([target], progress), weights


def _find(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo] | None:
    """The members of the archive's checkpoint by the names in FILES; None where there is none."""
    entries = archive.infolist()
    weights = [entry for entry in entries if entry.filename.rpartition("/")[2] == WEIGHTS]
    if not weights:
        return None
    if len(weights) > 1 or len(entries) > MAX_MEMBERS:
        raise BadDataError("archive: several models, or far too many members, in it; it is not known which")
    folder = weights[0].filename.removesuffix(WEIGHTS)
    wanted = {folder + name: name for name in FILES}
    taken = [entry for entry in entries if entry.filename in wanted]
    found = {wanted[entry.filename]: entry for entry in taken}
    if len(found) < len(taken):
        raise BadDataError("archive: two of its members have the same name; such an archive is not trusted")
    return found


def _take(
    archive: zipfile.ZipFile, found: dict[str, zipfile.ZipInfo], staging: Staging, progress: Progress
) -> Path:
    if missing := missing_file(found):
        raise BadDataError(f"archive: its model is no checkpoint that is known, {missing} is missing")
    checkpoint = make_private(staging.folder / "checkpoint")
    for name, entry in found.items():
        if name != WEIGHTS and entry.file_size > MAX_JSON:
            raise BadDataError(f"archive: {name} has {entry.file_size:,} bytes; such a model is not trusted")
        make_private((checkpoint / name).parent)
        _copy(archive, entry, checkpoint / name, staging, progress)
    return checkpoint


def _copy(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: Path, staging: Staging, progress: Progress
) -> None:
    check_sizes([entry], staging, "archive")
    done = 0
    with archive.open(entry) as stream, write_errors("model file"), open(create_private(file), "wb") as out:
        for chunk in member_chunks(stream, entry.file_size, "archive"):
            out.write(chunk)
            done += len(chunk)
            progress(done, entry.file_size)
