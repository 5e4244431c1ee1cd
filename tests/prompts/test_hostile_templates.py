"""Templates that attack: each ends in a clear error or harmless text, within limits and without a trace."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from myllm.errors import BadDataError
from myllm.prompts.chat_template import Limits

MESSAGES = [{"role": "user", "content": "hi {0.__class__}"}]
LIMITS = Limits(cpu_s=0.5)

# CANARY is replaced by a path that must not come into being, SECRET by one that must not be read.
ESCAPES = [
    "{{ lipsum.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ lipsum|attr('__globals__') }}",
    "{{ lipsum|attr('__glo' ~ 'bals__')|attr('os') }}",
    "{{ (lipsum|attr('__globals__'))['os'].popen('touch CANARY').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ namespace.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ()|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{{ [''.__class__]|map(attribute='__mro__')|list }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ ['']|map(attribute='__class__.__mro__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|selectattr('__class__.__base__', 'defined')|list }}",
    "{{ messages|sort(attribute='__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}'|safe).format('') }}",
    "{{ ''|attr('format')|attr('__self__') }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ messages[0].content.format('') }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__dict__ }}{{ loop }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}{{ strftime_now.__builtins__ }}",
    "{% include 'SECRET' %}",
    "{% import 'SECRET' as s %}{{ s }}",
    "{% extends 'SECRET' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% set _ = namespace.__class__.__setattr__(namespace, 'x', 1) %}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ open('SECRET').read() }}{{ __import__('os') }}{{ exec('1') }}",
    "{{ (messages|map('length')|first).__class__ }}{{ range.__self__ }}",
    "{{ dict.mro() }}{{ dict|attr('fromkeys')|attr('__self__') }}",
    "{{ [].__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    # These fail at first, and are rendered as llama.cpp would.
    "{{ nothing.at.all }}{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ nothing.at.all.__init__.__globals__ }}{{ nothing.at.__class__.__mro__ }}",
    "{{ nothing.at.all|attr('__class__')|attr('__base__') }}{{ (nothing.at + lipsum).__globals__ }}",
    "{% generation %}{{ nothing.at.all }}{{ caller.__globals__ }}{% endgeneration %}",
]
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(10**12)|list }}",
    "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 10**30 }}",
    "{{ [0] * 10**9 }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set x = 'a' * 999 %}{% for i in range(99) %}{% set x = x ~ x %}{{ x }}{% endfor %}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set x = 'a' * 99999 %}{% set x = x.replace('a', x) %}{% set x = x.replace('a', x) %}{{ x }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.ljust(10**10) }}{{ 'a'.zfill(10**10) }}",
    "{{ 'a\\nb'|indent(10**9) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '%*d'|format(999999999, 1) }}",
    "{{ 'ab'.expandtabs(10**9) }}{{ 'a\\tb'.expandtabs(10**9) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ (9 ** 99999 * 9 ** 99999)|string }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% for i in range(n) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(99) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for x in [[[]]] recursive %}{{ loop([[[]]]) }}{% endfor %}",
    "{{ lipsum(n=10000, min=1000, max=2000) }}",
    "{{ 'a'|wordwrap(0) }}{{ ('a' * 999999)|wordwrap(1)|length }}",
    "{{ ('www.' ~ 'a.' * 40000)|urlize }}",
    "{{ ('<' * 400000)|striptags }}",
    "{{ range(99999)|map('string')|join(',' * 9999) }}",
    "{{ range(99999)|batch(1)|map('tojson', indent=9999)|join }}",
    "{{ {'a': range(99999)|list}|tojson(indent=99999) }}",
    "{{ strftime_now('%999999999d') }}",
    "{{ raise_exception('a' * 30000000) }}",
    "{{ undefined_thing['a' * 30000000].x }}",
    "(" * 3 + "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "-" * 30000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "{% set x = cycler(*range(99999)) %}{% for i in range(99999) %}{{ x.next() }}{{ x.items }}{% endfor %}",
    "{{ '\\ud800' }}",
    "{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{{ nothing.at.all }}",
    "{{ nothing.at.all }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% if 1 %}" * 900 + "{{ nothing.at.all }}{{ 'a' * 10**9 }}" + "{% endif %}" * 900,
    "\ufdd0" * 1000,
]


@pytest.fixture
def trap(tmp_path: Path) -> tuple[Path, Path]:
    """A canary that must not appear, and a secret that must not be read."""
    secret = tmp_path / "secret"
    secret.write_text("the-secret")
    return tmp_path / "canary", secret


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source: str, trap: tuple[Path, Path], open_template) -> None:
    """It is refused, or gets nothing that belongs to Python; no file is made, changed or read."""
    canary, secret = trap
    template = open_template(source.replace("CANARY", str(canary)).replace("SECRET", str(secret)), LIMITS)
    try:
        text = "".join(template.render(MESSAGES))
    except BadDataError as error:
        text = str(error)
    assert not canary.exists()
    assert not any(leak in text for leak in ("the-secret", "<class", "<module", "uid=", "<code"))
    assert "\n" not in text or len(text) < 1000


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_template_cannot_take_more_than_its_limits(source: str, open_template) -> None:
    """It ends in BadDataError of one line or in a text of at most the output limit, within the CPU limit."""
    template = open_template(source, LIMITS)
    before, started = os.times(), time.monotonic()
    try:
        text = "".join(template.render(MESSAGES))
    except BadDataError as error:
        text = str(error)
    assert text.startswith("chat template: ") or len(text) <= 2 * LIMITS.output_bytes
    assert not text.startswith("chat template: ") or len(text) < 600
    child = Path(f"/proc/{template._child._process.pid}/status") if template._child else None
    peak_kib = int(child.read_text().split("VmHWM:")[1].split()[0]) if child else 0
    template.close()
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_s < LIMITS.cpu_s + 1.0, "a start of the child and one limit for compiling, one for rendering"
    assert time.monotonic() - started < LIMITS.wall_s
    assert peak_kib < 64 * 1024 + 40_000, "the child itself takes about 22 MiB"
