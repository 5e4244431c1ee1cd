"""`file:PATH`: a model file that is already on this machine, used where it lies; an embedding model's
checkpoint in a folder is converted into the store.

Owns making the path absolute, and what tells one state of files from another. Must not copy: that is
`file_copy.py`'s.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from myllm.errors import NotFoundError
from myllm.models.bert_checkpoint import FILES
from myllm.models.gguf import read_model
from myllm.models.names import name_from
from myllm.models.sources import Fetched, Progress
from myllm.models.store import Staging


class FileSource:
    """The hash is not computed: that would read the whole file; `models verify` does it."""

    needs_network = False
    resumes = False

    def check(self, place: str) -> str:
        return str(Path(place).expanduser().absolute())

    def state(self, place: str) -> str | None:
        """Of a folder, whose conversion is ours; a file is used as it is."""
        return state_of(Path(place) / name for name in FILES) if Path(place).is_dir() else None

    def fetch(self, place: str, staging: Staging, progress: Progress) -> Fetched:
        path = Path(place)
        if path.is_dir():
            from myllm.models.sources.checkpoint import convert_folder

            file, *digests = convert_folder(path, staging, progress)
            return Fetched(name_from(path.name), (file,), *digests)
        if not path.is_file():
            raise NotFoundError(f"{path}: no such file; check the path")
        return Fetched(name_from(path.name), read_model(path).paths)


def state_of(files: Iterable[Path]) -> str:
    """Changes with the size of any of `files`, and with its time of change."""
    known = [(file.name, status.st_size, status.st_mtime_ns) for file in files if (status := _status(file))]
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None  # whoever fetches it says why


SOURCE = FileSource()
