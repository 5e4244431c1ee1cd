"""A command as its user sees it: how long it takes, and what its processes take together at their peak.

Memory is PSS: pages that several processes share count once. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SAMPLING = 0.01
"""Seconds between two looks at a process's memory."""


class Watched(NamedTuple):
    """A command that has ended well."""

    seconds: float
    peak_pss: int
    """Bytes of all its processes at once, at the worst moment seen."""


def wall_seconds(
    command: Sequence[str], environment: Mapping[str, str] | None = None, stdin: Path = Path(os.devnull)
) -> float:
    """From start to end, the output thrown away. Raises CalledProcessError."""
    with stdin.open("rb") as source:
        started = time.monotonic()
        subprocess.run(
            command,
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            check=True,
        )
        return time.monotonic() - started


def watched(command: Sequence[str], stdin: Path, stdout: Path) -> Watched:
    """Runs the command from file to file and looks at its memory all the while, which slows it a little."""
    peak = 0
    with stdin.open("rb") as source, stdout.open("wb") as sink:
        started = time.monotonic()
        process = subprocess.Popen(command, stdin=source, stdout=sink, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, tree_pss(process.pid))
            time.sleep(SAMPLING)
        seconds = time.monotonic() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Watched(seconds, peak)


def tree_pss(root: int) -> int:
    """Bytes that a process and all below it take, at this moment."""
    parents = _parents()
    members = {root}
    while newcomers := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= newcomers
    return sum(map(_pss, members))


def _parents() -> dict[int, int]:
    """Process ids and those of their parents."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(after_name[1])
    return parents


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
