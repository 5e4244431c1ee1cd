"""Fixtures for the client's tests; each test must leave no process and no open descriptor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from left_behind import nothing_left

from myllm.client import connect
from myllm.client.client import Client
from myllm.settings import load

__all__ = ["client", "generate", "nothing_left"]

Event = dict[str, Any]


@pytest.fixture
def client() -> Iterator[Client]:
    with connect(load()) as client:
        yield client


@pytest.fixture
def generate(client: Client) -> Callable[..., list[Event]]:
    """Runs one request to its end: `generate(path, "prompt", max_tokens=3)` → its events."""

    def run(model: Path | str, prompt: str = "a b c", **parameters: Any) -> list[Event]:
        request = {"op": "gen", "model": str(model), "prompt": prompt, **parameters}
        return [orjson.loads(line) for line in client.stream(request)]

    return run
