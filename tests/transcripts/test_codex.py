"""Codex's rollouts, with and without envelope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Read = Callable[..., Any]


def line(kind: str, payload: Any, second: int = 0) -> dict[str, Any]:
    return {"timestamp": f"2026-01-01T00:00:{second:02}.000Z", "type": kind, "payload": payload}


def item(kind: str, second: int = 0, **values: Any) -> dict[str, Any]:
    return line("response_item", {"type": kind, **values}, second)


def said(role: str, text: str, second: int = 0) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return item("message", second, role=role, content=[{"type": kind, "text": text}])


META = {
    "id": "019fe7c6",
    "timestamp": "2026-01-01T00:00:00.000Z",
    "cwd": "/home/ada/project",
    "originator": "codex_exec",
    "cli_version": "0.146.0",
    "source": "exec",
    "model_provider": "openai",
    "base_instructions": {"text": "You are Codex."},
}
SAMPLE = [
    line("session_meta", META),
    said("developer", "Sandbox: read-only.", 1),
    said("user", "What is in a?", 1),
    line("event_msg", {"type": "user_message", "message": "What is in a?", "kind": "plain"}, 1),
    line("turn_context", {"cwd": "/home/ada/project", "model": "gpt-5-codex", "effort": "high"}, 1),
    item("reasoning", 2, summary=[{"type": "summary_text", "text": "Look."}], encrypted_content="…"),
    item("function_call", 2, name="shell", arguments='{"command":["cat","a"]}', call_id="c1"),
    item("function_call_output", 3, call_id="c1", output="x"),
    item(
        "custom_tool_call", 4, status="completed", call_id="c2", name="apply_patch", input="*** Begin Patch"
    ),
    item("custom_tool_call_output", 5, call_id="c2", output=[{"type": "input_text", "text": "done"}]),
    item("reasoning", 6, summary=[], encrypted_content="…"),
    said("assistant", "It holds x.", 6),
    item("web_search_call", 7, status="completed", action={"type": "search", "query": "q"}),
    line("compacted", {"message": "…"}, 8),
]


def test_a_rollout_keeps_answers_tools_model_and_instructions(read_lines: Read) -> None:
    (transcript,), notes = read_lines(*SAMPLE)
    session = transcript.session
    assert (session.id, session.directory, session.model) == ("019fe7c6", "/home/ada/project", "gpt-5-codex")
    assert session.system == "You are Codex.\n\nSandbox: read-only."
    path = list(transcript.path())
    assert [(message.role, message.content) for message in path] == [
        ("user", "What is in a?"),
        ("assistant", ""),
        ("tool", "x"),
        ("assistant", ""),
        ("tool", "done"),
        ("assistant", "It holds x."),
    ]
    assert path[1].reasoning == "Look."
    assert [path[at].extra["tool_calls"][0]["function"] for at in (1, 3)] == [
        {"name": "shell", "arguments": '{"command":["cat","a"]}'},
        {"name": "apply_patch", "arguments": '{"input":"*** Begin Patch"}'},
    ]
    assert [path[at].extra["tool_call_id"] for at in (2, 4)] == ["c1", "c2"]
    assert path[5].created == 1767225606.0
    assert sorted(notes) == [
        "1 × item of type web_search_call",
        "1 × line of type compacted",
        "1 × line of type event_msg",
        "1 × reasoning that is encrypted or empty",
    ]


def test_a_rollout_without_envelope_is_read_as_well(read_lines: Read) -> None:
    (transcript,), _ = read_lines(
        {"id": "old", "timestamp": "2025-08-18T01:16:13.522Z", "instructions": "Be brief.", "git": {}},
        {"record_type": "state"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]},
    )
    assert (transcript.session.id, transcript.session.system) == ("old", "Be brief.")
    assert [message.content for message in transcript.path()] == ["Hi", "Hello"]


def test_a_fork_keeps_its_own_id_though_it_repeats_its_origin(read_lines: Read) -> None:
    (transcript,), notes = read_lines(
        line("session_meta", META), line("session_meta", {**META, "id": "origin"}), said("user", "Hi")
    )
    assert transcript.session.id == "019fe7c6"
    assert notes == ["1 × beginning of the conversation that this one was forked from"]
