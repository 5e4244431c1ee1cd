"""The line below the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from myllm.cli.attachments import Attachment
from myllm.cli.repl.bottom_line import bottom_line
from myllm.cli.repl.chat import Chat
from tests.cli.repl.test_chat import SESSION

LAST = {
    "model": "smollm2",
    "usage": {"prompt_tokens": 1200, "completion_tokens": 34, "window": 8192, "dropped_messages": 2},
    "timings": {"tokens_per_second": 43.21},
}


def chat() -> Chat:
    return Chat("/", session=SESSION, last=LAST, files=[Attachment("a", "")])


def test_it_shows_all_there_is_to_know() -> None:
    assert bottom_line(chat(), 200) == (
        "1,234/8,192 tokens · smollm2 · trip · 1 file waiting · 2 messages dropped · 43.2 tokens/s"
    )


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (72, "1,234/8,192 · smollm2 · trip · 1 file waiting · 2 messages dropped"),
        (40, "1,234/8,192 · smollm2 · trip"),
        (8, "1,234/8,"),
    ],
)
def test_what_matters_least_makes_room(columns: int, shown: str) -> None:
    assert bottom_line(chat(), columns) == shown


def test_before_the_first_answer_there_is_no_window() -> None:
    assert bottom_line(Chat("/", model="/models/a.gguf"), 80) == "a.gguf · new session"


def test_a_name_cannot_draw_on_the_terminal() -> None:
    evil = replace(chat(), session=replace(SESSION, name="a\x1b[31m"), model="b\x07\n")
    assert "b\\x07\\n · a\\x1b[31m" in bottom_line(evil, 200)
