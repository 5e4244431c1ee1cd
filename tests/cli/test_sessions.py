"""`myllm sessions` as a user types it: what it prints, how it ends, and what it leaves alone."""

from __future__ import annotations

import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm import paths
from myllm.conversation import Message, Session
from myllm.storage.sessions import SQLiteSessions, sessions_file

from .conftest import MYLLM, Run
from .test_docs import completed

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
    assert re.fullmatch(r"\w{7}  milk  2 +m\.gguf  \ds   tea      ~/work", milk)
    assert row.split()[1:] == ["tea", "2", "m.gguf", "3d", "~/work"]
    assert store.find(row.split()[0]) == tea


def test_ids_in_a_table_are_as_long_as_it_takes_to_tell_them_apart(
    store: SQLiteSessions, talk: Talk, run: Run
) -> None:
    made = [talk(None) for _ in range(3)]  # in one second
    shown = run("sessions", "-t").out.decode().splitlines()[1:]
    assert {store.find(row.split()[0]).id for row in shown} == {session.id for session in made}


@pytest.mark.parametrize(
    ("columns", "heads"),
    [(40, "ID NAME AGE"), (60, "ID NAME MESSAGES AGE"), (80, "ID NAME MESSAGES MODEL AGE")],
)
def test_a_narrow_terminal_shows_fewer_columns_and_wraps_no_line(
    talk: Talk, columns: int, heads: str
) -> None:
    talk("n" * 90, "Hello", model="\x1b" * 7, directory="/a/directory/far/away")
    talk("tea", "Hello")
    lines = on_a_terminal("list", columns=columns)[1].splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= columns
    assert lines[1].split()[1] == "tea"
    assert "…" in lines[2]
    assert lines[0].split() == heads.split()


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


# ── search, rename, fork ────────────────────────────────────────────────────────────────────


def test_search_prints_where_all_words_are(run: Run, talk: Talk) -> None:
    tea = talk("tea", "Is Earl Grey a tea?", "Yes, with bergamot.")
    talk("milk", "Is oat milk a milk?", "Earl says so.")
    found = run("sessions", "search", "GREY", "éarl")
    assert (found.status, found.err) == (0, "")
    (record,) = found.lines
    assert list(record) == ["session", "name", "message", "role", "created", "snippet", "found"]
    assert (record["session"], record["name"], record["role"]) == (tea.id, "tea", "user")
    assert (record["snippet"], record["found"]) == ("Is Earl Grey a tea?", ["Earl", "Grey"])
    assert [line["name"] for line in run("sessions", "search", "earl").lines] == ["milk", "tea"]


def test_search_that_finds_nothing_ends_with_1(run: Run, talk: Talk) -> None:
    talk("tea", "Hello")
    nothing = run("sessions", "search", "coffee")
    assert (nothing.status, nothing.out, nothing.err.count("\n")) == (1, b"", 1)


@pytest.mark.parametrize("words", ['"', "a AND", "NEAR(", "*", "col:x", "'; DROP", "(", "hello^2", "\x1b["])
def test_no_character_is_an_error_in_a_search(run: Run, talk: Talk, words: str) -> None:
    talk("tea", "Hello")
    assert run("sessions", "search", "--", words).status == 1


def test_found_words_are_coloured_on_a_terminal_that_wants_it(
    talk: Talk, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk("tea", f"Is Earl{EVIL} Grey\na tea?")
    plain = "Is Earl\\x1b]52;c;ZXZpbA==\\x07\\x9b2J Grey a tea?"
    monkeypatch.setenv("TERM", "xterm")
    coloured = on_a_terminal("search", "grey")[1]
    assert coloured.endswith(plain.replace("Grey", "\x1b[1;31mGrey\x1b[0m") + "\n")
    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(variable, value)
        assert on_a_terminal("search", "grey")[1].endswith(f"  user: {plain}\n")
        monkeypatch.delenv(variable)
    assert run("sessions", "search", "grey", "-t").out.decode().endswith(f"  user: {plain}\n")


def test_search_says_when_there_is_more(run: Run, talk: Talk) -> None:
    talk("tea", *["tea"] * 3)
    some = run("sessions", "search", "tea", "-n", 2)
    assert len(some.lines) == 2
    assert "more than these 2" in some.err


def test_rename_gives_a_name_that_is_free(run: Run, store: SQLiteSessions, talk: Talk) -> None:
    talk("tea")
    talk("milk")
    assert run("sessions", "rename", "tea", "chai").status == 0
    taken = run("sessions", "rename", "chai", "milk")
    assert (taken.status, taken.err.count("\n"), names(store)) == (2, 1, {"chai", "milk"})


def test_fork_prints_a_session_that_goes_on_from_a_message(
    run: Run, store: SQLiteSessions, talk: Talk
) -> None:
    tea = talk("tea", "one", "two", "three")
    _, second, _ = store.path(tea.id)
    forked = run("sessions", "fork", "tea", "--at", second.id, "--name", "milk")
    (record,) = forked.lines
    assert (record["name"], record["parent_name"], record["forked_at"]) == ("milk", "tea", second.id)
    assert [message.content for message in store.path(record["id"])] == ["one", "two"]
    unnamed = run("sessions", "fork", "tea", "-t").out.decode()
    assert store.path(store.find(unnamed.removesuffix("\n")).id) == store.path(tea.id)
    assert run("sessions", "fork", "tea", "--at", "zzzz").status == 66


def test_ids_that_show_prints_are_those_that_fork_takes(run: Run, store: SQLiteSessions, talk: Talk) -> None:
    tea = talk("tea", "one", "two")
    assert all(
        message.id in run("sessions", "show", "tea", "-t").out.decode() for message in store.path(tea.id)
    )


# ── export, import ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has no sessions yet."""
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path / "elsewhere")}


def test_export_import_export_is_identical(
    run: Run, store: SQLiteSessions, talk: Talk, elsewhere: dict[str, str]
) -> None:
    tea = talk("tea", "Earl?", "Grey.", "More?", days_ago=3, model="m", system="Be brief.", directory="/srv")
    _, answer, _ = store.path(tea.id)
    store.append(tea.id, "assistant", f"Tried {EVIL} again", parent=answer.parent, answer={"seed": 7})
    milk = store.fork(tea.id, answer.id, "milk")
    store.append(milk.id, "user", "Oat?", extra={"name": "ada"}, tokens={"t": 3})
    store.fork(milk.id, name=None)
    exported = run("sessions", "export", "--all")
    assert (exported.status, exported.err) == (0, "")
    imported = run("sessions", "import", stdin=exported.out, env=elsewhere)
    assert (imported.status, imported.out, imported.err.count("\n")) == (0, b"", 3)
    assert all(line.endswith(": imported") for line in imported.err.splitlines())
    assert run("sessions", "export", "--all", env=elsewhere).out == exported.out
    assert run("sessions", "export", "milk", "tea", env=elsewhere).out in exported.out


def test_a_name_that_is_taken_is_numbered_and_said(run: Run, store: SQLiteSessions, talk: Talk) -> None:
    talk("tea", "Hello")
    talk("n" * 100)
    exported = run("sessions", "export", "--all").out
    for _ in range(2):
        again = run("sessions", "import", "-", stdin=exported)
        assert again.status == 0
    assert "; the name 'tea' is taken; with new ids, as its own are taken\n" in again.err
    assert names(store) == {"tea", "tea-2", "tea-3", "n" * 100, "n" * 98 + "-2", "n" * 98 + "-3"}


def test_an_import_can_be_given_a_name(run: Run, store: SQLiteSessions, tmp_path: Path) -> None:
    (tmp_path / "chat").write_text('{"messages":[{"role":"user","content":"Tea?"}]}\n' * 2)
    assert run("sessions", "import", tmp_path / "chat", "--name", "tea").status == 0
    assert names(store) == {"tea", "tea-2"}
    assert run("sessions", "import", tmp_path / "chat", "--name", "a/b").status == 2
    assert names(store) == {"tea", "tea-2"}


def test_what_cannot_be_a_name_becomes_the_title_and_an_owner_the_user(
    run: Run, store: SQLiteSessions, talk: Talk
) -> None:
    session = orjson.loads(_exported(run, talk))
    line = orjson.dumps({**session, "name": "a/b", "owner": "key"})
    imported = run("sessions", "import", stdin=line)
    assert "; 'a/b' cannot be a name; it was of 'key'" in imported.err
    assert "a/b" in {session.extra.get("title") for session in store.page()}


def _exported(run: Run, talk: Talk) -> bytes:
    talk("tea")
    return run("sessions", "export", "tea").out


def test_formats_of_others_are_recognised_or_named(run: Run, store: SQLiteSessions, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(
        '{"messages":[{"role":"user","content":[{"type":"image_url"},{"type":"text","text":"Tea?"}]}]}\n'
    )
    for arguments in ([], ["--format", "openai"]):
        imported = run("sessions", "import", *arguments, tmp_path / "chat.jsonl")
        assert imported.status == 0
        first, second = imported.err.splitlines()
        assert first.endswith("1 message: imported")
        assert "chat.jsonl: not kept as it was: 1 × part that is not text; [image] stands for it" in second
    assert len(store.page()) == 2
    assert run("sessions", "export", store.page()[0].id, "--format", "openai").lines == [
        {"messages": [{"role": "user", "content": "[image]Tea?"}]}
    ]
    assert run("sessions", "import", "--format", "codex", tmp_path / "chat.jsonl").status == 65


def test_a_broken_file_is_65_with_its_line_and_what_is_whole_is_kept(
    run: Run, store: SQLiteSessions, talk: Talk, tmp_path: Path
) -> None:
    whole = _exported(run, talk)
    run("sessions", "rm", "-y", "tea")
    second = orjson.dumps({**orjson.loads(whole), "id": "2", "name": "second", "messages": 1})
    (tmp_path / "broken").write_bytes(whole + second + b"\n{not JSON}\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "good").write_text('{"role":"user","content":"Hello"}\n')
    given = [tmp_path / name for name in ("broken", "missing", "binary", "empty", "good")]
    imported = run("sessions", "import", *given, "-", stdin=b"")
    assert imported.status == 65
    said = imported.err.splitlines()
    assert f"myllm: {tmp_path}/broken: line 3: not JSON" in imported.err
    assert f"myllm: {tmp_path}/missing: no such file" in imported.err
    assert f"myllm: {tmp_path}/binary: " in imported.err
    assert f"myllm: {tmp_path}/empty: no conversation in it" in imported.err
    assert said[-1].startswith("myllm: stdin: no conversation in it")
    assert names(store) == {"tea", None}


def test_a_database_on_stdin_is_refused_with_what_to_do(run: Run) -> None:
    refused = run("sessions", "import", stdin=b"SQLite format 3\0" + bytes(100))
    assert refused.status == 65
    assert refused.err == "myllm: stdin: a database cannot be read from a pipe; give the file's path\n"


def test_export_wants_to_know_what(run: Run) -> None:
    assert run("sessions", "export").status == 2
    assert run("sessions", "export", "--all", "tea").status == 2


# ── strangers' texts ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "-o", "jsonl"],
        ["show", "tea"],
        ["show", "tea", "--markdown"],
        ["show", "tea", "-o", "jsonl"],
        ["search", "clipboard"],
        ["search", "clipboard", "-o", "jsonl"],
        *(["export", "tea", "--format", form] for form in ("jsonl", "openai", "markdown")),
        ["fork", "tea", "-o", "jsonl"],
        ["rename", "tea", "chai"],
        ["rm", "-y", "tea"],
    ],
    ids=" ".join,
)
def test_no_escape_sequence_of_a_session_reaches_the_terminal(
    store: SQLiteSessions, talk: Talk, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    tea = talk(
        "tea", f"clipboard {EVIL}", system=EVIL, model=EVIL, directory=f"/{EVIL}", settings={"x": EVIL}
    )
    call = {"id": EVIL, "function": {"name": EVIL, "arguments": EVIL}}
    store.append(tea.id, "assistant", EVIL, reasoning=EVIL, extra={"name": EVIL, "tool_calls": [call]})
    status, screen = on_a_terminal(*arguments)
    assert status == 0
    assert screen
    assert not set(screen) & {"\x1b", "\x07", "\x9b"}


def test_no_escape_sequence_of_an_imported_file_reaches_the_terminal(tmp_path: Path) -> None:
    record = {"type": EVIL, "uuid": "1", "sessionId": "s", "timestamp": "2026-01-01T00:00:00Z"}
    said = {**record, "type": "user", "message": {"role": "user", "content": EVIL}, "cwd": EVIL}
    evil = {"format": "myllm-session", "version": 1, EVIL: EVIL}
    for number, records in enumerate(([said, record], [evil], [{"role": "user", "content": "", EVIL: EVIL}])):
        (tmp_path / f"{EVIL}{number}").write_bytes(b"\n".join(map(orjson.dumps, records)))
    status, screen = on_a_terminal("import", *sorted(tmp_path.iterdir()))
    assert status == 65
    assert "imported" in screen
    assert "not kept as it was" in screen
    assert not set(screen) & {"\x1b", "\x07", "\x9b"}


def test_into_a_pipe_a_text_is_as_it_was(run: Run, talk: Talk) -> None:
    talk("tea", EVIL)
    assert EVIL.encode() in run("sessions", "show", "tea", "-t").out
    assert run("sessions", "show", "tea").lines[0]["content"] == EVIL


# ── size and faults ─────────────────────────────────────────────────────────────────────────


MEASURED = (
    "import os, subprocess, sys; process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "_, status, usage = os.wait4(process.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)"
)
"""Run in between, as Linux counts for a process what the one that started it had in memory."""


def peak_bytes(*arguments: object) -> int:
    """The memory that a run takes at most, which must succeed."""
    command = [sys.executable, "-c", MEASURED, *MYLLM, "sessions"]
    ended = subprocess.run([*command, *map(str, arguments)], capture_output=True, check=True)
    return int(ended.stdout) * 1024


@pytest.mark.parametrize(
    ("n_messages", "length"), [(10_000, 2_000), pytest.param(100_000, 1_000, marks=pytest.mark.slow)]
)
def test_a_long_session_is_shown_and_exported_without_holding_it(
    store: SQLiteSessions, talk: Talk, n_messages: int, length: int
) -> None:
    talk("short", "Hello")
    text = "x" * length
    messages = (
        Message(id=str(n), parent=str(n - 1) if n else None, role="user", content=text, created=0.0)
        for n in range(n_messages)
    )
    store.import_session(
        Session(id="", name="long", created=0.0, updated=0.0, head=str(n_messages - 1)), messages
    )
    for arguments in (
        ["show"],
        ["show", "-t"],
        ["show", "--markdown"],
        ["export"],
        ["export", "--format", "openai"],
    ):
        more = peak_bytes(*arguments, "long") - peak_bytes(*arguments, "short")
        assert more < n_messages * length * 0.6, arguments


def test_a_reader_that_has_enough_ends_it_quietly(talk: Talk) -> None:
    talk("tea", *["x" * 10_000] * 50)
    for arguments in (["show", "tea"], ["show", "tea", "-t"], ["export", "--all"]):
        command = [*MYLLM, "sessions", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.stdout.close()
            assert process.stderr is not None
            assert process.stderr.read() == b""
        assert process.returncode == -signal.SIGPIPE


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def test_in_a_read_only_home_sessions_are_read_and_nothing_is_changed(
    run: Run, store: SQLiteSessions, talk: Talk, home: Path
) -> None:
    talk("tea", "Hello")
    store.close()
    under = ["unshare", "-Urm", "sh", "-c", READ_ONLY, str(home)]
    exported = run("sessions", "export", "tea", under=under)
    assert exported.status == 0
    assert [record["name"] for record in run("sessions", under=under).lines] == ["tea"]
    for arguments, status in ((["rename", "tea", "x"], 77), (["rm", "-y", "tea"], 73), (["import"], 77)):
        refused = run("sessions", *arguments, stdin=exported.out, under=under)
        assert (refused.status, refused.err.count("\n")) == (status, 1), refused.err
    assert names(store) == {"tea"}


def test_without_a_home_it_says_so(run: Run) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    nobody = (
        "import pwd, runpy, sys; del sys.argv[1:4]; pwd.getpwuid = {}.__getitem__; "
        "runpy.run_module('myllm', run_name='__main__')"
    )
    under = [sys.executable, "-c", nobody]
    ended = run("sessions", env={**environment, "HOME": ""}, under=under)
    assert (ended.status, ended.err.count("\n")) == (78, 1)


def test_sessions_of_a_newer_myllm_are_left_as_they_are(run: Run, store: SQLiteSessions, talk: Talk) -> None:
    talk("tea", "Hello")
    exported = run("sessions", "export", "tea").out
    store.close()
    file = sessions_file(paths.state_dir())
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = file.read_bytes()
    for arguments in ([], ["show", "tea"], ["rm", "-y", "tea"], ["import"], ["search", "hello"]):
        refused = run("sessions", *arguments, stdin=exported)
        assert (refused.status, refused.out) == (65, b"")
        assert "of a newer MyLLM, left as it is; update MyLLM" in refused.err
    assert file.read_bytes() == before


def test_while_another_writes_it_reads_and_does_not_wait_for_ever(
    run: Run, store: SQLiteSessions, talk: Talk
) -> None:
    talk("tea", "Hello")
    with closing(sqlite3.connect(sessions_file(paths.state_dir()), isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert run("sessions", "show", "tea").status == 0
        refused = run("sessions", "rename", "tea", "chai")
        assert (refused.status, refused.err.count("\n")) == (75, 1)
        connection.execute("ROLLBACK")
    assert names(store) == {"tea"}


def test_a_session_in_which_a_turn_is_taken_is_not_removed(
    run: Run, store: SQLiteSessions, talk: Talk
) -> None:
    tea = talk("tea", "Hello")
    with store.turn(tea.id):
        refused = run("sessions", "rm", "-y", "tea")
    assert (refused.status, names(store)) == (75, {"tea"})
    assert "taking a turn" in refused.err


def test_ctrl_c_during_an_import_leaves_whole_sessions_only(
    run: Run, store: SQLiteSessions, talk: Talk
) -> None:
    talk("tea", "Hello", "Hi")
    whole = run("sessions", "export", "tea").out
    run("sessions", "rm", "-y", "tea")
    head, *messages = whole.splitlines(keepends=True)
    second = orjson.dumps({**orjson.loads(head), "id": "2", "name": "second"})
    command = [*MYLLM, "sessions", "import"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(whole + second + b"\n" + messages[0])
        assert process.stderr.readline().endswith(b": imported\n")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT
    assert names(store) == {"tea"}
    assert len(store.search("hello")) == 1


def test_a_wrong_name_is_66_and_says_which_are_near(run: Run, talk: Talk) -> None:
    talk("earl-grey")
    for command in ("show", "rename", "fork", "export"):
        wrong = run("sessions", command, "earl-gray", *(["x"] if command == "rename" else []))
        assert (wrong.status, wrong.out, wrong.err.count("\n")) == (66, b"", 1)
        assert "did you mean earl-grey?" in wrong.err


def test_names_complete(store: SQLiteSessions, talk: Talk) -> None:
    talk("tea")
    talk("milk")
    talk(None)
    assert completed("myllm", "sessions", "show", "t") == ["tea"]
    assert set(completed("myllm", "sessions", "rm", "")) >= {"tea", "milk"}
    assert {"list", "import"} <= set(completed("myllm", "sessions", ""))
    store.close()
    sessions_file(paths.state_dir()).write_bytes(b"no database" * 1000)
    assert not any(completed("myllm", "sessions", "show", "t"))
