"""Which templates a worker keeps, each with a process of its own, and where it finds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from myllm.errors import BadDataError, MyllmError, NotFoundError, UsageError
from myllm.prompts.detect import find_template
from myllm.requests import GenRequest
from myllm.worker import templates
from myllm.worker.templates import MAX_SOURCE, MAX_TEMPLATES, ModelFile, Preparer


class Template:
    """Stands for a renderer's process."""

    living: list[str]

    def __init__(self, source: str) -> None:
        self.source = source
        self.living.append(source)

    def close(self) -> None:
        self.living.remove(self.source)


class Vocabulary:
    """All that is asked of a tokenizer here."""

    def __init__(self, *special_tokens: str) -> None:
        self.special_tokens: Sequence[str] = special_tokens


FILE = ModelFile(template="own", templates={name: f"source of {name}" for name in "abcde"})


@pytest.fixture(autouse=True)
def fake_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    Template.living = []
    monkeypatch.setattr(templates, "ChatTemplate", Template)
    monkeypatch.setattr(templates, "prepare", lambda request, tokenizer, template, window: template)


def used(preparer: Preparer, wanted: str | None = None, *special_tokens: str) -> str:
    """The source of the template that a request is prepared with."""
    template: Any = preparer.prepare(
        GenRequest(prompt="x", template=wanted),
        Vocabulary(*special_tokens),  # type: ignore[arg-type]
        1,
    )
    return str(template.source)


def test_the_template_unused_for_longest_goes_and_the_models_own_stays() -> None:
    preparer = Preparer(FILE, "model")
    for name in "abcad":
        assert used(preparer, name) == f"source of {name}"
    assert sorted(Template.living) == ["own", "source of a", "source of c", "source of d"]
    used(preparer, "e")
    assert sorted(Template.living) == ["own", "source of a", "source of d", "source of e"]
    assert len(Template.living) == MAX_TEMPLATES


def test_a_template_in_use_is_made_once() -> None:
    preparer = Preparer(FILE, "model")
    assert [used(preparer, name) for name in ("a", "a", None)] == ["source of a", "source of a", "own"]
    assert Template.living == ["own", "source of a"]


def test_a_model_is_loaded_with_a_template_for_all_that_name_none() -> None:
    preparer = Preparer(FILE, "model", "chatml")
    assert Template.living == [find_template(None, "", "chatml")]
    assert used(preparer) == find_template(None, "", "chatml")
    assert used(preparer, "b") == "source of b"


def test_a_file_without_a_template_waits_for_its_vocabulary() -> None:
    preparer = Preparer(ModelFile(), "mistral")
    assert Template.living == []
    assert used(preparer, None, "<start_of_turn>") == find_template(None, "", "gemma")
    assert used(Preparer(ModelFile(), "mistral")) == find_template(None, "", "mistral")


def test_an_unknown_template_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(UsageError, match="no template 'nope'"):
        Preparer(FILE, "model", "nope")


def test_a_file_is_read_anew_for_each_request_and_its_process_is_kept_while_it_is_the_same(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.jinja"
    preparer = Preparer(FILE, "model")
    file.write_text("one")
    assert [used(preparer, str(file)), used(preparer, str(file))] == ["one", "one"]
    file.write_text("two é")
    assert used(preparer, str(file)) == "two é"
    assert Template.living == ["own", "one", "two é"]


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda path: None, NotFoundError, "no such file"),
        (Path.mkdir, BadDataError, "not a file"),
        (os.mkfifo, BadDataError, "not a file"),
        (lambda path: path.write_bytes(b"\xff"), BadDataError, "not a text in UTF-8"),
        (lambda path: path.write_bytes(b"x" * (MAX_SOURCE + 1)), BadDataError, "more than 1,048,576 bytes"),
        (lambda path: path.symlink_to(path), BadDataError, "symbolic links"),
    ],
    ids=["none", "folder", "pipe", "not UTF-8", "too large", "loop"],
)
def test_a_file_that_is_no_template_is_refused(
    make: Callable[[Path], object], error: type[MyllmError], why: str, tmp_path: Path
) -> None:
    make(tmp_path / "x.jinja")
    with pytest.raises(error, match=f"template: .*x.jinja: .*{why}"):
        used(Preparer(FILE, "model"), str(tmp_path / "x.jinja"))


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(BadDataError, match="not a text"):
        used(Preparer(FILE, "model"), "/a\0b")
