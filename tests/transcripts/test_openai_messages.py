"""OpenAI's messages: lines for fine-tuning, and plain lines of role and content."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from myllm.conversation import Message, Session, State
from myllm.errors import BadDataError
from myllm.transcripts import openai
from myllm.transcripts.transcript import Transcript

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
WIRE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is Rome?", "name": "ada"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Sunny."},
]


def message(id_: str, parent: str | None, role: str = "user", **values: Any) -> Message:
    return Message(id=id_, parent=parent, role=role, content=id_, created=1.0, **values)


def test_messages_come_back_as_they_were(read_lines: Callable[..., Any]) -> None:
    transcripts, notes = read_lines({"messages": WIRE}, {"messages": WIRE[1:]})
    assert [json.loads(b"".join(openai.export(transcript)))["messages"] for transcript in transcripts] == [
        WIRE,
        WIRE[1:],
    ]
    assert transcripts[0].session.system == "Be brief."
    assert notes == []


def test_only_the_path_to_the_head_is_exported_without_turns_that_got_no_answer() -> None:
    tree = [
        message("a", None),
        message("b", "a", "assistant"),
        message("other", "a", "assistant"),
        message("lost", "b", state=State.FAILED),
        message("c", "lost"),
    ]
    session = Session(id="s", name=None, created=1.0, updated=1.0, head="c", system="Be brief.")
    sent = json.loads(b"".join(openai.export(Transcript(session, tree))))["messages"]
    assert [item["content"] for item in sent] == ["Be brief.", "a", "b", "c"]


def test_plain_lines_are_one_conversation(read_lines: Callable[..., Any]) -> None:
    (transcript,), _ = read_lines(*WIRE)
    assert json.loads(b"".join(openai.export(transcript)))["messages"] == WIRE


def test_text_parts_are_joined_and_other_parts_marked_and_counted(read_lines: Callable[..., Any]) -> None:
    parts = [
        {"type": "text", "text": "What is "},
        {"type": "text", "text": "this? "},
        {"type": "image_url", "image_url": {"url": "data:…"}},
    ]
    (transcript,), notes = read_lines({"messages": [{"role": "user", "content": parts}]})
    assert transcript.messages[0].content == "What is this? [image]"
    assert notes == ["1 × part that is not text; [image] stands for it"]


def test_what_has_no_place_is_counted(read_lines: Callable[..., Any]) -> None:
    later = [{"role": "user", "content": "Hi", "weight": 0}, {"role": "developer", "content": "Now rhyme."}]
    (transcript,), notes = read_lines({"messages": later, "tools": []})
    assert transcript.session.system == "Now rhyme."
    assert sorted(notes) == [
        "1 × 'tools' beside messages",
        "1 × 'weight' of a message",
        "1 × system message inside a conversation, now part of the system prompt",
    ]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"role": "wizard", "content": "x"}, "expected a message with a role"),
        ({"role": "user", "content": 5}, "content: expected a text or parts"),
        ({"role": "user", "content": ["x"]}, "content: expected a part"),
        ({"role": "user", "content": "x", "name": "a\x1bb"}, "name: expected printable"),
        ({"role": "assistant", "content": None, "tool_calls": "x"}, "tool_calls: expected a list"),
        ("hello", "expected a message with a role"),
    ],
)
def test_a_bad_message_is_refused_by_its_line(read_lines: Callable[..., Any], bad: Any, said: str) -> None:
    with pytest.raises(BadDataError, match=f"line 2: .*{said}|line 2: {said}"):
        read_lines({"messages": WIRE}, {"messages": [bad]})
