"""The fixture by which a test must leave no process and no open descriptor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPEN = Path("/proc/self/fd")


def _sessions() -> dict[int, set[int]]:
    """Session id → the processes in it; zombies only where it is on us, and not on init, to reap them."""
    sessions: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended just now
                continue
            state, parent, session = fields[0], int(fields[1]), int(fields[3])
            if state != "Z" or parent == os.getpid():
                sessions.setdefault(session, set()).add(int(entry.name))
    return sessions


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The pids of workers started here; after the test, they and theirs are gone and all is closed."""
    workers: list[int] = []
    real = os.posix_spawn

    def recording(*arguments: Any, **options: Any) -> int:
        pid = real(*arguments, **options)
        workers.append(pid)
        return pid

    monkeypatch.setattr(os, "posix_spawn", recording)
    before = {fd.name for fd in OPEN.iterdir()}
    yield workers
    left: object = None
    for _ in range(100):
        sessions = _sessions()
        left = {pid: sessions[pid] for pid in workers if pid in sessions}
        left = left or [fd for fd in OPEN.iterdir() if fd.name not in before and fd.is_symlink()]
        if not left:
            return
        time.sleep(0.02)
    pytest.fail(f"left behind: {left}")
