"""The catalog: short names of models known to work, with their pinned sources and hashes.

Owns reading `catalog.toml`. Must not know whether a model is here already, or how one is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model: `source` as `models pull` takes it; `sha256` and `size_bytes` are of the GGUF.

    Of a model that is converted when it is pulled, `checkpoint_sha256`, of the weights, stands for it.
    """

    name: str
    description: str
    license: str
    source: str
    size_bytes: int
    sha256: str | None = None
    checkpoint_sha256: str | None = None


@cache
def catalog() -> MappingProxyType[str, CatalogEntry]:
    """The entries by name, in the file's order."""
    import tomllib  # read only when a name is not one that is already here

    with Path(__file__).with_name("catalog.toml").open("rb") as file:
        tables = tomllib.load(file)
    return MappingProxyType({name: CatalogEntry(name=name, **table) for name, table in tables.items()})
