"""The benchmarks' arithmetic, without any measuring."""

from __future__ import annotations

import os

from tests.bench.figures import alone, at_least, at_most, compared, heading, interleaved, markdown
from tests.bench.processes import tree_pss


def test_a_row_is_judged_by_the_median_of_its_pairs_ratios() -> None:
    """Not by the ratio of the medians, which would compare runs that were not made side by side."""
    row = compared("decode", "tokens/s", [(100, 100), (50, 100), (180, 200)], at_least(0.9))
    assert markdown(row) == "| decode | 100 tokens/s | 100 tokens/s | 0.9 (0.5–1) | ≥ 0.9: met |"


def test_a_missed_target_says_so() -> None:
    row = alone("memory", "MB", [410.0, 390.0, 420.0], at_most(400, " MB"))
    assert markdown(row) == "| memory | 410 MB | – | 410 (390–420) | ≤ 400 MB: MISSED |"


def test_pairs_alternate() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return 1.0

    assert interleaved(lambda: measure("ours"), lambda: measure("peer"), 2) == [(1.0, 1.0)] * 2
    assert calls == ["ours", "peer"] * 2


def test_rows_have_as_many_cells_as_the_heading() -> None:
    assert heading().splitlines()[0].count("|") == markdown(alone("x", "s", [1.0])).count("|")


def test_the_memory_of_this_process_is_seen() -> None:
    assert tree_pss(os.getpid()) > 1_000_000
