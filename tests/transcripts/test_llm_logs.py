"""`llm`'s databases, as two of its versions wrote them, and as nobody's version would.

data/llm-*.sql were dumped from what the real tool logged (each file says of what).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myllm.errors import BadDataError
from myllm.transcripts import foreign_database
from myllm.transcripts.foreign_database import ForeignDatabase
from myllm.transcripts.importing import read
from myllm.transcripts.transcript import Notes, Transcript

DATA = Path(__file__).parent / "data"

Make = Callable[[str], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def making(script: str) -> Path:
        path = tmp_path / "logs?#%.db"  # which a URI would read as something else
        connection = sqlite3.connect(path)
        connection.executescript(script)
        connection.close()
        return path

    return making


def imported(path: Path) -> tuple[list[Transcript], list[str]]:
    notes = Notes()
    return list(read(path, notes, now=1000.0)), notes.lines()


def sample(version: str) -> str:
    return (DATA / f"llm-{version}.sql").read_text()


@pytest.mark.parametrize("version", ["0.26", "0.36"])
def test_what_llm_logged_is_read_with_system_prompt_fragments_and_tools(make: Make, version: str) -> None:
    (talk, shout), _ = imported(make(sample(version)))
    assert talk.session.system == "Be brief."
    assert (talk.session.model, talk.session.extra) == (
        "fake",
        {"source": "llm", "title": "My name is Ada."},
    )
    contents = [message.content.removesuffix("\n\n[image/png]") for message in talk.path()]
    document = "A long document.\nRead this."
    assert contents == ["My name is Ada.", "Hello My name is Ada.", document, f"Hello {document}"]
    user, call, result, answer = shout.path()
    assert (user.content, answer.content) == ("Shout.", "Hello ADA")
    assert call.extra["tool_calls"][0]["function"]["name"] == "upper"
    assert (result.role, result.content, result.extra) == ("tool", "ADA", {"tool_call_id": "call_1"})
    assert answer.answer == {"model": "fake", "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    assert user.created > 1_700_000_000


def test_attachments_are_marked_and_counted(make: Make) -> None:
    (talk, _), notes = imported(make(sample("0.26")))
    assert list(talk.path())[2].content.endswith("\n\n[image/png]")
    assert notes == ["1 × part that is not text; [image/png] stands for it"]


def test_a_conversation_that_went_on_in_a_newer_version_comes_once(make: Make) -> None:
    old = "INSERT INTO conversations VALUES ('01m8j4e07wfxap8a0tyrww7n92', 'x', 'm');"
    rows = (
        "INSERT INTO responses (id, conversation_id, prompt) VALUES ('r', '01m8j4e07wfxap8a0tyrww7n92', 'x');"
    )
    transcripts, _ = imported(make(sample("0.36") + old + rows))
    assert len(transcripts) == 2


def test_responses_without_a_conversation_are_one_each(make: Make) -> None:
    script = (
        "CREATE TABLE conversations (id TEXT, name TEXT);"
        "CREATE TABLE responses (id TEXT, conversation_id TEXT, prompt TEXT, response TEXT);"
        "INSERT INTO responses VALUES ('a', NULL, 'One?', '1'), ('b', NULL, 'Two?', '2');"
    )
    transcripts, _ = imported(make(script))
    assert [[message.content for message in item.path()] for item in transcripts] == [
        ["One?", "1"],
        ["Two?", "2"],
    ]


# ── hostile ─────────────────────────────────────────────────────────────────────────────────

TABLES = "CREATE TABLE conversations (id TEXT, name TEXT);"


def test_a_view_in_place_of_a_table_is_not_read(make: Make) -> None:
    endless = "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id FROM n"
    with pytest.raises(BadDataError, match="no conversation"):
        imported(make(f"{TABLES} CREATE VIEW responses AS {endless};"))


def test_a_virtual_table_is_not_read(make: Make) -> None:
    with pytest.raises(BadDataError, match="no conversation"):
        imported(make(f"{TABLES} CREATE VIRTUAL TABLE responses USING fts5(id, conversation_id);"))


def test_only_the_tables_that_are_asked_for_can_be_read(make: Make) -> None:
    path = make(f"{TABLES} CREATE TABLE secrets (id TEXT);")
    with ForeignDatabase(path, ["conversations"]) as database:
        assert list(database.rows("SELECT * FROM conversations")) == []
        for query in ("SELECT * FROM secrets", "SELECT randomblob(5)", "DELETE FROM conversations"):
            with pytest.raises(BadDataError, match=r"not authorized|prohibited"):
                list(database.rows(query))


def test_work_without_end_is_interrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_database, "MAX_LOOKS", 3)
    numbers = ",".join(f"({n})" for n in range(1000))
    path = make(f"CREATE TABLE t (n); INSERT INTO t VALUES {numbers};")
    with ForeignDatabase(path, ["t"]) as database, pytest.raises(BadDataError, match="interrupted"):
        list(database.rows("SELECT 1 FROM t a, t b, t c WHERE a.n + b.n = c.n"))


def test_a_table_of_more_rows_than_the_limit_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_database, "MAX_ROWS", 2)
    path = make("CREATE TABLE t (n); INSERT INTO t VALUES (1), (2), (3);")
    with ForeignDatabase(path, ["t"]) as database, pytest.raises(BadDataError, match="more than 2 rows"):
        list(database.rows("SELECT n FROM t"))


def test_messages_that_follow_one_another_in_a_circle_are_refused(make: Make) -> None:
    circle = (
        "UPDATE messages SET parent_hash = (SELECT tip_message_hash FROM threads) WHERE parent_hash IS NULL;"
    )
    with pytest.raises(BadDataError, match="in a circle"):
        imported(make(sample("0.36") + circle))


@pytest.mark.parametrize("value", ["x'ff00'", "5", "NULL", "cast(x'ff' AS TEXT)"])
@pytest.mark.parametrize(
    ("version", "table"),
    [
        ("0.26", "responses"),
        ("0.26", "tool_calls"),
        ("0.36", "parts"),
        ("0.36", "turns"),
        ("0.36", "threads"),
    ],
)
def test_columns_of_any_type_break_nothing(make: Make, version: str, table: str, value: str) -> None:
    path = make(sample(version))
    connection = sqlite3.connect(path, isolation_level=None)
    for _, name, *_, is_key in connection.execute(f"PRAGMA table_info({table})").fetchall():
        if not is_key:
            connection.execute(f"UPDATE OR IGNORE {table} SET {name} = {value}")
            read_or_refused(path)
    connection.close()


def read_or_refused(path: Path) -> Any:
    try:
        return imported(path)
    except BadDataError as error:
        return error


@pytest.mark.parametrize("at", range(0, 20_000, 997))
def test_a_damaged_file_is_refused_or_read(make: Make, at: int) -> None:
    path = make(sample("0.36"))
    data = bytearray(path.read_bytes())
    data[at : at + 200] = b"\xff" * 200
    path.write_bytes(data)
    read_or_refused(path)


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_nothing_is_left_beside_the_file_and_it_is_as_it_was(make: Make, mode: str) -> None:
    path = make(f"PRAGMA journal_mode = {mode};" + sample("0.36"))
    before = path.read_bytes()
    imported(path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
