"""Claude Code's files: one conversation, its tree, its tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Read = Callable[..., Any]

BASE = {
    "sessionId": "5e55",
    "cwd": "/home/ada/project",
    "version": "2.1.12",
    "gitBranch": "main",
    "userType": "external",
    "isSidechain": False,
}


def user(uuid: str, parent: str | None, content: Any, second: int = 0, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": content}
    return line("user", uuid, parent, second, message=message, **more)


def answer(uuid: str, parent: str, id_: str, *blocks: Any, second: int = 0, **about: Any) -> dict[str, Any]:
    message = {"id": id_, "type": "message", "role": "assistant", "model": "claude-x", "content": [*blocks]}
    return line("assistant", uuid, parent, second, requestId="req_1", message={**message, **about})


def line(kind: str, uuid: str, parent: str | None, second: int = 0, **more: Any) -> dict[str, Any]:
    at = f"2026-01-01T00:00:{second:02}.000Z"
    return {**BASE, "type": kind, "uuid": uuid, "parentUuid": parent, "timestamp": at, **more}


def text(given: str) -> dict[str, str]:
    return {"type": "text", "text": given}


def use(id_: str, path: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id_, "name": "Read", "input": {"file_path": path}}


def result(id_: str, content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "tool_result", "tool_use_id": id_, "content": content, **more}]


USAGE = {
    "input_tokens": 3,
    "cache_creation_input_tokens": 10,
    "cache_read_input_tokens": 100,
    "output_tokens": 7,
}
SAMPLE = [
    {"type": "file-history-snapshot", "messageId": "u1", "snapshot": {}, "isSnapshotUpdate": False},
    user("u1", None, "Compare a and b.", 1),
    answer("a1", "u1", "msg_1", {"type": "thinking", "thinking": "Read both.", "signature": "…"}, second=2),
    answer("a2", "a1", "msg_1", text("I'll read both."), second=2),
    answer("a3", "a2", "msg_1", use("t1", "a"), second=2),
    user("r1", "a3", result("t1", "1→x"), 3, toolUseResult={"type": "text"}, sourceToolAssistantUUID="a3"),
    answer("a4", "a3", "msg_1", use("t2", "b"), second=2, stop_reason="tool_use", usage=USAGE),
    user("r2", "a4", result("t2", [text("1→y")], is_error=True), 4, sourceToolAssistantUUID="a4"),
    answer("a5", "r2", "msg_2", text("They differ."), second=5, stop_reason="end_turn"),
    line("system", "s1", "a5", 6, subtype="turn_duration", durationMs=4000),
    user("u2", "s1", [text("And this?"), {"type": "image", "source": {"type": "base64"}}], 7),
    {"type": "summary", "summary": "Comparing files", "leafUuid": "a5"},
]


def test_a_conversation_keeps_answers_tools_dates_and_directory(read_lines: Read) -> None:
    (transcript,), notes = read_lines(*SAMPLE)
    session = transcript.session
    assert (session.id, session.directory, session.model) == ("5e55", "/home/ada/project", "claude-x")
    assert session.extra == {"source": "claude-code", "title": "Comparing files"}
    path = list(transcript.path())
    assert session.n_messages == len(path) == 6
    assert [(message.role, message.content) for message in path] == [
        ("user", "Compare a and b."),
        ("assistant", "I'll read both."),
        ("tool", "1→x"),
        ("tool", "1→y"),
        ("assistant", "They differ."),
        ("user", "And this?\n\n[image]"),
    ]
    assert path[1].reasoning == "Read both."
    calls = path[1].extra["tool_calls"]
    assert calls[0] == {
        "id": "t1",
        "type": "function",
        "function": {"name": "Read", "arguments": '{"file_path":"a"}'},
    }
    assert [calls[1]["id"], path[2].extra["tool_call_id"], path[3].extra["tool_call_id"]] == [
        "t2",
        "t1",
        "t2",
    ]
    assert path[1].answer == {
        "model": "claude-x",
        "finish_reason": "tool_calls",
        "usage": {"prompt_tokens": 113, "cached_tokens": 100, "completion_tokens": 7},
    }
    assert path[4].answer["finish_reason"] == "stop"
    assert path[0].created == 1767225601.0
    assert sorted(notes) == [
        "1 × detail of a tool's result beside its text",
        "1 × line of type file-history-snapshot",
        "1 × line of type system",
        "1 × mark of a tool's result as an error",
        "1 × part that is not text; [image] stands for it",
    ]


def test_an_edited_question_is_a_branch_and_the_last_one_the_conversation(read_lines: Read) -> None:
    (transcript,), _ = read_lines(
        user("u1", None, "One?"),
        answer("a1", "u1", "m1", text("1")),
        user("u2", "a1", "Tow?"),
        answer("a2", "u2", "m2", text("Tow?")),
        user("u3", "a1", "Two?"),
        answer("a3", "u3", "m3", text("2")),
    )
    assert len(transcript.messages) == 6
    assert [message.content for message in transcript.path()] == ["One?", "1", "Two?", "2"]


def test_after_a_compaction_it_goes_on_where_it_was(read_lines: Read) -> None:
    boundary = line("system", "c", None, subtype="compact_boundary", logicalParentUuid="a1")
    (transcript,), _ = read_lines(
        user("u1", None, "Hi"),
        answer("a1", "u1", "m1", text("Hello")),
        boundary,
        user("u2", "c", "Summary: …", isCompactSummary=True),
    )
    assert [message.content for message in transcript.path()] == ["Hi", "Hello", "Summary: …"]


def test_what_a_sub_agent_said_is_kept_beside_the_conversation(read_lines: Read) -> None:
    (transcript,), notes = read_lines(
        user("u1", None, "Hi"),
        answer("a1", "u1", "m1", text("Hello")),
        user("x1", None, "Search.", isSidechain=True),
    )
    assert [message.content for message in transcript.path()] == ["Hi", "Hello"]
    assert [message.content for message in transcript.messages] == ["Hi", "Hello", "Search."]
    assert "1 × message of a sub-agent, kept as a branch of its own" in notes


def test_half_a_line_at_the_end_is_noted(read_bytes: Read) -> None:
    import json

    data = json.dumps(user("u1", None, "Hi")).encode() + b'\n{"type":"assist'
    (transcript,), notes = read_bytes(data)
    assert len(transcript.messages) == 1
    assert notes == ["1 × line that is not a JSON object"]


def test_half_a_character_as_javascript_writes_it_is_replaced(read_bytes: Read) -> None:
    data = rb'{"type":"user","uuid":"u","message":{"content":"\ud83d\ude00 \\ud83d \ud83d"}}'
    (transcript,), _ = read_bytes(data)
    assert transcript.messages[0].content == "😀 \\ud83d \ufffd"
