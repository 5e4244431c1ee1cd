"""Files of keys and values: where they are, what their names say, and how those of a conversation go.

A leaf: the engine writes and reads them (`engine/snapshot.py`), and whoever removes a conversation removes
them, too. Must not know what is in them.

A file is called BEGINNING-SIZE-END.kv: it has SIZE tokens that follow on those that BEGINNING stands for,
and END stands for all of these together. Where BEGINNING is no file's end but lies within one, that one's end
follows as a fourth part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from myllm import paths

SUFFIX: Final = ".kv"


class Named(NamedTuple):
    """What a file's name says."""

    beginning: str
    size: int
    end: str
    within: str = ""

    def __str__(self) -> str:
        branch = f"-{self.within}" if self.within else ""
        return f"{self.beginning}-{self.size}-{self.end}{branch}{SUFFIX}"

    @property
    def before(self) -> str:
        """The end of the file that it goes on from."""
        return self.within or self.beginning


def folder() -> Path:
    """The user's. Raises ConfigError where there is no home."""
    return paths.cache_dir() / "kv"


def parsed(name: str) -> Named | None:
    """None for the name of anything else."""
    beginning, size, end, within = (*name.removesuffix(SUFFIX).split("-", 3), "", "", "")[:4]
    if not name.endswith(SUFFIX) or not (size.isascii() and size.isdigit()):
        return None
    return Named(beginning, int(size), end, within)


def forget(where: Path, ends: Iterable[str]) -> None:
    """Removes the files that lead to these ends, as far back as nothing else goes on from them."""
    with suppress(OSError):
        names = [named for file in where.iterdir() if (named := parsed(file.name))]
        by_end = {named.end: named for named in names}
        following = Counter(named.before for named in names)
        for end in ends:
            while (named := by_end.get(end)) and not following[end]:
                del by_end[end]
                (where / str(named)).unlink(missing_ok=True)
                end = named.before
                following[end] -= 1
