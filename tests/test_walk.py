"""CONTRIBUTING.md's walk of one request names the files that it really passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACER = Path(__file__).parent / "walk"
FILE = re.compile(r"`([a-z_]+(?:/[a-z_]+)*\.py)`")
MOST_FILES = {"gen": 40, "embed": 45}
NOT_IN_EMBED = {"cli/gen.py", "cli/one_answer.py", "cli/inputs.py", "cli/output.py"}


def told(part: str) -> set[str]:
    """The files that CONTRIBUTING.md names in a part of its walk."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"<!-- walk: {part} -->(.*?)<!-- end -->", text, re.DOTALL)
    assert found, part
    return set(FILE.findall(found[1]))


@pytest.fixture
def walk(tmp_path: Path, fake_model: Callable[..., Path]) -> Callable[..., dict[str, set[str]]]:
    """Runs a command on the fake engine: process → the files whose functions it called."""
    model = fake_model(tokens=["a", " b"])
    folder = tmp_path / "walk"
    folder.mkdir()

    def run(*words: str) -> dict[str, set[str]]:
        for file in folder.iterdir():
            file.unlink()
        environment = os.environ | {"MYLLM_WALK": str(folder), "PYTHONPATH": str(TRACER)}
        command = [sys.executable, "-m", "myllm", *words, str(model)]
        subprocess.run(command, input=b"hi", env=environment, check=True, capture_output=True, timeout=60)
        deadline = time.monotonic() + 20
        while "--no-daemon" in words and not list(folder.glob("worker.main.*")):  # it ends soon
            assert time.monotonic() < deadline, "the worker has not ended"
            time.sleep(0.02)
        processes: dict[str, set[str]] = {}
        for file in folder.glob("[!.]*"):
            processes.setdefault(file.name.rpartition(".")[0], set()).update(file.read_text().split())
        return processes

    return run


def without_engine(files: set[str]) -> set[str]:
    return {file for file in files if not file.startswith("engine/") or file == "engine/__init__.py"}


def test_a_cold_gen_passes_what_is_told(walk: Callable[..., dict[str, set[str]]]) -> None:
    passed = walk("gen", "--no-daemon", "-m")
    assert passed["command"] == told("gen command")
    assert len(passed["command"]) <= MOST_FILES["gen"]
    assert without_engine(passed["worker.main"]) == told("gen worker")


def test_a_cold_embed_passes_what_is_told(walk: Callable[..., dict[str, set[str]]]) -> None:
    passed = walk("embed", "--no-daemon", "-m")["command"]
    assert passed == (told("gen command") - NOT_IN_EMBED) | told("embed command")
    assert len(passed) <= MOST_FILES["embed"]


def test_a_warm_gen_passes_what_is_told(walk: Callable[..., dict[str, set[str]]]) -> None:
    walk("load")
    try:
        passed = walk("gen", "-m")["command"]
    finally:
        subprocess.run([sys.executable, "-m", "myllm", "load", "--stop"], check=True, capture_output=True)
    assert not any(file.startswith(("runtime/", "daemon/", "worker/", "engine/")) for file in passed)
    assert told("gen warm") <= passed
    assert passed - told("gen warm") <= told("gen command")


def test_every_path_that_is_told_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(FILE.findall(text))
    absent = {path for path in paths if not ((ROOT / path).exists() or (ROOT / "myllm" / path).exists())}
    assert absent == set()
