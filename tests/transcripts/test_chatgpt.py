"""ChatGPT's export: trees, tools, reasoning, and what is not text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from myllm.errors import BadDataError

Read = Callable[..., Any]


def node(id_: str, parent: str | None, role: str, content: Any, **more: Any) -> dict[str, Any]:
    author = {"role": role, "name": more.pop("name", None), "metadata": {}}
    message = {
        "id": id_,
        "author": author,
        "create_time": 1700000000.5,
        "content": content,
        "recipient": "all",
    }
    return {"id": id_, "parent": parent, "children": [], "message": {**message, "metadata": {}, **more}}


def text(*parts: Any, kind: str = "text") -> dict[str, Any]:
    return {"content_type": kind, "parts": list(parts)}


def conversation(*nodes: Any, current: str, **more: Any) -> dict[str, Any]:
    return {
        "title": "Files",
        "create_time": 1700000000.0,
        "update_time": 1700000009.0,
        "conversation_id": "c-1",
        "current_node": current,
        "mapping": {node["id"]: node for node in nodes},
        **more,
    }


HIDDEN = {"is_visually_hidden_from_conversation": True}
MODEL = {"model_slug": "gpt-5", "finish_details": {"type": "max_tokens"}}
IMAGE = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x", "width": 5}
PROFILE = {
    "content_type": "user_editable_context",
    "user_profile": "I am Ada.",
    "user_instructions": "Be brief.",
}
THOUGHTS = {"content_type": "thoughts", "thoughts": [{"summary": "Plan", "content": "Run it.", "chunks": []}]}
SAMPLE = conversation(
    {"id": "root", "message": None, "parent": None, "children": ["sys"]},
    node("sys", "root", "system", text(""), metadata=HIDDEN),
    node("me", "sys", "user", PROFILE, metadata=HIDDEN),
    node(
        "q",
        "me",
        "user",
        text(IMAGE, "What is this?", kind="multimodal_text"),
        metadata={"attachments": [{}]},
    ),
    node("old", "q", "assistant", text("No idea."), metadata=MODEL),
    node("think", "q", "assistant", THOUGHTS),
    node("recap", "think", "assistant", {"content_type": "reasoning_recap", "content": "Thought for 5s"}),
    node("call", "recap", "assistant", {"content_type": "code", "text": "run(1)"}, recipient="python"),
    node("out", "call", "tool", {"content_type": "execution_output", "text": "42"}, name="python"),
    node("a", "out", "assistant", text("It is 42."), metadata=MODEL),
    current="a",
)


def test_a_conversation_keeps_its_tree_tools_and_reasoning(read_lines: Read) -> None:
    (transcript,), notes = read_lines([SAMPLE])
    session = transcript.session
    assert (session.id, session.model, session.system) == ("c-1", "gpt-5", "I am Ada.\n\nBe brief.")
    assert session.extra == {"source": "chatgpt", "title": "Files"}
    path = list(transcript.path())
    assert [(message.role, message.content) for message in path] == [
        ("user", "[image]\n\nWhat is this?"),
        ("assistant", ""),
        ("tool", "42"),
        ("assistant", "It is 42."),
    ]
    assert path[1].reasoning == "Plan\nRun it."
    assert path[1].extra["tool_calls"] == [
        {
            "id": "call",
            "type": "function",
            "function": {"name": "python", "arguments": '{"input":"run(1)"}'},
        }
    ]
    assert path[2].extra == {"name": "python", "tool_call_id": "call"}
    assert path[3].answer == {"model": "gpt-5", "finish_reason": "length"}
    assert path[3].created == 1700000000.5
    assert [message.content for message in transcript.messages if message not in path] == ["No idea."]
    assert sorted(notes) == [
        "1 × attached file",
        "1 × part that is not text; [image] stands for it",
        "1 × summary of how long the model thought",
    ]


def test_one_conversation_alone_is_read_too(read_lines: Read) -> None:
    (transcript,), _ = read_lines(SAMPLE)
    assert transcript.session.id == "c-1"


def test_reasoning_that_two_answers_share_is_a_message_of_its_own(read_lines: Read) -> None:
    (transcript,), _ = read_lines(
        [
            conversation(
                node("q", None, "user", text("Hi")),
                node("think", "q", "assistant", THOUGHTS),
                node("a", "think", "assistant", text("A")),
                node("b", "think", "assistant", text("B")),
                current="b",
            )
        ]
    )
    assert [message.content for message in transcript.path()] == ["Hi", "", "B"]
    assert [message.content for message in transcript.messages] == ["Hi", "", "A", "B"]


def test_a_broken_conversation_is_left_out_and_noted_and_the_others_kept(read_lines: Read) -> None:
    circle = conversation(
        node("x", "y", "user", text("a")), node("y", "x", "user", text("b")), current="y", title="Ci\x1brcle"
    )
    empty = conversation({"id": "root", "message": None, "parent": None, "children": []}, current="root")
    (transcript,), notes = read_lines([circle, 5, empty, SAMPLE])
    assert transcript.session.id == "c-1"
    assert {
        "1 × conversation 'Ci rcle', left out: its messages follow one another in a circle",
        "1 × entry that is no conversation",
        "1 × conversation without messages",
    } <= set(notes)


@pytest.mark.parametrize("whole", [[], [1], ["a"], [{"title": "x"}]])
def test_a_list_of_other_things_is_refused(read_lines: Read, whole: Any) -> None:
    with pytest.raises(BadDataError, match="not a list of conversations"):
        read_lines(whole)
