"""Where a worker's engine keeps keys and values for later: the user's cache folder, as the settings say.

Must not know engines or what is kept.
"""

from __future__ import annotations

from pathlib import Path

from myllm import settings, snapshot_files
from myllm.engine import Kept
from myllm.errors import MyllmError


def where_kept(model: Path) -> Kept | None:
    """The place for what this model computes; None where nothing is to be kept, or can be."""
    from myllm.models.fingerprint import fingerprint

    try:
        max_bytes = settings.load().snapshots_max_size
        return Kept(snapshot_files.folder(), max_bytes, fingerprint(model)) if max_bytes else None
    except MyllmError:  # no home, say
        return None
