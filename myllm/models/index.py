"""The index: what the headers of known model files say, so that a list need not open ten thousand files.

Owns one JSON file in the cache folder. A file is known again by its size and time of change; only
new and changed ones are opened. Must not know names or places. Losing the index loses only time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from myllm.errors import MyllmError
from myllm.models.store import create_private
from myllm.paths import make_private

if TYPE_CHECKING:
    from myllm.models.header import Header

FORMAT: Final = 1
"""Goes up whenever `summary` or what counts as a model changes; an index of another format is dropped."""
ESTIMATE_CONTEXT: Final = 4096
"""Tokens of context that a load's memory is estimated for where the settings name none."""

Summary = dict[str, Any]


def summary(header: Header, context: int | None = None, kv_type: str | None = None) -> Summary:
    """What `models list` says of a header; sizes in bytes."""
    window = context or min(header.context_length or ESTIMATE_CONTEXT, ESTIMATE_CONTEXT)
    return {
        "size_bytes": header.size_bytes,
        "architecture": header.architecture,
        "parameters": header.parameters,
        "quantization": header.quantization,
        "context_length": header.context_length,
        "embedding_length": header.embedding_length,
        "kv_bytes_per_token": header.kv_bytes_per_token(kv_type or "f16"),
        "memory_estimate_bytes": header.memory_estimate(window, kv_type or "f16"),
    }


class Index:
    """The summaries by path; making one touches nothing."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "models-index.json"

    def summaries(self, paths: Iterable[str]) -> dict[str, Summary]:
        """The summary of each file that is a model, by path; others are left out.

        Opens the new and changed files, and writes the index again where there were any.
        """
        known = self._read()
        current: dict[str, list[Any]] = {}
        for path in paths:
            try:
                status = os.stat(path)  # noqa: PTH116 - a Path object would cost more than the call
            except OSError:
                continue
            size, mtime_ns = status.st_size, status.st_mtime_ns
            entry = known.get(path)
            if entry is None or entry[0] != size or entry[1] != mtime_ns:
                entry = [size, mtime_ns, _read_summary(Path(path))]
            current[path] = entry
        if current != known:
            self._write(current)
        return {path: entry[2] for path, entry in current.items() if entry[2] is not None}

    def _read(self) -> dict[str, list[Any]]:
        try:
            content = orjson.loads(self._file.read_bytes())
            if content["format"] != FORMAT:
                return {}
            return {path: [size, mtime, said] for path, (size, mtime, said) in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, files: dict[str, list[Any]]) -> None:
        """Replaces the index; where the cache folder cannot be written, the next list is as slow as this."""
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}.new")
        with suppress(OSError, MyllmError):
            make_private(self._file.parent)
            new.unlink(missing_ok=True)
            with os.fdopen(create_private(new), "wb") as file:
                file.write(orjson.dumps({"format": FORMAT, "files": files}))
            new.replace(self._file)


def _read_summary(path: Path) -> Summary | None:
    """None for what is not a model that can be run: broken, a projector, an adapter, a vocabulary."""
    from myllm.models.gguf import read_model

    try:
        header = read_model(path)
    except MyllmError:
        return None
    return summary(header) if header.is_language_model else None
