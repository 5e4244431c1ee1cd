"""What is SQLite's own in the session store: the file, its faults, other processes, and sudden ends."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from myllm.conversation import Message, Session, State
from myllm.errors import (
    BadDataError,
    CannotCreateError,
    IOFailureError,
    TryAgainError,
)
from myllm.storage import session_file
from myllm.storage.sessions import SQLiteSessions, sessions_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(folder: Path) -> Iterator[SQLiteSessions]:
    with closing(SQLiteSessions(folder)) as store:
        yield store


@pytest.fixture
def kept(folder: Path) -> Session:
    """A session of a store that has been closed."""
    with closing(SQLiteSessions(folder)) as store:
        session = store.create("kept")
        store.append(session.id, "user", "hello")
        return store.find("kept")


def connection_of(store: SQLiteSessions) -> sqlite3.Connection:
    """The one that writes."""
    connection = store._file.writer.opened
    assert connection is not None
    return connection


def chain(length: int) -> tuple[Session, list[Message]]:
    """A session of one long path, to be imported."""
    messages = [
        Message(id=f"m{n}", parent=f"m{n - 1}" if n else None, role="user", content=f"word {n}", created=n)
        for n in range(length)
    ]
    return Session(id="s", name=None, created=0, updated=0, head=messages[-1].id), messages


# ── the file ────────────────────────────────────────────────────────────────────────────────


def test_files_and_folders_are_private_whatever_the_umask(store: SQLiteSessions, folder: Path) -> None:
    before = os.umask(0)
    try:
        session = store.create()
        with store.turn(session.id):
            store.append(session.id, "user", "hello")
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o700, 0o600}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())
    assert len(modes) == 6, "the folder, the database with its two companions, and the turn's lock"


def test_what_returned_is_on_disk(store: SQLiteSessions) -> None:
    store.create()
    settings = [connection_of(store).execute(f"PRAGMA {name}").fetchone() for name in PRAGMAS]
    assert settings == [("wal",), (2,), (1,)]


PRAGMAS = ("journal_mode", "synchronous", "foreign_keys")


def test_a_file_that_is_up_to_date_is_opened_without_sqlite_utils(folder: Path, kept: Session) -> None:
    script = (
        "import sys; from pathlib import Path; from myllm.storage.sessions import SQLiteSessions; "
        "print(SQLiteSessions(Path(sys.argv[1])).find('kept').n_messages, 'sqlite_utils' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "False"]


def spoiled(folder: Path, how: str) -> Path:
    file = sessions_file(folder)
    if how == "newer":
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA user_version = 99")
    elif how == "strange":
        file.unlink()
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE precious (x)")
    elif how == "no database":
        file.write_bytes(b"no database" * 1000)
    else:
        damaged = bytearray(file.read_bytes())
        damaged[4096:] = b"\xff" * (len(damaged) - 4096)
        file.write_bytes(damaged)
    return file


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("newer", "of a newer MyLLM, left as it is; update MyLLM"),
        ("strange", "another program's database; left as it is"),
        ("no database", "file is not a database; left as it is"),
        ("damaged", "database disk image is malformed; left as it is"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_left_as_it_is(
    folder: Path, kept: Session, how: str, said: str
) -> None:
    file = spoiled(folder, how)
    before = file.read_bytes()
    with closing(SQLiteSessions(folder)) as store:
        calls = (store.create, lambda: store.find("kept"), store.page, lambda: store.path(kept.id))
        for call in calls:
            with pytest.raises(BadDataError, match=said) as refused:
                call()
            assert str(file) in str(refused.value)
    assert file.read_bytes() == before
    assert not list(folder.glob("*.corrupt*"))


# ── faults ──────────────────────────────────────────────────────────────────────────────────

HOLD = (
    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
    "c.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.readline()"
)


@contextmanager
def locked_elsewhere(folder: Path) -> Iterator[IO[bytes]]:
    """Another process has begun to write; it lets go when a line is written to it."""
    command = [sys.executable, "-c", HOLD, str(sessions_file(folder))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        yield holder.stdin


@pytest.mark.parametrize("seconds", [0.5, pytest.param(3, marks=pytest.mark.slow)])
def test_another_process_that_writes_is_waited_for(
    store: SQLiteSessions, folder: Path, kept: Session, seconds: float
) -> None:
    with locked_elsewhere(folder) as holder:
        letting_go = threading.Timer(seconds, lambda: (holder.write(b"\n"), holder.flush()))
        letting_go.start()
        began = time.monotonic()
        store.append(kept.id, "user", "late")
        assert seconds - 0.1 < time.monotonic() - began < seconds + 2
        letting_go.join()
    assert store.find("kept").n_messages == 2


@pytest.mark.parametrize("busy_seconds", [0.2, pytest.param(5.0, marks=pytest.mark.slow)])
def test_another_process_that_goes_on_writing_is_given_up(
    store: SQLiteSessions, folder: Path, kept: Session, monkeypatch: pytest.MonkeyPatch, busy_seconds: float
) -> None:
    monkeypatch.setattr(session_file, "BUSY_SECONDS", busy_seconds)
    with locked_elsewhere(folder) as holder:
        began = time.monotonic()
        with pytest.raises(TryAgainError, match="locked by another process; try again"):
            store.append(kept.id, "user", "late")
        assert busy_seconds - 0.1 < time.monotonic() - began < busy_seconds + 1
        holder.write(b"\n")
        holder.flush()
    assert store.append(kept.id, "user", "now").content == "now"


def test_reading_waits_for_no_writer(store: SQLiteSessions, folder: Path, kept: Session) -> None:
    """Not even for one of the same process that is waiting."""
    store.path(kept.id)
    with locked_elsewhere(folder) as holder:
        writing = threading.Thread(target=lambda: store.append(kept.id, "user", "late"))
        writing.start()
        time.sleep(0.1)
        began = time.monotonic()
        assert [message.content for message in store.path(kept.id)] == ["hello"]
        assert time.monotonic() - began < 1
        assert writing.is_alive()
        holder.write(b"\n")
        holder.flush()
        writing.join(10)
    assert store.find("kept").n_messages == 2


def test_a_full_disk_leaves_what_was_there(store: SQLiteSessions, kept: Session) -> None:
    store.update(kept)
    connection = connection_of(store)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    said: list[Message] = []

    def go_on() -> None:
        while True:
            said.append(store.append(kept.id, "user", "word " * 200))

    with pytest.raises(IOFailureError, match=r"full; .*make room"):
        go_on()
    with pytest.raises(IOFailureError):
        store.import_session(*chain(1000))
    assert store.find("kept").n_messages == 1 + len(said)
    assert len(store.search("word", limit=1000)) == len(said)
    assert [session.id for session in store.page()] == [kept.id]
    connection.execute("PRAGMA max_page_count = 1000000")
    store.append(kept.id, "user", "room again")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


SMALL_DISK = 'mount -t tmpfs -o mode=0700,size=600k tmpfs "$0" && exec "$@"'
ON_A_SMALL_DISK = """
import sys; from pathlib import Path
from myllm.errors import IOFailureError
from myllm.storage.sessions import SQLiteSessions
folder, said = Path(sys.argv[1]), []
filler = folder / "filler"
filler.write_bytes(bytes(100_000))
store = SQLiteSessions(folder)
session = store.create().id
for _ in range(1000):
    try: said.append(store.append(session, "user", "word " * 200))
    except IOFailureError as full:
        print(full)
        break
assert said and store.path(session) == said
filler.unlink()
said.append(store.append(session, "user", "room again"))
assert store.path(session) == said
store.close()
"""


def test_a_disk_that_is_full_when_a_call_commits_takes_the_next_when_there_is_room(tmp_path: Path) -> None:
    script = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    command = ["unshare", "-Urm", "sh", "-c", SMALL_DISK, str(tmp_path), *script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "make room" in ended.stdout


def test_a_write_that_fails_anywhere_in_a_call_undoes_the_call(store: SQLiteSessions, kept: Session) -> None:
    other = store.create("other")
    store.append(other.id, "user", "a")
    fork = store.fork(kept.id)
    store.append(fork.id, "user", "more")
    store.append(kept.id, "user", "needed by none")

    def everything() -> list[Any]:
        ids = [session.id for session in store.page()]
        return [store.page(), [list(store.tree(id_)) for id_ in ids], store.search("hello")]

    before = everything()
    connection = connection_of(store)
    for statement in ("UPDATE ON messages", "DELETE ON messages", "DELETE ON sessions"):
        connection.execute(
            f"CREATE TEMP TRIGGER failing AFTER {statement} BEGIN SELECT raise(ABORT, 'no'); END"
        )
        with pytest.raises(sqlite3.IntegrityError, match="no"):
            store.remove(kept.id)
        connection.execute("DROP TRIGGER failing")
        assert everything() == before, statement
    store.remove(kept.id)
    assert everything() != before


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
IN_A_READ_ONLY_HOME = """
import sys; from pathlib import Path
from myllm.errors import MyllmError
from myllm.storage.sessions import SQLiteSessions
store, session = SQLiteSessions(Path(sys.argv[1])), sys.argv[2]
def turn():
    with store.turn(session): pass
calls = [store.create, store.page]
if session:
    print([message.content for message in store.path(session)], len(store.search("hello")))
    store.recover()
    calls = [store.create, lambda: store.append(session, "user", "more"), turn]
for call in calls:
    try: call()
    except MyllmError as error: print(type(error).__name__, error)
store.close()
"""


def read_only(home: Path, folder: Path, session: str) -> list[str]:
    """What the script says with `home` on a read-only mount, in a namespace of its own."""
    script = [sys.executable, "-c", IN_A_READ_ONLY_HOME, str(folder), session]
    command = ["unshare", "-Urm", "sh", "-c", READ_ONLY, str(home), *script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_read_only_home_is_read(folder: Path, kept: Session) -> None:
    read, *refused = read_only(folder, folder, kept.id)
    assert read == "['hello'] 1"
    assert [line.split()[0] for line in refused] == ["PermissionDeniedError"] * 2 + ["CannotCreateError"]
    assert "make it writable, or set XDG_STATE_HOME" in refused[0]


def test_a_read_only_home_is_read_beside_one_who_writes(
    folder: Path, store: SQLiteSessions, kept: Session
) -> None:
    store.append(kept.id, "user", "hello again")  # in the journal only
    read, *_ = read_only(folder, folder, kept.id)
    assert read == "['hello', 'hello again'] 2"


def test_a_read_only_home_without_sessions_cannot_get_any(tmp_path: Path, folder: Path) -> None:
    assert [line.split()[0] for line in read_only(tmp_path, folder, "")] == ["CannotCreateError"] * 2
    folder.mkdir()
    assert [line.split()[0] for line in read_only(tmp_path, folder, "")] == ["CannotCreateError"] * 2


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with closing(SQLiteSessions(tmp_path / "file")) as store, pytest.raises(CannotCreateError, match="file"):
        store.create()


# ── cost ────────────────────────────────────────────────────────────────────────────────────


def steps(store: SQLiteSessions, call: Any) -> int:
    """How much SQLite does for a call, in steps of its virtual machine."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1

    with store._file.reading() as reader:
        pass
    writer = connection_of(store)
    for connection in (reader, writer):
        connection.set_progress_handler(step, 1)
    call()
    for connection in (reader, writer):
        connection.set_progress_handler(None, 1)
    return done


def test_the_cost_of_a_turn_does_not_depend_on_the_sessions_length(store: SQLiteSessions) -> None:
    short, long = (store.import_session(*chain(length)).id for length in (60, 6000))
    forks = {id_: store.fork(id_).id for id_ in (short, long)}
    back = {id_: store.path(id_, 2)[0].id for id_ in (short, long)}
    for call in (
        lambda id_: store.path(id_, 50),
        lambda id_: store.append(id_, "user", "hi"),
        lambda id_: store.find(id_),
        lambda id_: store.fork(id_),
        lambda id_: store.move_head(id_, "HEAD"),
        lambda id_: store.move_head(forks[id_], back[id_]),
    ):
        costs = [steps(store, lambda call=call, id_=id_: call(id_)) for id_ in (short, long)]
        assert costs[1] < 1.1 * costs[0] + 20


# ── turns ───────────────────────────────────────────────────────────────────────────────────


def locks_left(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "turns").iterdir())


def test_lock_files_do_not_pile_up(store: SQLiteSessions, folder: Path) -> None:
    for _ in range(5):
        session = store.create()
        with store.turn(session.id):
            assert locks_left(folder) == [f"{session.id}.lock"]
        store.remove(session.id)
    assert locks_left(folder) == []


def test_lock_files_of_the_dead_are_cleared(store: SQLiteSessions, folder: Path) -> None:
    session, removed = store.create(), store.create()
    with store.turn(session.id):
        pass
    for id_ in (session.id, removed.id, "odd"):
        (folder / "turns" / f"{id_}.lock").write_text("")
    store.remove(removed.id)
    store.recover()
    assert locks_left(folder) == []


def test_a_turn_that_ends_well_writes_nothing_more(store: SQLiteSessions) -> None:
    session = store.create()
    with store.turn(session.id):
        store.append(session.id, "user", "a")
        store.append(session.id, "assistant", "b")
        before = connection_of(store).total_changes
    assert connection_of(store).total_changes == before


# ── other processes, and sudden ends ────────────────────────────────────────────────────────

TALK = """
import sys; from pathlib import Path; from myllm.storage.sessions import SQLiteSessions
store = SQLiteSessions(Path(sys.argv[1]))
session = store.find("shared").id
for n in range(30):
    with store.turn(session):
        store.append(session, "user", sys.argv[2])
        store.append(session, "assistant", sys.argv[2])
"""


def test_two_processes_take_turns_in_one_session(store: SQLiteSessions, folder: Path) -> None:
    session = store.create("shared")
    running = [subprocess.Popen([sys.executable, "-c", TALK, folder, name]) for name in ("a", "b")]
    assert [process.wait(60) for process in running] == [0, 0]
    said = [message.content for message in store.path(session.id)]
    assert len(said) == 120
    assert said[::2] == said[1::2], "no turn was broken into"
    assert set(said) == {"a", "b"}


def test_two_processes_make_one_new_store(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from myllm.storage.sessions import SQLiteSessions; "
        "SQLiteSessions(Path(sys.argv[1])).create()"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, folder]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    with closing(SQLiteSessions(folder)) as store:
        assert len({session.id for session in store.page()}) == 3


CHATTER = """
import sys; from dataclasses import replace; from pathlib import Path
from myllm.conversation import State
from myllm.storage.sessions import SQLiteSessions
store, session = SQLiteSessions(Path(sys.argv[1])), sys.argv[2]
def acknowledge(what, message, text):
    print(what, message, text, flush=True)
while True:
    with store.turn(session):
        asked = store.append(session, "user", "question")
        acknowledge("asked", asked.id, "question")
        answer = store.append(session, "assistant", "", state=State.OPEN)
        acknowledge("began", answer.id, "")
        for n in range(1, 4):
            answer = replace(answer, content="word" * n)
            store.write_answer(answer)
            acknowledge("wrote", answer.id, answer.content)
        store.write_answer(replace(answer, state=State.WHOLE))
        acknowledge("ended", answer.id, answer.content)
"""


@dataclass(frozen=True)
class Acknowledged:
    """What the writer said of a message last."""

    what: str
    content: str


def chatter_killed(folder: Path, session: str, after_seconds: float) -> dict[str, Acknowledged]:
    """By message; the last line may have been cut."""
    command = [sys.executable, "-c", CHATTER, str(folder), session]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(after_seconds)
        writer.kill()
        said = first + writer.stdout.read()
    lines = [line.decode().split(" ") for line in said.split(b"\n")[:-1]]
    return {message: Acknowledged(what, content) for what, message, content in lines}


def check_kept(store: SQLiteSessions, session: str, acknowledged: dict[str, Acknowledged]) -> None:
    path = store.path(session)
    kept = {message.id: message for message in path}
    for id_, said in acknowledged.items():
        assert kept[id_].content.startswith(said.content)
        if said.what == "ended":
            assert kept[id_].state is State.WHOLE
    unfinished = [message for message in path if message.state is not State.WHOLE]
    assert len(unfinished) <= 1
    assert unfinished in ([], path[-1:]), "only the turn that was under way"
    assert all(message.state is not State.OPEN for message in path)


@pytest.mark.parametrize("n_kills", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_writer_killed_at_any_moment_loses_nothing_it_acknowledged(folder: Path, n_kills: int) -> None:
    chance = random.Random(7)
    cut = 0
    for _ in range(n_kills):
        with closing(SQLiteSessions(folder)) as store:
            session = store.create().id
        acknowledged = chatter_killed(folder, session, chance.uniform(0, 0.05))
        assert acknowledged
        with closing(SQLiteSessions(folder)) as store:
            store.recover()
            check_kept(store, session, acknowledged)
            cut += store.path(session)[-1].state is not State.WHOLE
            with store._file.reading() as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert cut, "no turn was under way at any kill"
    assert locks_left(folder) == []
