"""Which of many file names make up one model: a GGUF alone, or all parts of a split one.

Owns the grouping for sources that list what they have. Names come from strangers and are only compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from myllm.errors import BadDataError
from myllm.models.names import PART_NAME

SUFFIX = ".gguf"


def models_among(names: Iterable[str]) -> dict[str, list[str]]:
    """Name without suffix and part number → that model's files in order; other files are left out."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(SUFFIX):
            part = PART_NAME.fullmatch(name)
            models.setdefault(part["stem"] if part else name[: -len(SUFFIX)], []).append(name)
    return models


def check_complete(names: Sequence[str], where: str) -> None:
    """Raises BadDataError unless the files of one model are one file, or all parts of one."""
    parts = [part for name in names if (part := PART_NAME.fullmatch(name))]
    expected = int(parts[0]["count"]) if parts else 1
    numbers = [int(part["number"]) for part in parts] or [1]
    if len(names) != expected or numbers != list(range(1, expected + 1)):
        raise BadDataError(f"{where}: {len(names)} of the {expected} parts of {names[0]!r:.120} are there")
