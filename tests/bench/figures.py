"""Figures and how they are compared: interleaved pairs, medians, targets, and the table of them.

Pure, but for calling what measures. A machine drifts by 30 % within minutes, so two programs are only
compared by ratios of runs made side by side: A B A B …, one ratio a pair, and the median of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

Measure = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio should be: `text` for people, `holds` to check it."""

    text: str
    holds: Callable[[float], bool]


def at_least(bound: float, unit: str = "") -> Target:
    return Target(f"≥ {bound:g}{unit}", lambda value: value >= bound)


def at_most(bound: float, unit: str = "") -> Target:
    return Target(f"≤ {bound:g}{unit}", lambda value: value <= bound)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ours` and `peer` are figures in `unit`; `judged` is what the target is for.

    `judged` are ratios where there is a peer, else figures of our own.
    """

    name: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float]
    judged: Sequence[float]
    target: Target | None = None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return f"{self.target.text}: {'met' if self.target.holds(median(self.judged)) else 'MISSED'}"


def compared(name: str, unit: str, pairs: Iterable[tuple[float, float]], target: Target | None = None) -> Row:
    """The row of pairs (ours, peer), judged by their ratios."""
    ours, peer = zip(*pairs, strict=True)
    return Row(name, unit, ours, peer, [a / b for a, b in zip(ours, peer, strict=True)], target)


def alone(name: str, unit: str, figures: Sequence[float], target: Target | None = None) -> Row:
    """The row of figures that stand by themselves."""
    return Row(name, unit, figures, (), figures, target)


def interleaved(ours: Measure, peer: Measure, n_pairs: int) -> list[tuple[float, float]]:
    """Runs ours, peer, ours, peer, … and returns the pairs."""
    return [(ours(), peer()) for _ in range(n_pairs)]


HEADINGS = ("name", "ours", "peer", "ratio (median, min–max)", "target")


def heading() -> str:
    """The table's first two lines, in Markdown."""
    return f"{_line(HEADINGS)}\n{_line('---' for _ in HEADINGS)}"


def markdown(row: Row) -> str:
    """A row as a line of the table, in Markdown."""
    ours, peer = (f"{_figure(median(side))} {row.unit}" if side else "–" for side in (row.ours, row.peer))
    low, high = min(row.judged), max(row.judged)
    ratio = f"{_figure(median(row.judged))} ({_figure(low)}–{_figure(high)})"
    return _line((row.name, ours, peer, ratio, row.verdict))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
