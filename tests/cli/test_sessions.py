"""`myllm sessions` as a user types it: what it prints, how it ends, and what it leaves alone."""

from __future__ import annotations

import os
import pty
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from myllm import paths
from myllm.conversation import Session
from myllm.storage.sessions import SQLiteSessions

from .conftest import MYLLM, Run

DAY = 86400.0
EVIL = "\x1b]52;c;ZXZpbA==\x07\x9b2J"
"""Writes to the clipboard and clears the screen, on a terminal that obeys."""
FIELDS = [
    *("id", "name", "title", "messages", "model", "created", "updated", "directory", "parent"),
    *("parent_name", "forked_at"),
]


class Clock:
    """A moment that tests set, in seconds since the epoch."""

    def __init__(self) -> None:
        import time

        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[SQLiteSessions]:
    """The store that the commands use, as well."""
    with closing(SQLiteSessions(paths.state_dir(), now=clock)) as store:
        yield store


Talk = Callable[..., Session]


@pytest.fixture
def talk(store: SQLiteSessions, clock: Clock) -> Talk:
    """Keeps a session: `talk("tea", "Hello", "Hi", days_ago=3)`."""

    def begin(name: str | None, *texts: str, days_ago: float = 0.0, **values: Any) -> Session:
        present = clock.now
        clock.now -= days_ago * DAY
        session = store.create(name, **values)
        for number, text in enumerate(texts):
            store.append(session.id, ("user", "assistant")[number % 2], text)
        clock.now = present
        return store.find(session.id)

    return begin


def on_a_terminal(*arguments: object, columns: int = 120, typed: bytes = b"") -> tuple[int, str]:
    """Exit status and screen of a run whose three streams are a terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    os.write(leader, typed)
    command = [*MYLLM, "sessions", *map(str, arguments)]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while data := os.read(leader, 4096):
                shown += data
        except OSError:  # Linux says EIO where the other side is closed
            pass
        status = process.wait(30)
    os.close(leader)
    return status, shown.decode().replace("\r\n", "\n")


def names(store: SQLiteSessions) -> set[str | None]:
    return {session.name for session in store.page()}


# ── list ────────────────────────────────────────────────────────────────────────────────────


def test_no_word_lists_the_newest_first_as_jsonl_in_a_pipe(run: Run, talk: Talk) -> None:
    talk("old", "Hello", days_ago=2)
    tea = talk("tea", "Hello", "Hi", model="smollm2", directory="/srv")
    for arguments in ([], ["list"], ["-n", "2"], ["-o", "jsonl"]):
        listed = run("sessions", *arguments)
        assert (listed.status, listed.err) == (0, "")
        assert [record["name"] for record in listed.lines] == ["tea", "old"]
    record = listed.lines[0]
    assert list(record) == FIELDS
    assert (record["id"], record["messages"], record["updated"]) == (tea.id, 2, tea.updated)
    assert (record["model"], record["directory"], record["parent"]) == ("smollm2", "/srv", None)


def test_a_terminal_gets_a_table_in_which_forks_name_what_they_come_from(
    store: SQLiteSessions, talk: Talk, home: Path
) -> None:
    tea = talk("tea", "Hello", "Hi", days_ago=3, model="/models/m.gguf", directory=str(home / "work"))
    store.fork(tea.id, name="milk")
    head, milk, row = on_a_terminal("list")[1].splitlines()
    assert head.split() == ["ID", "NAME", "MESSAGES", "MODEL", "AGE", "FORK", "OF", "DIRECTORY"]
    assert milk.split()[1:] == ["milk", "2", "m.gguf", "0s", "tea", "~/work"]
    assert row.split()[1:] == ["tea", "2", "m.gguf", "3d", "~/work"]
    assert store.find(row.split()[0]) == tea


def test_ids_in_a_table_are_as_long_as_it_takes_to_tell_them_apart(
    store: SQLiteSessions, talk: Talk, run: Run
) -> None:
    made = [talk(None) for _ in range(3)]  # in one second
    shown = run("sessions", "-t").out.decode().splitlines()[1:]
    assert {store.find(row.split()[0]).id for row in shown} == {session.id for session in made}


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_narrow_terminal_shows_fewer_columns_and_wraps_no_line(talk: Talk, columns: int) -> None:
    talk("n" * 90, "Hello", model="a-model-with-a-long-name", directory="/a/directory/far/away")
    talk("tea", "Hello")
    lines = on_a_terminal("list", columns=columns)[1].splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= columns
    assert lines[1].split()[1] == "tea"
    assert "…" in lines[2]
    assert "AGE" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--older-than", "2d"], ["old"]),
        (["--newer-than", "2d"], ["here", "new"]),
        (["-m", "smollm2"], ["new"]),
        (["--here"], ["here"]),
        (["--here", "-m", "smollm2"], []),
    ],
)
def test_the_list_is_narrowed_by_age_model_and_directory(
    run: Run, talk: Talk, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    talk("old", days_ago=10)
    talk("new", days_ago=1, model="smollm2")
    talk("here", directory=str(tmp_path))
    listed = run("sessions", "list", *arguments, cwd=tmp_path, env=os.environ)
    assert [record["name"] for record in listed.lines] == expected


def test_a_table_says_when_there_are_more_and_a_pipe_gets_all(run: Run, talk: Talk) -> None:
    for _ in range(51):
        talk(None)
    table = run("sessions", "list", "-t")
    assert table.out.count(b"\n") == 1 + 50
    assert "newest 50; --all shows all" in table.err
    everything = run("sessions", "list", "-t", "--all")
    assert (everything.out.count(b"\n"), everything.err) == (1 + 51, "")
    assert len(run("sessions").lines) == 51
    assert len(run("sessions", "list", "-n", 7).lines) == 7


# ── show ────────────────────────────────────────────────────────────────────────────────────


def test_show_prints_text_on_a_terminal_and_messages_in_a_pipe(run: Run, talk: Talk) -> None:
    tea = talk("tea", "Earl Grey?", "Hot.", system="Be brief.")
    assert "[system]\nBe brief.\n\n[user" in on_a_terminal("show", "tea")[1]
    lines = run("sessions", "show", tea.id[:9]).lines
    assert [(line["role"], line["content"]) for line in lines] == [
        ("system", "Be brief."),
        ("user", "Earl Grey?"),
        ("assistant", "Hot."),
    ]
    assert lines[2]["id"] == tea.head
    assert run("sessions", "show", "tea", "--markdown").out.startswith(b"# tea\n\n- Session: ")


def test_show_prints_the_last_messages(run: Run, talk: Talk) -> None:
    talk("tea", "one", "two", "three", system="Be brief.")
    last = run("sessions", "show", "tea", "-n", 2)
    assert [line["content"] for line in last.lines] == ["two", "three"]
    text = run("sessions", "show", "tea", "-n", 1, "-t").out.decode()
    assert "three" in text
    assert "two" not in text
    assert "Be brief" not in text


def test_what_show_prints_is_a_conversation_for_gen(
    run: Run, talk: Talk, fake_model: Callable[..., Path]
) -> None:
    talk("tea", "Earl Grey?", "Hot.", system="Be brief.")
    shown = run("sessions", "show", "tea")
    counted = run("gen", "Again?", "--count", "-t", "-m", fake_model(), stdin=shown.out)
    asked = b'{"role":"system","content":"Be brief."}\n{"role":"user","content":"Earl Grey?"}\n'
    same = asked + b'{"role":"assistant","content":"Hot."}\n'
    assert (counted.status, counted.err) == (0, "")
    assert counted.out == run("gen", "Again?", "--count", "-t", "-m", fake_model(), stdin=same).out


# ── rm ──────────────────────────────────────────────────────────────────────────────────────


def test_rm_asks_on_a_terminal_and_names_what_it_removed(store: SQLiteSessions, talk: Talk) -> None:
    tea, _ = talk("tea", "Hello", "Hi"), talk("milk")
    status, screen = on_a_terminal("rm", "tea", typed=b"n\n")
    assert (status, names(store)) == (1, {"tea", "milk"})
    assert "nothing was removed" in screen
    status, screen = on_a_terminal("rm", "tea", typed=b"y\n")
    assert (status, names(store)) == (0, {"milk"})
    assert f"tea ({tea.id}), 2 messages: removed" in screen


def test_rm_refuses_without_a_terminal_unless_told(run: Run, store: SQLiteSessions, talk: Talk) -> None:
    talk("tea")
    refused = run("sessions", "rm", "tea", stdin=b"y\n")
    assert (refused.status, refused.err.count("\n"), names(store)) == (2, 1, {"tea"})
    assert "-y removes without asking" in refused.err
    removed = run("sessions", "rm", "-y", "tea")
    assert (removed.status, removed.out, names(store)) == (0, b"", set())
    assert removed.err.endswith("0 messages: removed\n")


def test_rm_removes_what_is_old(run: Run, store: SQLiteSessions, talk: Talk) -> None:
    talk("old", days_ago=11)
    talk("new", days_ago=9)
    assert run("sessions", "rm", "-y", "--older-than", "10d").status == 0
    assert names(store) == {"new"}
    assert run("sessions", "rm", "-y", "--older-than", "10d").err == "myllm: no session is that old\n"


def test_rm_removes_nothing_where_one_of_its_words_is_no_session(
    run: Run, store: SQLiteSessions, talk: Talk
) -> None:
    talk("tea")
    wrong = run("sessions", "rm", "-y", "tea", "tee")
    assert (wrong.status, names(store)) == (66, {"tea"})
    assert "did you mean tea?" in wrong.err
