"""Code blocks, and the clipboard."""

from __future__ import annotations

import base64

import pytest

from myllm.cli.repl.code_blocks import LONGEST, clipboard_sequence, code_blocks
from myllm.errors import BadDataError


@pytest.mark.parametrize(
    ("answer", "blocks"),
    [
        ("no code, `just` words", []),
        ("a\n```python\nx = 1\n\ny\n```\nb\n~~~\nz\n~~~", ["x = 1\n\ny\n", "z\n"]),
        ("````\n```\ninner\n```\n````", ["```\ninner\n```\n"]),
        ("```\ncut", ["cut\n"]),
        ("```not a fence```", []),
        ("  ```\n  x\n  ```", ["  x\n"]),
        ("```\n~~~\n```", ["~~~\n"]),
    ],
)
def test_the_fenced_blocks_of_an_answer(answer: str, blocks: list[str]) -> None:
    assert code_blocks(answer) == blocks


def copied(sequence: str) -> str:
    assert sequence.startswith("\x1b]52;c;")
    assert sequence.endswith("\x07")
    return base64.b64decode(sequence[7:-1]).decode()


def test_the_clipboard_gets_the_text() -> None:
    assert copied(clipboard_sequence("x = 'é'\n\tend\n")) == "x = 'é'\n\tend\n"


def test_control_characters_reach_no_clipboard() -> None:
    assert copied(clipboard_sequence("ls\x1b[201~rm\r")) == "ls\\x1b[201~rm\\x0d"


def test_what_terminals_would_cut_is_refused() -> None:
    clipboard_sequence("x" * LONGEST)
    with pytest.raises(BadDataError, match="copy a code block"):
        clipboard_sequence("x" * (LONGEST + 1))
