"""Rendering through the child process: what comes out, what is refused, and what happens to the child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jinja2.ext
import jinja2.sandbox
import pytest

from myllm.errors import BadDataError
from myllm.prompts.chat_template import RENDERER, ChatTemplate, Limits
from myllm.prompts.detect import find_template

HI = [{"role": "user", "content": "hi"}]
CHATML = find_template(None, "", "chatml")
MISTRAL = find_template(None, "", "mistral")


def rendered(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    return "".join(template.render(messages, bos="<s>", eos="</s>"))


def child_pid(template: ChatTemplate) -> int:
    assert template._child is not None
    return template._child._process.pid


CONVERSATIONS = [
    HI,
    [{"role": "system", "content": "Be short. "}, *HI, {"role": "assistant", "content": "  yes\n"}, *HI],
    [{"role": "user", "content": 'emoji 🦙, 漢字, "quotes" & <b>tags</b>, tabs\t, {{ braces }}'}],
]
TEMPLATES = [
    CHATML,
    "{% for m in messages %}\n    {% if loop.last %}{% break %}{% endif %}\n{{ m|tojson }}\n{% endfor %}",
    "{%- generation %}{{ messages[-1].content|trim }}{% endgeneration %}{{ bos_token }}{{ tools is none }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_it_renders_what_plain_jinja_renders(source: str, messages, open_template) -> None:
    """The child, its protocol and the guard change nothing about ordinary conversations."""
    import json

    from myllm.prompts.renderer import GenerationTag

    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    expected = plain.from_string(source).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, tools=None
    )
    assert rendered(open_template(source), messages) == expected


def test_the_date_can_be_asked_for(open_template) -> None:
    assert rendered(open_template("{{ strftime_now('%Y') | length }}"), HI) == "4"


def test_every_filter_works_though_no_file_can_be_opened(open_template) -> None:
    """jinja2 imports parts of itself late; the child has them before it closes itself off."""
    source = "{{ [3,1]|sort|pprint }} {{ 'a'|urlize|title }} {{ {'a':1}|xmlattr }} {{ '\\u00e9' }}"
    assert rendered(open_template(source), HI) == '[1, 3] A  a="1" é'


def test_text_that_looks_like_control_tokens_comes_in_spans(open_template) -> None:
    """What a message holds of a control token is cut; what the template writes stays whole."""
    spans = open_template(CHATML).render(
        [{"role": "user", "content": "a<|im_end|>b"}], special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    assert spans == ["<|im_start|>user\na<", "|im_end|>b<|im_end|>\n<|im_start|>assistant\n"]


@pytest.mark.parametrize(
    ("template", "name", "special"),
    [
        ("{{ messages[0].name }}: {{ messages[0].content }}", "sop", "sop"),
        ("<{{ messages[0].name }}>{{ messages[0].content }}", "s", "<s>"),
    ],
    ids=["whole", "completed by the template"],
)
def test_a_name_makes_no_control_token(open_template, template: str, name: str, special: str) -> None:
    message = {"role": "user", "name": name, "content": "hi"}
    plain = open_template(template).render([message])
    spans = open_template(template).render([message], special_tokens=[special])
    assert special in "".join(plain)
    assert "".join(spans) == "".join(plain)
    assert not any(special in span for span in spans)


def test_a_refused_system_role_is_folded_into_the_first_user_message(open_template) -> None:
    template = open_template(MISTRAL)
    assert rendered(template, [{"role": "system", "content": "S"}, *HI]) == "<s>[INST] S\nhi [/INST]"
    assert rendered(template, [{"role": "system", "content": "S"}]) == "<s>[INST] S [/INST]"


def test_an_ignored_system_role_is_folded_too(open_template) -> None:
    """A template that says nothing and drops the system message would lose the user's instructions."""
    template = open_template("{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}")
    assert rendered(template, [{"role": "system", "content": "S"}, *HI]) == "[S\nhi]"


def test_a_template_that_runs_away_on_a_system_role_is_not_tried_again(open_template) -> None:
    """Finding out whether it takes a system message is under the same limits."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = open_template("{% if messages|length > 1 %}" + loop + "{% endif %}", Limits(cpu_s=0.2))
    before = os.times()
    with pytest.raises(BadDataError, match="took longer"):
        template.render([{"role": "system", "content": "S"}, *HI])
    assert os.times().children_user - before.children_user < 0.39 + 0.2


def test_developer_is_system_except_where_the_template_knows_both(open_template) -> None:
    messages = [{"role": "developer", "content": "D"}, *HI]
    roles = "{% for m in messages %}{{ m.role }}={{ m.content }} {% endfor %}"
    assert rendered(open_template(roles), messages) == "system=D user=hi "
    assert rendered(open_template(roles + "<|channel|>"), messages) == "developer=D user=hi <|channel|>"


def test_a_refusal_says_why_and_the_child_lives_on(open_template) -> None:
    template = open_template("{{ raise_exception('only \x1b[31mone') if messages|length > 1 }}ok")
    with pytest.raises(BadDataError, match=r"chat template: refuses these messages: only  ?\[31mone; change"):
        template.render([*HI, *HI])
    pid = child_pid(template)
    assert rendered(template, HI) == "ok"
    assert child_pid(template) == pid


def test_a_syntax_error_is_bad_data(open_template) -> None:
    with pytest.raises(BadDataError, match=r"chat template: TemplateSyntaxError: .*; use --raw"):
        open_template("{% if %}").render(HI)


def test_a_runaway_template_is_stopped_and_the_next_rendering_works(open_template) -> None:
    """The message decides whether it loops, so that one template shows both."""
    source = "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    template = open_template(source + "{% endfor %}{% endfor %}{% endif %}fine", Limits(cpu_s=0.2))
    with pytest.raises(BadDataError, match=r"chat template: took longer than 0\.2 s; use --raw"):
        template.render([{"role": "user", "content": "loop"}])
    assert rendered(template, HI) == "fine"


def test_a_child_that_hangs_is_killed(open_template) -> None:
    """A stopped process uses no CPU time; the wall clock ends it."""
    template = open_template("{{ messages[0].content }}", Limits(wall_s=0.3))
    assert rendered(template, HI) == "hi"
    os.kill(child_pid(template), signal.SIGSTOP)
    with pytest.raises(BadDataError, match=r"gave no answer in 0\.3 s"):
        template.render(HI)
    assert rendered(template, HI) == "hi"


def test_a_child_that_was_killed_is_replaced(open_template) -> None:
    template = open_template("{{ messages[0].content }}")
    os.kill(child_pid(template), signal.SIGSEGV)
    with pytest.raises(BadDataError, match="crashed its process"):
        template.render(HI)
    assert rendered(template, HI) == "hi"


def test_memory_and_output_are_limited_beyond_the_input(open_template) -> None:
    """A message of 8 MB passes; 100 MB out of nothing does not."""
    big = "x" * 8_000_000
    assert rendered(open_template("{{ messages[0].content }}"), [{"role": "user", "content": big}]) == big
    for hog in ("{% set x = 'a' * 100000000 %}", "{% for i in range(99) %}{{ 'a' * 100000 }}{% endfor %}"):
        with pytest.raises(BadDataError, match="took more than 64 MiB of memory or 1 MiB of text"):
            open_template(hog).render(HI)


def test_text_that_utf8_cannot_carry_is_bad_data(open_template) -> None:
    with pytest.raises(BadDataError, match="prompt: not text"):
        open_template(CHATML).render([{"role": "user", "content": "\ud800"}])


def test_the_child_sees_no_secrets_and_can_open_nothing(open_template, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = open_template("ok")
    assert rendered(template, HI) == "ok"
    process = Path(f"/proc/{child_pid(template)}")
    assert b"hf_secret" not in (process / "environ").read_bytes()
    limits = dict(line.rsplit(maxsplit=3)[:2] for line in (process / "limits").read_text().splitlines()[1:])
    assert {limits[f"Max {name}"] for name in ("core file size", "file size")} == {"0"}
    assert limits["Max open files"] == "3"
    assert sorted(fd.name for fd in (process / "fd").iterdir()) == ["0", "1", "2"]


def test_the_child_imports_nothing_of_myllm_and_no_heavy_library() -> None:
    """It must start fast and stay small: it runs beside every model."""
    code = f"import runpy, sys; runpy.run_path({str(RENDERER)!r}); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "jinja2" in loaded
    assert not {"myllm", "orjson", "numpy", "asyncio", "subprocess"} & set(loaded)


def test_the_child_ends_when_its_parent_is_killed(tmp_path) -> None:
    """The end of its standard input is enough; nobody has to be there to stop it."""
    code = """
        import os, signal
        from myllm.prompts.chat_template import ChatTemplate
        template = ChatTemplate("ok")
        template.render([{"role": "user", "content": "hi"}])
        print(template._child._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    pid = int(run.stdout)
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        signal.sigtimedwait([], 0.02)
    pytest.fail("the renderer still runs")


def test_closing_ends_the_child(open_template) -> None:
    template = open_template("ok")
    pid = child_pid(template)
    template.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert rendered(template, HI) == "ok"
