"""Fixtures for the faults: daemons in a home of their own; each test must leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from myllm import spawning
from myllm.client import start

from .rig import Daemon, command_with, descriptors, end_all, processes, until

Launch = Callable[..., Daemon]


@pytest.fixture(autouse=True)
def nothing_left(home: Path) -> Iterator[None]:
    """After each test no process of its home lives, and this process has closed what it opened."""
    before = len(descriptors(os.getpid()))

    def nothing_lives() -> bool:
        """no process is left"""
        return not processes()

    def all_is_closed() -> bool:
        """the test has closed what it opened"""
        return len(descriptors(os.getpid())) <= before

    try:
        yield
        until(nothing_lives, 2)
        until(all_is_closed, 2)
    finally:
        end_all(processes())


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> Iterator[Launch]:
    """Starts a daemon: `launch(MYLLM_QUEUE="16")` with variables, `launch("code")` with code that runs in
    its process after `import myllm`. Each is checked and ended after the test.
    """
    daemons: list[Daemon] = []

    def begin(prelude: str = "", **environ: str) -> Daemon:
        with monkeypatch.context() as changed:
            for name, value in environ.items():
                changed.setenv(name, value)
            changed.setattr(start, "python", lambda module: command_with(prelude, module))
            daemons.append(Daemon())
        return daemons[-1]

    assert start.python is spawning.python
    yield begin
    for daemon in daemons:
        daemon.bury()


@pytest.fixture
def daemon(launch: Launch) -> Daemon:
    return launch()
