"""What a typed line is: a message or a command."""

from __future__ import annotations

import pytest

from myllm.cli.repl.actions import ACTIONS
from myllm.cli.repl.commands import COMMANDS, Invoked, Said, help_text, in_block, parse
from myllm.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hello\n", Said("hello")),
        ("  ", Said("")),
        ("/help", Invoked("help", "")),
        ("/SET top_k  5 ", Invoked("set", "top_k  5")),
        ("/system two\nlines", Invoked("system", "two\nlines")),
        (" /help", Said("/help")),
        ("/usr/bin/env is missing", Said("/usr/bin/env is missing")),
        ("/* C */", Said("/* C */")),
        ("/no such command\nbut a text of two lines", Said("/no such command\nbut a text of two lines")),
        ('"""\na\n\nb\n"""', Said("a\n\nb")),
        ('"""/help"""', Said("/help")),
        ('"""Doc."""\n"""another"""', Said('"""Doc."""\n"""another"""')),
    ],
)
def test_a_line_is_a_message_or_a_command(typed: str, meant: Said | Invoked) -> None:
    assert parse(typed) == meant


@pytest.mark.parametrize(("typed", "said"), [("/retyr", "did you mean /retry?"), ("/xyzzy 1", "/help shows")])
def test_an_unknown_command_is_named_with_the_nearest(typed: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(typed)


@pytest.mark.parametrize(
    ("typed", "is_open"), [('"""a', True), ('"""a\nb"""', False), ("a", False), ('a """', False)]
)
def test_a_block_is_open_until_its_second_quotes(typed: str, is_open: bool) -> None:
    assert in_block(typed) is is_open


def test_every_command_does_something_and_has_help() -> None:
    assert {*ACTIONS, "edit"} == set(COMMANDS)
    for name, command in COMMANDS.items():
        assert f"/{name}" in help_text("", 80)
        assert command.summary in help_text(name, 200)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_forty_columns(name: str) -> None:
    assert max(map(len, help_text(name, 40).split("\n"))) <= 40


def test_help_about_no_command_says_so() -> None:
    with pytest.raises(UsageError, match="no command"):
        help_text("two words", 80)
