"""Which templates a worker keeps, each with a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from myllm.requests import GenRequest
from myllm.worker import templates
from myllm.worker.templates import MAX_TEMPLATES, Preparer


class Template:
    """Stands for a renderer's process."""

    living: list[str]

    def __init__(self, source: str) -> None:
        self.source = source
        self.living.append(source)

    def close(self) -> None:
        self.living.remove(self.source)


@pytest.fixture
def preparer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Preparer]:
    Template.living = []
    monkeypatch.setattr(templates, "ChatTemplate", Template)
    monkeypatch.setattr(templates, "find_template", lambda own, model, wanted: wanted or own)
    monkeypatch.setattr(templates, "prepare", lambda request, tokenizer, template, window: template)
    return Preparer("own", "model")


def use(preparer: Preparer, name: str | None) -> None:
    used: Any = preparer.prepare(GenRequest(prompt="x", template=name), None, 1)  # type: ignore[arg-type]
    assert used.source == (name or "own")


def test_the_template_unused_for_longest_goes_and_the_models_own_stays(preparer: Preparer) -> None:
    for name in "abc":
        use(preparer, name)
    use(preparer, "a")
    use(preparer, "d")
    assert sorted(Template.living) == ["a", "c", "d", "own"]
    use(preparer, "e")
    assert sorted(Template.living) == ["a", "d", "e", "own"]
    assert len(Template.living) == MAX_TEMPLATES


def test_a_template_in_use_is_made_once(preparer: Preparer) -> None:
    for name in ("a", "a", None):
        use(preparer, name)
    assert Template.living == ["own", "a"]
