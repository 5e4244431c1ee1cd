"""Loaded models for people: a table of all, a line of one; entries of `status` as JSONL.

Owns how an entry is printed. A value that is not known yet, as while a model loads, is left out. Must
not know where entries come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson

from myllm.cli.console import visible_json
from myllm.cli.table import duration, on_one_line, printed, size, table

Entry = dict[str, Any]
HEAD: Final = (
    *("MODEL", "MEMORY", "CONTEXT", "BUSY", "CACHED", "TOKENS/S", "KV HITS", "IDLE", "KEPT", "RUNS ON"),
)


def loaded_table(entries: Sequence[Entry]) -> bytes:
    """One row a model."""
    return table([HEAD, *map(_row, entries)])


def loaded_line(entry: Entry) -> bytes:
    """What was just loaded."""
    window, kept = entry.get("window"), _kept(entry)
    parts = (
        _memory(entry),
        f"context {window}" if window else "",
        _runs_on(entry),
        kept if kept in ("", "pinned") else f"kept {kept if kept == 'for ever' else f'for {kept}'}",
    )
    text = ", ".join(part for part in parts if part)
    return printed(f"{on_one_line(entry['model'])}: {text or 'gone again'}\n")


def loaded_jsonl(entries: Sequence[Entry]) -> bytes:
    """The entries as they are."""
    return b"".join(visible_json(orjson.dumps(entry)) + b"\n" for entry in entries)


def _row(entry: Entry) -> tuple[str, ...]:
    rate, hits, idle = (entry.get(key) for key in ("tokens_per_second", "kv_hit_rate", "idle_s"))
    ready = entry.get("state") == "ready"
    return (
        str(entry["model"]),
        _memory(entry),
        _number(entry.get("window")),
        _number(entry.get("busy")),
        _number(entry.get("cached")),
        "" if rate is None else f"{rate:.1f}",
        "" if hits is None else f"{hits:.0%}",
        str(entry.get("state")) if not ready else "" if idle is None else duration(idle),
        _kept(entry),
        _runs_on(entry),
    )


def _memory(entry: Entry) -> str:
    return size(entry["memory_bytes"]) if entry.get("memory_bytes") else ""


def _kept(entry: Entry) -> str:
    """How long it stays if nobody asks it anything."""
    if entry.get("pinned"):
        return "pinned"
    if "keep_alive_s" not in entry:
        return ""
    left = entry["keep_alive_s"]
    return "for ever" if left is None else duration(left)


def _runs_on(entry: Entry) -> str:
    if entry.get("gpu_layers"):
        return "GPU"
    threads = entry.get("threads")
    return "" if threads is None else f"{threads} thread{'s' if threads != 1 else ''}"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
