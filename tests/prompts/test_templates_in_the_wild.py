"""llama.cpp's own template files, rendered as others do: see `tests/data/make_rendered_templates.py`."""

from __future__ import annotations

import hashlib
import json
import tarfile
from datetime import datetime
from pathlib import Path

import pytest

from myllm.errors import BadDataError
from myllm.prompts import renderer
from myllm.prompts.renderer import RefusedError, Sandbox

DATA = Path(__file__).parent.parent / "data"
MADE = json.loads((DATA / "rendered_templates.json").read_text())
CONVERSATIONS = MADE["conversations"]
TEXTS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    with tarfile.open(DATA / "llama_cpp_templates.tar.xz") as archive:
        files = [(file.name, archive.extractfile(file)) for file in archive.getmembers()]
        return {name.removesuffix(".jinja"): file.read().decode() for name, file in files if file}


class Clock(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime.fromisoformat(MADE["now"])


@pytest.mark.parametrize("name", MADE["rendered"])
def test_a_template_renders_as_in_transformers_or_else_as_in_llama_cpp(
    name: str, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight conversations: the same text, or refused by the template itself."""
    monkeypatch.setattr(renderer, "datetime", Clock)
    sandbox = Sandbox(1.0, 2**26, 2**20)
    sandbox.compile({"template": sources[name]}, 0)
    rendered = []
    for messages, expected in zip(CONVERSATIONS, MADE["rendered"][name], strict=True):
        try:
            text = sandbox.render({"messages": messages, "add_generation_prompt": True, **TEXTS}, 0)
        except RefusedError:
            rendered.append("refused")
        else:
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            rendered.append(f"{expected.split()[0]} {len(text)} {digest}")
    assert rendered == MADE["rendered"][name]


@pytest.mark.parametrize("name", MADE["rendered"])
def test_a_template_works_within_the_limits_and_says_the_system_prompt(
    name: str, sources: dict[str, str], open_template
) -> None:
    """In the child, where roles are as it can take them."""
    template = open_template(sources[name])
    for messages in CONVERSATIONS[:4]:
        text = "".join(template.render(messages, bos="<s>", eos="</s>"))
        for message in (messages[0], messages[-1]):
            assert message["content"].strip() in text


LEFT_TO_LLAMA_CPP = [
    ("{{ messages[5].content }}.", "."),
    ("{{ messages[0].tool_calls[0].function.name }}.", "."),
    ("{{ 'a' + nothing + 'b' }}{{ nothing.at.all + 'c' }}", "abc"),
    ("{% for tool in tools %}{{ tool }}{% endfor %}.", "."),
    ("{% if messages[9].role == 'user' %}x{% endif %}.", "."),
]


@pytest.mark.parametrize(("source", "text"), LEFT_TO_LLAMA_CPP)
def test_what_is_not_there_is_empty_where_a_template_would_fail_on_it(source, text, open_template) -> None:
    assert open_template(source).render(CONVERSATIONS[0]) == [text]


HUGGING_FACE = [
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é<"}'),
    ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
    ("{{ [1, {'b': 2, 'a': 3}] | tojson(separators=(',', ':'), sort_keys=true) }}", '[1,{"a":3,"b":2}]'),
    ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    ("a\n    {% if true %}\nb\n    {% endif %}\nc\n", "a\nb\nc"),
    ("{% for i in 'abc' %}{% if i == 'a' %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "b"),
    ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    ("{{ tools is none and documents is none }}", "True"),
    ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
]


@pytest.mark.parametrize(("source", "text"), HUGGING_FACE)
def test_hugging_faces_dialect_works(source: str, text: str, open_template) -> None:
    """What each gives in transformers 5.24."""
    assert open_template(source).render([{"role": "user", "content": "é<"}]) == [text]


def test_a_templates_own_refusal_is_final(open_template) -> None:
    """It is not asked again in another way."""
    template = open_template("{% if tools is none %}{{ raise_exception('no tools') }}{% endif %}x")
    with pytest.raises(BadDataError, match="refuses these messages: no tools"):
        template.render(CONVERSATIONS[0])
