"""Any file: what it is, and that no content of one does more than be refused."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myllm.conversation import Session
from myllm.errors import BadDataError, IOFailureError, NotFoundError
from myllm.transcripts import markdown, native, openai, plain
from myllm.transcripts.importing import FORMATS, read, recognised
from myllm.transcripts.transcript import Notes, Transcript

Read = Callable[..., Any]

CLAUDE = [
    {"type": "user", "uuid": "u", "parentUuid": None, "message": {"role": "user", "content": "Hi"}},
    {
        "type": "assistant",
        "uuid": "a",
        "parentUuid": "u",
        "timestamp": "2026-01-01T00:00:00Z",
        "message": {
            "id": "m",
            "role": "assistant",
            "model": "c",
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 1},
            "content": [
                {"type": "thinking", "thinking": "…"},
                {"type": "text", "text": "Hello"},
                {"type": "tool_use", "id": "t", "name": "Read", "input": {"a": 1}},
            ],
        },
    },
    {
        "type": "user",
        "uuid": "r",
        "parentUuid": "a",
        "message": {"content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}]},
    },
]
CODEX = [
    {"type": "session_meta", "timestamp": "2026-01-01T00:00:00Z", "payload": {"id": "c", "cwd": "/"}},
    {"type": "turn_context", "timestamp": "2026-01-01T00:00:00Z", "payload": {"model": "g"}},
    *(
        {"type": "response_item", "timestamp": "2026-01-01T00:00:00Z", "payload": payload}
        for payload in (
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "…"}]},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
            {"type": "function_call_output", "call_id": "c", "output": {"content": "x", "success": False}},
        )
    ),
]
CHATGPT = [
    [
        {
            "title": "T",
            "create_time": 1.0,
            "current_node": "c",
            "mapping": {
                "q": {
                    "id": "q",
                    "parent": None,
                    "message": {
                        "author": {"role": "user"},
                        "content": {"content_type": "text", "parts": ["Hi", {}]},
                    },
                },
                "a": {
                    "id": "a",
                    "parent": "q",
                    "message": {
                        "author": {"role": "assistant"},
                        "recipient": "python",
                        "content": {"content_type": "code", "text": "1"},
                        "metadata": {
                            "model_slug": "g",
                            "finish_details": {"type": "stop"},
                            "attachments": [],
                        },
                    },
                },
                "c": {
                    "id": "c",
                    "parent": "a",
                    "message": {
                        "author": {"role": "tool", "name": "python"},
                        "content": {
                            "content_type": "thoughts",
                            "thoughts": [{"summary": "s", "content": "c"}],
                        },
                    },
                },
            },
        }
    ]
]
OPENAI = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}]
NATIVE = list(
    map(json.loads, native.export(Transcript(Session(id="s", name=None, created=0.0, updated=0.0), [])))
)
SAMPLES = {"claude-code": CLAUDE, "codex": CODEX, "chatgpt": CHATGPT, "openai": OPENAI, "myllm": NATIVE}


def test_the_samples_are_of_all_formats_and_are_read(read_lines: Read) -> None:
    assert {*SAMPLES, "llm"} == set(FORMATS)
    for records in SAMPLES.values():
        assert len(read_lines(*records)[0]) == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_the_first_line_tells_the_format(read_lines: Read, name: str) -> None:
    (first, *_), _ = read_lines(*SAMPLES[name])
    assert first.session.extra.get("source", "myllm") == name


@pytest.mark.parametrize(
    ("line", "format_"),
    [
        (b'{"role":"user","content":"x"}', "openai"),
        (b'{"mapping":{}}', "chatgpt"),
        (b'{"type":"summary","summary":"x","leafUuid":"y"}', "claude-code"),
        (b'{"type":"file-history-snapshot","messageId":"x"}', "claude-code"),
        (b'{"id":"x","timestamp":"2025-08-18T01:16:13Z","instructions":null}', "codex"),
    ],
)
def test_first_lines_of_other_shapes_tell_it_too(line: bytes, format_: str) -> None:
    assert recognised(line) == format_


@pytest.mark.parametrize("data", [b"hello\n", b"{}\n", b"5", b'"x"', b"\x00\x01", b'{"type":5}'])
def test_a_file_of_no_known_format_is_refused_with_those_that_are_known(
    read_bytes: Read, data: bytes
) -> None:
    with pytest.raises(BadDataError, match="no known format; name one of myllm, openai"):
        read_bytes(data)


def test_a_format_that_is_named_is_not_guessed(read_lines: Read) -> None:
    with pytest.raises(BadDataError, match="expected the line of a session"):
        read_lines(*OPENAI, format_="myllm")
    with pytest.raises(BadDataError, match="no conversation in it; 1 × line of type None"):
        read_lines(*OPENAI, format_="claude-code")
    with pytest.raises(BadDataError, match="not a database"):
        read_lines(*OPENAI * 50, format_="llm")


def test_blank_lines_and_a_byte_order_mark_are_nothing(read_bytes: Read) -> None:
    line = json.dumps(OPENAI[0]).encode()
    assert len(read_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + line)[0]) == 2
    assert len(read_bytes(b"\xef\xbb\xbf\n " + json.dumps(CHATGPT[0]).encode())[0]) == 1


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_file_is_refused(read_bytes: Read, data: bytes) -> None:
    with pytest.raises(BadDataError, match="no conversation in it; it is empty"):
        read_bytes(data)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        list(read(tmp_path / "none", Notes()))
    with pytest.raises(IOFailureError, match="cannot be read"):
        list(read(tmp_path, Notes()))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"{}\n[]\n5\n", b"\xff\xfe\n"])
def test_nesting_without_end_and_other_nonsense_is_refused(
    read_bytes: Read, data: bytes, format_: str
) -> None:
    with pytest.raises(BadDataError):
        read_bytes(data, format_)


def test_arguments_nested_deeper_than_can_be_written_are_noted(read_lines: Read) -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    content = [{"type": "text", "text": "x"}, {"type": "tool_use", "id": "t", "name": "f", "input": deep}]
    line = {**CLAUDE[1], "message": {"role": "assistant", "content": content}}
    (transcript,), notes = read_lines(line)
    assert transcript.messages[0].content == "x"
    assert notes == ["1 × tool call whose arguments are nested too deeply"]


def test_long_chains_and_many_kinds_cost_no_recursion_and_few_notes(read_lines: Read) -> None:
    many = 10_000
    chain = [
        {"type": "user", "uuid": str(n), "parentUuid": str(n - 1), "message": {"content": "x"}}
        for n in range(many)
    ]
    (transcript,), notes = read_lines(*chain, *({"type": f"kind {n}"} for n in range(many)))
    assert transcript.session.n_messages == many
    assert len(notes) <= 101
    assert sum(int(note.split(" ×")[0].replace(",", "")) for note in notes) == many


def test_control_characters_stay_in_contents_and_go_from_titles_and_names(read_lines: Read) -> None:
    evil = "a\x1b]52;c;x\x07\x00b"
    user = {**CLAUDE[0], "cwd": f"/{evil}", "message": {"content": evil}}
    call = {"type": "tool_use", "id": evil, "name": evil, "input": {}}
    answer = {**CLAUDE[1], "message": {"content": [call]}}
    (transcript,), _ = read_lines(user, answer, {"type": "summary", "summary": evil})
    assert transcript.messages[0].content == evil
    assert transcript.session.extra["title"] == transcript.title() == "a ]52;c;x b"
    assert transcript.session.directory is None
    assert transcript.messages[1].extra["tool_calls"][0]["function"]["name"] == "a ]52;c;x b"


# ── any value in the place of any other ─────────────────────────────────────────────────────


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    first, *rest = path
    if isinstance(value, dict):
        return {**value, first: put(value[first], tuple(rest), new)}
    return [put(item, tuple(rest), new) if at == first else item for at, item in enumerate(value)]


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        1e300,
        2**63,
        "",
        "x",
        "\x00",
        "u",
        "a",
        "c",
        [],
        {},
        [None],
        {"type": "text"},
        [[]],
        [{}],
    ]
)


@pytest.mark.parametrize("name", SAMPLES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused_and_can_be_shown(
    read_lines: Read, name: str, data: st.DataObject
) -> None:
    records: Any = SAMPLES[name]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([path for path in places(records) if path]))
        records = put(records, place, data.draw(ODD))
    try:
        transcripts, _ = read_lines(*records, format_=name)
    except BadDataError:
        return
    for transcript in transcripts:
        assert transcript.session.n_messages == len(list(transcript.path())) or name == "myllm"
        seen = {None}
        for message in transcript.messages:
            assert message.parent in seen
            seen.add(message.id)
        assert "".join(markdown.render(transcript))
        assert "".join(plain.render(transcript))
        assert openai.export(transcript)
        lines = list(native.export(transcript))
        assert len(lines) == 1 + len(transcript.messages)


def test_what_was_imported_from_elsewhere_can_be_exported_and_imported(
    read_lines: Read, tmp_path: Path
) -> None:
    for name in ("claude-code", "codex", "chatgpt", "openai"):
        transcripts, _ = read_lines(*SAMPLES[name])
        path = tmp_path / name
        path.write_bytes(b"".join(line for item in transcripts for line in native.export(item)))
        assert list(read(path, Notes())) == transcripts


def test_a_database_that_is_being_written_is_read_as_it_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "logs.db"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.executescript(
        "CREATE TABLE conversations (id TEXT, name TEXT);"
        "CREATE TABLE responses (id TEXT, conversation_id TEXT, prompt TEXT, response TEXT);"
        "INSERT INTO responses VALUES ('a', 'c', 'One?', '1'); BEGIN;"
        "INSERT INTO responses VALUES ('b', 'c', 'Two?', '2');"
    )
    (transcript,) = read(path, Notes())
    writer.close()
    assert [message.content for message in transcript.path()] == ["One?", "1"]
