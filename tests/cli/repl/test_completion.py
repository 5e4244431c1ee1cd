"""What TAB offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from myllm.cli.repl.completion import Completions

OFFER = Completions(models=lambda: ["smollm2", "minilm"], sessions=lambda: ["trip", "trip two", "work"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for name in ("notes.txt", "my notes.txt", "notes/one.md", ".hidden"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("typed", "begun", "names"),
    [
        ("/s", "/s", ["/system", "/set", "/save", "/sessions"]),
        ("/fo", "/fo", ["/fork"]),
        ("/sessions tr", "tr", ["trip", "trip two"]),
        ("/model s", "s", ["smollm2"]),
        ("/model ", "", ["smollm2", "minilm"]),
        ("/model ./no", "./no", ["./notes.txt", "./notes/"]),
        ("/set top_", "top_", ["top_k", "top_p", "top_n_sigma"]),
        ("/help re", "re", ["retry"]),
        ("/file no", "no", ["notes.txt", "notes/"]),
        ("/file my n", "my n", ["my notes.txt"]),
        ("/file notes/", "notes/", ["notes/one.md"]),
        ("/file .h", ".h", [".hidden"]),
        ("/file nowhere/", "nowhere/", []),
        ("look at @no", "no", ["notes.txt", "notes/"]),
        ("@m", "m", []),  # what has a space in it cannot be mentioned
        ("ada@no", "", []),
        ("/undo n", "n", []),
        ("just words", "", []),
        ("/s\n/s", "", []),
    ],
)
def test_what_can_stand_there(typed: str, begun: str, names: list[str]) -> None:
    offered = OFFER.candidates(typed)
    assert (offered[0] if names else begun, sorted(offered[1])) == (begun, sorted(names))


def test_a_whole_folder_is_offered_without_what_is_hidden() -> None:
    assert OFFER.candidates("@")[1] == ["notes.txt", "notes/"]
