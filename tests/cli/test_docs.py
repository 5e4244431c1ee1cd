"""Man pages and completions are what the click definitions say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from myllm.cli import COMMANDS
from myllm.cli.docs import EXIT_STATUS, documents
from myllm.errors import BY_CODE

from .conftest import MYLLM

ROOT = Path(__file__).parents[2]
DOCUMENTS = dict(documents())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_committed_is_what_is_generated(name: str) -> None:
    """Made by `python -m myllm.cli.docs`."""
    assert (ROOT / name).read_text() == DOCUMENTS[name]


def test_nothing_else_is_committed_there() -> None:
    folders = [ROOT / "man", ROOT / "completions"]
    files = {f"{folder.name}/{file.name}" for folder in folders for file in folder.iterdir()}
    assert files == set(DOCUMENTS)


def test_every_option_and_exit_status_is_in_the_page_of_gen() -> None:
    page = DOCUMENTS["man/myllm-gen.1"].replace("\\-", "-")
    ended = subprocess.run([*MYLLM, "gen", "--help"], capture_output=True, text=True, check=True)
    options = {word.strip(",") for word in ended.stdout.split() if word.startswith("--") and word != "--"}
    assert {option for option in options if option.rstrip(".,;:)") not in page} == set()
    assert {str(cls.exit_status) for cls in BY_CODE.values()} <= {status for status, _ in EXIT_STATUS}


def test_pages_are_plain_roff() -> None:
    for name, text in DOCUMENTS.items():
        if name.startswith("man/"):
            assert text.isascii()
            assert "\n\n" not in text


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    environment = {
        **os.environ,
        "_MYLLM_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    ended = subprocess.run(MYLLM, env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in ended.stdout.splitlines()]


def test_commands_options_and_models_complete() -> None:
    assert completed("myllm", "g") == ["gen"]
    assert set(COMMANDS) <= set(completed("myllm", ""))
    assert completed("myllm", "gen", "--tempe") == ["--temperature"]
    assert completed("myllm", "gen", "-m", "smol") == ["smollm2"]
    assert completed("myllm", "load", "--template", "ll") == ["llama3"]
