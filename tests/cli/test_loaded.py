"""How a loaded model is printed."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest

from myllm.cli.loaded import HEAD, loaded_jsonl, loaded_line, loaded_table

ENTRY = {
    **{"model": "m", "path": "/m.gguf", "state": "ready", "pid": 7, "memory_bytes": 1_234_000_000},
    **{"context": 512, "window": 8192, "busy": 2, "waiting": 0, "cached": 3, "tokens_per_second": 41.26},
    **{"kv_hit_rate": 0.376, "threads": 1, "gpu_layers": 0, "idle_s": 0.0, "keep_alive_s": 1799.6},
    "pinned": False,
}
LOADING = {"model": "m", "path": "/m.gguf", "state": "loading", "pinned": False}


def cells(entry: dict[str, Any]) -> dict[str, str]:
    """The row of a table by its head, cut where the head's words begin."""
    head, row = loaded_table([entry]).decode().splitlines()
    starts = [head.index(name) for name in HEAD]
    ends = [*starts[1:], None]
    return {name: row[a:b].strip() for name, a, b in zip(HEAD, starts, ends, strict=True)}


def test_a_row_has_all_that_is_known() -> None:
    assert cells(ENTRY) == {
        **{"MODEL": "m", "MEMORY": "1.2 GB", "CONTEXT": "8192", "BUSY": "2", "CACHED": "3"},
        **{"TOKENS/S": "41.3", "KV HITS": "38%", "IDLE": "0s", "KEPT": "30m", "RUNS ON": "1 thread"},
    }


def test_a_model_that_loads_or_goes_says_so_and_nothing_that_is_not_known() -> None:
    assert {name: cell for name, cell in cells(LOADING).items() if cell} == {"MODEL": "m", "IDLE": "loading"}
    assert cells(ENTRY | {"state": "unloading"})["IDLE"] == "unloading"


def test_a_worker_that_does_not_answer_has_gaps() -> None:
    silent = ENTRY | dict.fromkeys(("window", "busy", "tokens_per_second", "kv_hit_rate", "threads"))
    assert {cells(silent)[name] for name in ("CONTEXT", "BUSY", "TOKENS/S", "KV HITS", "RUNS ON")} == {""}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.2, "59s"), (59.7, "1m"), (90, "2m"), (3600, "1h"), (7200, "2h"), (86400 * 3, "3d")],
)
def test_times_are_in_their_largest_unit(seconds: float, shown: str) -> None:
    assert cells(ENTRY | {"idle_s": seconds})["IDLE"] == shown


@pytest.mark.parametrize(
    ("kept", "cell", "line"),
    [
        ({"pinned": True, "keep_alive_s": None}, "pinned", "pinned"),
        ({"keep_alive_s": None}, "for ever", "kept for ever"),
        ({"keep_alive_s": 7200}, "2h", "kept for 2h"),
    ],
)
def test_how_long_it_stays(kept: dict[str, Any], cell: str, line: str) -> None:
    assert cells(ENTRY | kept)["KEPT"] == cell
    assert loaded_line(ENTRY | kept).decode() == f"m: 1.2 GB, context 8192, 1 thread, {line}\n"


@pytest.mark.parametrize("layers", [-1, 20])
def test_a_gpu_is_said(layers: int) -> None:
    assert cells(ENTRY | {"gpu_layers": layers})["RUNS ON"] == "GPU"


def test_one_that_went_before_it_could_be_described_is_a_line_too() -> None:
    assert loaded_line({"model": "m"}) == b"m: gone again\n"


def test_names_cannot_draw_on_a_terminal() -> None:
    hostile = ENTRY | {"model": "\x1b[2J\x9b\nm"}
    assert not re.search(rb"[\x1b\x7f]|\xc2[\x80-\x9f]", loaded_table([hostile]) + loaded_line(hostile))
    assert loaded_line(hostile).count(b"\n") == 1
    line = loaded_jsonl([hostile])
    assert not re.search(rb"[\x1b\x7f]|\xc2[\x80-\x9f]", line)
    assert orjson.loads(line) == hostile
