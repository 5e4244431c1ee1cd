"""`copy:PATH`: a copy of a model file that is already on this machine, for one that may go away.

Owns the copying. The copy is a file of the store like any that was downloaded.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from myllm.models.sources import Fetched, Progress
from myllm.models.sources.file import SOURCE as IN_PLACE
from myllm.models.sources.file import state_of
from myllm.models.store import CHUNK, Staging, create_private, read_errors, write_errors


class CopySource:
    """The hash is computed on the way."""

    needs_network = False
    resumes = False

    def check(self, place: str) -> str:
        return IN_PLACE.check(place)

    def state(self, place: str) -> str | None:
        return IN_PLACE.state(place) or state_of([Path(place)])

    def fetch(self, place: str, staging: Staging, progress: Progress) -> Fetched:
        there = IN_PLACE.fetch(place, staging, progress)
        if staging.holds(there.files[0]):  # a checkpoint was converted: that is no file of the user's
            return there
        total = sum(file.stat().st_size for file in there.files)
        digest = hashlib.sha256()
        done = 0
        copies = []
        for number, original in enumerate(there.files, start=1):
            copies.append(staging.part(number, len(there.files)))
            with read_errors(str(original)):
                source = original.open("rb")
            with source, write_errors(str(copies[-1])), os.fdopen(create_private(copies[-1]), "wb") as out:
                while chunk := source.read(CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(done, total)
        return Fetched(there.name, tuple(copies), digest.hexdigest())


SOURCE = CopySource()
