"""What every session store must do: the seam's own test suite. A second store is a second `Backing`."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from myllm.conversation import Message, Session, State
from myllm.errors import BadDataError, NotFoundError, TryAgainError, UsageError
from myllm.storage.session_store import HEAD, LONGEST_NAME, Hit, SessionStore
from myllm.storage.sessions import SQLiteSessions, sessions_file

NOON = 1_700_000_000.0


class Backing(Protocol):
    """Where a kind of store keeps things, in `folder` as far as it needs one."""

    source: str
    """Python that makes `store` in another process, `folder` being its first argument."""

    def __init__(self, folder: Path) -> None: ...

    def open(self, now: Callable[[], float] = time.time) -> SessionStore:
        """A store on the same sessions each time, as another process would have it."""

    def check(self) -> None:
        """Raises where what is kept is not whole, by the backing's own means; all stores are closed."""


class SQLiteBacking:
    source = (
        "import sys; from pathlib import Path; from myllm.storage.sessions import SQLiteSessions; "
        "store = SQLiteSessions(Path(sys.argv[1]))"
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, now: Callable[[], float] = time.time) -> SessionStore:
        return SQLiteSessions(self.folder, now=now)

    def check(self) -> None:
        connection = sqlite3.connect(sessions_file(self.folder))
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.execute(
            "INSERT INTO words (words, rank) VALUES ('integrity-check', 1)"
        )  # against messages
        connection.close()


BACKINGS: dict[str, type[Backing]] = {"sqlite": SQLiteBacking}


@pytest.fixture(params=BACKINGS)
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backing]:
    backing = BACKINGS[request.param](tmp_path / "store")
    yield backing
    backing.check()


@dataclass
class Clock:
    """Passes a second at every look."""

    seconds: float = NOON

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(backing: Backing, clock: Clock) -> Iterator[SessionStore]:
    store = backing.open(clock)
    yield store
    store.close()


@pytest.fixture
def other(backing: Backing) -> Iterator[SessionStore]:
    """A second one on the same sessions."""
    other = backing.open()
    yield other
    other.close()


def say(store: SessionStore, session: Session, *texts: str) -> list[Message]:
    """A user's and an assistant's messages by turns."""
    return [store.append(session.id, ("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]


def texts(messages: Iterator[Message] | list[Message]) -> list[str]:
    return [message.content for message in messages]


def states(store: SessionStore, session: Session) -> list[State]:
    return [message.state for message in store.path(session.id)]


# ── values ──────────────────────────────────────────────────────────────────────────────────

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.dictionaries(text, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text, max_size=3)
facts = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool"]),
        "content": text,
        "state": st.sampled_from(State),
        "reasoning": text,
        "extra": values,
        "tokens": st.dictionaries(text, st.integers(0, 2**31), max_size=2),
        "answer": values,
    }
)


@given(facts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_message_comes_back_as_it_was_given(store: SessionStore, given: dict[str, Any]) -> None:
    session = store.create()
    message = store.append(session.id, **given)
    assert {name: getattr(message, name) for name in given} == given
    assert store.path(session.id) == list(store.tree(session.id)) == [message]


@given(model=st.none() | text, system=st.none() | text, settings=values, directory=st.none() | text)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_session_comes_back_as_it_was_made(store: SessionStore, **given: Any) -> None:
    session = store.create(**given)
    assert {name: getattr(session, name) for name in given} == given
    assert store.find(session.id) == session


def test_half_a_character_does_not_lose_the_message(store: SessionStore) -> None:
    session = store.create(system="\ud800!")
    message = store.append(session.id, "user", "caf\udce9", extra={"name": "\ud800"})
    assert (session.system, message.content) == ("\ufffd!", "caf\ufffd")


# ── finding sessions ────────────────────────────────────────────────────────────────────────


def test_a_session_is_found_by_name_by_id_and_by_the_beginning_of_its_id(store: SessionStore) -> None:
    session, _ = store.create("work"), store.create("works")
    for wanted in ("work", session.id, session.id.upper(), session.id[:7]):
        assert store.find(wanted) == session


def test_a_name_goes_before_an_id(store: SessionStore) -> None:
    first = store.create()
    second = store.create(first.id)
    assert store.find(first.id) == second


def test_the_beginning_of_several_ids_is_refused_with_them(store: SessionStore) -> None:
    ids = [store.create().id for _ in range(2)]
    with pytest.raises(UsageError, match=f"{ids[0]}, {ids[1]}"):
        store.find(ids[0][:4])


@pytest.mark.parametrize("length", [1, 3])
def test_a_few_characters_of_an_id_name_nothing(store: SessionStore, length: int) -> None:
    session = store.create()
    with pytest.raises(NotFoundError):
        store.find(session.id[:length])


def test_what_is_not_found_is_said_with_the_nearest_names(store: SessionStore) -> None:
    for name in ("work", "works", "holiday"):
        store.create(name)
    with pytest.raises(NotFoundError, match=r"'wrok'.*did you mean work, works\?"):
        store.find("wrok")


@pytest.mark.parametrize("wanted", ["", "%", "zzzz", "0000000000", "no such", "'; --", "ilou", "\0"])
def test_anything_may_be_looked_for(store: SessionStore, wanted: str) -> None:
    store.create("work")
    with pytest.raises(NotFoundError):
        store.find(wanted)


def test_owners_do_not_see_each_others_sessions(store: SessionStore) -> None:
    ours, theirs = store.create("work"), store.create("work", owner="key")
    say(store, theirs, "secret")
    assert store.find("work") == ours
    assert store.find("work", owner="key").id == theirs.id
    with pytest.raises(NotFoundError):
        store.find(theirs.id)
    assert store.last() == ours
    assert store.page() == [ours]
    assert store.search("secret") == []
    assert len(store.search("secret", owner="key")) == 1


def test_the_last_is_the_one_changed_last_and_one_of_the_directory_first(store: SessionStore) -> None:
    assert store.last() is None
    here, there = store.create(directory="/here"), store.create(directory="/there")
    assert store.last() == there
    assert store.last(directory="/here") == here
    assert store.last(directory="/elsewhere") == there
    say(store, here, "hello")
    last = store.last()
    assert last is not None
    assert last.id == here.id


def test_pages_are_cut_anywhere_and_hold_each_session_once(store: SessionStore) -> None:
    made = [store.create().id for _ in range(7)]
    for limit in (1, 3, 7, 10):
        pages: list[Session] = []
        while page := store.page(limit=limit, after=pages[-1] if pages else None):
            assert len(page) <= limit
            pages += page
        assert [session.id for session in pages] == made[::-1]


def test_pages_hold_also_sessions_of_one_instant(backing: Backing) -> None:
    store = backing.open(lambda: NOON)
    made = [store.create().id for _ in range(3)]
    first = store.page(limit=2)
    assert [session.id for session in first + store.page(limit=2, after=first[-1])] == made[::-1]
    store.close()


def test_a_page_is_narrowed(store: SessionStore) -> None:
    a = store.create(model="m", directory="/a")
    b = store.create(model="m", directory="/b")
    c = store.create(model="n", directory="/a")
    assert store.page(model="m") == [b, a]
    assert store.page(directory="/a") == [c, a]
    assert store.page(model="m", directory="/a") == [a]
    assert store.page(updated_before=b.updated) == [a]
    assert store.page(updated_since=b.updated) == [c, b]
    assert store.page(updated_since=b.updated, after=c) == [b]


def test_a_change_brings_a_session_to_the_front(store: SessionStore) -> None:
    session = store.create("a")
    message = store.append(session.id, "assistant", "hel", state=State.OPEN)
    changes: list[Callable[[], object]] = [
        lambda: store.append(session.id, "user", "hi"),
        lambda: store.rename(session.id, "b"),
        lambda: store.update(replace(session, model="m")),
        lambda: store.move_head(session.id, message.id),
        lambda: store.write_answer(replace(message, content="hello", state=State.WHOLE)),
    ]
    for change in changes:
        store.create()
        change()
        last = store.last()
        assert last is not None
        assert last.id == session.id


# ── names ───────────────────────────────────────────────────────────────────────────────────

BAD_NAMES = [
    "",
    " ",
    " a",
    "a ",
    "a/b",
    "a\nb",
    "\x1b[2J",
    "a\x00b",
    "\u202egnp.exe",
    "a" * (LONGEST_NAME + 1),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_wherever_one_is_given(store: SessionStore, name: str) -> None:
    session = store.create()
    given: list[Callable[[], object]] = [
        lambda: store.create(name),
        lambda: store.rename(session.id, name),
        lambda: store.fork(session.id, name=name),
        lambda: store.import_session(replace(session, name=name), []),
    ]
    for give in given:
        with pytest.raises(UsageError) as refused:
            give()
        assert str(refused.value).isprintable()
    assert store.page() == [session]


@pytest.mark.parametrize("name", ["a", "Größe 2", "日本", "-x", "a.b", "HEAD", "'", "a" * LONGEST_NAME])
def test_other_names_are_taken(store: SessionStore, name: str) -> None:
    assert store.create(name) == store.find(name)


def test_a_name_is_given_once(store: SessionStore) -> None:
    work, other = store.create("work"), store.create("other")
    given: list[Callable[[], object]] = [
        lambda: store.create("work"),
        lambda: store.rename(other.id, "work"),
        lambda: store.fork(work.id, name="work"),
        lambda: store.import_session(work, []),
    ]
    for give in given:
        with pytest.raises(UsageError, match=f"'work'.*taken by session {work.id}"):
            give()
    assert store.page() == [other, work]


def test_a_name_is_changed_taken_away_and_free_again(store: SessionStore) -> None:
    session = store.create("a")
    assert store.rename(session.id, "a").name == "a"
    assert store.rename(session.id, "b").name == "b"
    with pytest.raises(NotFoundError):
        store.find("a")
    assert store.rename(session.id, None).name is None
    assert store.create("b").name == "b"


def test_update_keeps_what_a_session_is_carried_on_with_and_nothing_else(store: SessionStore) -> None:
    session = store.create("a")
    say(store, session, "hello")
    stale = replace(session, name="b", owner="x", head=None, model="m", system="s", settings={"seed": 7})
    updated = store.update(stale)
    assert (updated.model, updated.system, updated.settings) == ("m", "s", {"seed": 7})
    assert (updated.name, updated.owner, updated.n_messages) == ("a", "local", 1)
    assert store.update(replace(updated, system=None)).system is None


# ── ids ─────────────────────────────────────────────────────────────────────────────────────


def test_ids_sort_in_the_order_of_making_whatever_the_clock_does(backing: Backing) -> None:
    clock = iter([NOON, NOON + 9e6, NOON, NOON, 0.0, -5.0, NOON + 9e7, 1e15, NOON] * 3)
    store = backing.open(lambda: next(clock))
    sessions = [store.create().id for _ in range(9)]
    store.close()
    clock = iter([value for value in [NOON, NOON + 9e6, NOON, NOON, 0.0, -5.0, 1e15, NOON] for _ in range(2)])
    store = backing.open(lambda: next(clock))
    messages = [store.append(sessions[0], "user", "hi").id for _ in range(8)]
    store.close()
    assert sessions == sorted(set(sessions))
    assert messages == sorted(set(messages))


def test_an_id_is_not_given_out_again(backing: Backing) -> None:
    times = iter([NOON + 1e6])
    store = backing.open(lambda: next(times, NOON))
    removed = store.create()
    store.remove(removed.id)
    assert store.create().id > removed.id
    store.close()


# ── the tree ────────────────────────────────────────────────────────────────────────────────


def test_messages_follow_the_head(store: SessionStore) -> None:
    session = store.create()
    messages = say(store, session, "a", "b", "c")
    assert [message.parent for message in messages] == [None, messages[0].id, messages[1].id]
    assert store.path(session.id) == messages
    found = store.find(session.id)
    assert (found.head, found.n_messages) == (messages[2].id, 3)


def test_the_newest_of_a_path_are_given_oldest_first(store: SessionStore) -> None:
    session = store.create()
    messages = say(store, session, *"abcde")
    for newest in (0, 1, 3, 5, 9):
        assert store.path(session.id, newest) == messages[max(0, 5 - newest) :]


def test_an_edit_and_a_retry_keep_what_was(store: SessionStore) -> None:
    session = store.create()
    a, b, c, d = say(store, session, *"abcd")
    retried = store.append(session.id, "assistant", "d2", parent=c.id)
    assert texts(store.path(session.id)) == ["a", "b", "c", "d2"]
    store.append(session.id, "user", "c2", parent=b.id)
    assert texts(store.path(session.id)) == ["a", "b", "c2"]
    first = store.append(session.id, "user", "a2", parent=None)
    assert store.path(session.id) == [first]
    assert set(texts(store.tree(session.id))) == {"a", "b", "c", "d", "d2", "c2", "a2"}
    store.move_head(session.id, retried.id)
    assert store.path(session.id) == [a, b, c, retried]
    assert store.move_head(session.id, d.id).n_messages == 4
    assert store.move_head(session.id, HEAD).head == d.id


def test_everything_can_be_undone(store: SessionStore) -> None:
    session = store.create()
    say(store, session, "a", "b")
    emptied = store.move_head(session.id, None)
    assert (emptied.head, emptied.n_messages, store.path(session.id)) == (None, 0, [])
    assert texts(store.tree(session.id)) == ["a", "b"]


def test_another_sessions_message_is_no_place_to_go_on_from(store: SessionStore) -> None:
    session, stranger = store.create(), store.create()
    say(store, session, "a")
    (theirs,) = say(store, stranger, "b")
    missing = "0" * len(theirs.id)
    for message in (theirs.id, missing, "no id", ""):
        for place in (
            lambda at: store.append(session.id, "user", "c", parent=at),
            lambda at: store.move_head(session.id, at),
            lambda at: store.fork(session.id, at),
        ):
            with pytest.raises(NotFoundError):
                place(message)
    assert texts(store.path(session.id)) == ["a"]


@pytest.mark.parametrize("session", ["0000000000", "../../etc", "", "work"])
def test_a_session_that_is_not_there_is_not_found(store: SessionStore, session: str) -> None:
    store.create("work")
    stranger = Session(id=session, name=None, created=0, updated=0)
    calls: list[Callable[[], object]] = [
        lambda: store.rename(session, "a"),
        lambda: store.update(stranger),
        lambda: store.fork(session),
        lambda: store.remove(session),
        lambda: store.path(session),
        lambda: list(store.tree(session)),
        lambda: store.append(session, "user", "a"),
        lambda: store.move_head(session, None),
        lambda: store.turn(session).__enter__(),
    ]
    for call in calls:
        with pytest.raises(NotFoundError):
            call()


def test_a_long_tree_comes_in_order_while_it_grows(store: SessionStore) -> None:
    ids = [f"m{n}" for n in range(1100)]
    links = imported_messages(*zip(ids, [None, *ids], strict=False))
    session = store.import_session(replace(FOREIGN, head=ids[-1]), links)
    trunk = store.path(session.id)
    fork = store.fork(session.id, trunk[1049].id)
    branch = say(store, fork, "x", "y")
    tree = store.tree(fork.id)
    first = next(tree)
    say(store, session, "later")
    assert [first, *tree] == [*trunk[:1050], *branch]


def test_a_message_is_found_by_the_beginning_of_its_id_in_its_session(store: SessionStore) -> None:
    session, stranger = store.create("work"), store.create()
    a, b, c = say(store, session, *"abc")
    (theirs,) = say(store, stranger, "d")
    fork = store.fork(session.id, b.id)
    e = store.append(fork.id, "user", "e")
    for message in (a, b, c):
        assert store.find_message(session.id, message.id) == message
        assert store.find_message(session.id, message.id[:7]) == message
    assert [store.find_message(fork.id, message.id[:7]) for message in (a, b, e)] == [a, b, e]
    for wanted in (c.id, theirs.id, "", "work", "zzzz"):
        with pytest.raises(NotFoundError):
            store.find_message(fork.id, wanted)
    with pytest.raises(UsageError, match=f"{a.id}, {b.id}"):
        store.find_message(fork.id, a.id[:4])


# ── forks ───────────────────────────────────────────────────────────────────────────────────


def test_a_fork_goes_on_from_any_message_and_knows_where_it_comes_from(store: SessionStore) -> None:
    session = store.create("a", model="m", system="s", settings={"seed": 1}, directory="/d", owner="key")
    a, b, _, _ = say(store, session, *"abcd")
    fork = store.fork(session.id, b.id, "b")
    assert (fork.name, fork.parent, fork.forked_at, fork.head) == ("b", session.id, b.id, b.id)
    assert fork.n_messages == 2
    for name in ("model", "system", "settings", "directory", "owner"):
        assert getattr(fork, name) == getattr(session, name)
    e = store.append(fork.id, "user", "e")
    assert store.path(fork.id) == list(store.tree(fork.id)) == [a, b, e]
    assert texts(store.tree(session.id)) == list("abcd")
    assert store.fork(session.id).n_messages == 4
    assert store.fork(session.id, None).head is None


def test_a_fork_goes_back_behind_its_beginning_but_not_elsewhere(store: SessionStore) -> None:
    session = store.create()
    a, b, c, d = say(store, session, *"abcd")
    fork = store.fork(session.id, c.id)
    assert store.move_head(fork.id, a.id).head == a.id
    store.append(fork.id, "user", "b2")
    assert texts(store.path(fork.id)) == ["a", "b2"]
    second = store.fork(fork.id, b.id)
    assert texts(store.tree(second.id)) == ["a", "b"]
    with pytest.raises(NotFoundError):
        store.move_head(fork.id, d.id)


def test_an_empty_session_can_be_forked(store: SessionStore) -> None:
    session = store.create()
    fork = store.fork(session.id)
    assert (fork.parent, fork.forked_at, store.path(fork.id)) == (session.id, None, [])


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["oldest first", "newest first"])
def test_forks_inherit_what_they_need_of_removed_sessions(store: SessionStore, order: slice) -> None:
    session = store.create()
    a, b, _, _ = say(store, session, *"abcd")
    fork = store.fork(session.id, b.id)
    say(store, fork, "e")
    second = store.fork(fork.id, a.id)
    third = store.fork(fork.id)
    for removed in (session, fork)[order]:
        store.remove(removed.id)
        with pytest.raises(NotFoundError):
            store.find(removed.id)
    assert texts(store.path(second.id)) == texts(store.tree(second.id)) == ["a"]
    assert texts(store.path(third.id)) == texts(store.tree(third.id)) == ["a", "b", "e"]
    assert (third.parent, store.find(third.id).parent) == (fork.id, fork.id)
    assert {hit.message for hit in store.search("a")} == {a.id}
    assert store.search("c") == []
    store.remove(third.id)
    assert texts(store.path(second.id)) == ["a"]
    assert store.search("b") == []


@dataclass
class Modelled:
    """A session in plain Python."""

    tree: set[str] = field(default_factory=set)
    head: str | None = None


class Trees(RuleBasedStateMachine):
    """Trees, heads, forks and removals, side by side with dictionaries."""

    kind: type[Backing]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.backing = self.kind(Path(self.folder.name))
        self.store = self.backing.open()
        self.sessions: dict[str, Modelled] = {}
        self.parents: dict[str, str | None] = {}
        self.said = 0

    def teardown(self) -> None:
        self.store.close()
        self.backing.check()
        self.folder.cleanup()

    def up(self, message: str | None) -> list[str]:
        """From a message to its root."""
        path: list[str] = []
        while message is not None:
            path.append(message)
            message = self.parents[message]
        return path

    def pick(self, data: st.DataObject) -> tuple[str, Modelled]:
        session = data.draw(st.sampled_from(list(self.sessions)))
        return session, self.sessions[session]

    def place(self, data: st.DataObject, session: Modelled) -> str | None:
        """In the order of making: ids have chance in them, and hypothesis must not see it."""
        return data.draw(st.sampled_from([HEAD, None, *(m for m in self.parents if m in session.tree)]))

    @rule()
    def create(self) -> None:
        self.sessions[self.store.create().id] = Modelled()

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        if not self.sessions:
            return
        id_, session = self.pick(data)
        parent = self.place(data, session)
        message = self.store.append(id_, "user", f"word n{self.said}", parent=parent).id
        self.said += 1
        self.parents[message] = session.head if parent == HEAD else parent
        session.tree.add(message)
        session.head = message

    @rule(data=st.data())
    def move_head(self, data: st.DataObject) -> None:
        if self.sessions:
            id_, session = self.pick(data)
            if (to := self.place(data, session)) != HEAD:
                self.store.move_head(id_, to)
                session.head = to

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if self.sessions:
            id_, session = self.pick(data)
            at = self.place(data, session)
            head = session.head if at == HEAD else at
            self.sessions[self.store.fork(id_, at).id] = Modelled(set(self.up(head)), head)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.sessions:
            id_, _ = self.pick(data)
            self.store.remove(id_)
            del self.sessions[id_]

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        """Export and import; its ids exist, so it gets new ones."""
        if not self.sessions:
            return
        id_, session = self.pick(data)
        before = list(self.store.tree(id_))
        copy = self.store.import_session(self.store.find(id_), before)
        after = list(self.store.tree(copy.id))
        assert texts(before) == texts(after)
        new = {old.id: message.id for old, message in zip(before, after, strict=True)}
        self.parents |= {new[old.id]: new[old.parent] if old.parent else None for old in before}
        self.sessions[copy.id] = Modelled(set(new.values()), new[session.head] if session.head else None)

    @invariant()
    def all_is_as_modelled(self) -> None:
        assert {session.id for session in self.store.page(limit=1000)} == set(self.sessions)
        for id_, session in self.sessions.items():
            path = [message.id for message in self.store.path(id_)]
            assert path == self.up(session.head)[::-1]
            assert self.store.path(id_, 2) == self.store.path(id_)[-2:]
            tree = list(self.store.tree(id_))
            assert [message.id for message in tree] == sorted(session.tree)
            assert {message.id: message.parent for message in tree} == {
                m: self.parents[m] for m in session.tree
            }
            found = self.store.find(id_)
            assert (found.head, found.n_messages) == (session.head, len(path))
        kept = set().union(*(session.tree for session in self.sessions.values()))
        assert {hit.message for hit in self.store.search("word", limit=1000)} == kept


@pytest.mark.parametrize("kind", BACKINGS.values(), ids=BACKINGS)
def test_trees_are_as_a_plain_model_says(kind: type[Backing]) -> None:
    how = settings(deadline=None, max_examples=30, stateful_step_count=25)
    run_state_machine_as_test(type("TreesOfKind", (Trees,), {"kind": kind}), settings=how)


# ── answers and turns ───────────────────────────────────────────────────────────────────────


def test_an_answer_is_kept_while_it_is_written_and_ends_once(store: SessionStore) -> None:
    session = store.create()
    say(store, session, "hi")
    answer = store.append(session.id, "assistant", "", state=State.OPEN)
    store.write_answer(replace(answer, content="hel"))
    assert store.path(session.id)[1] == replace(answer, content="hel")
    ended = replace(
        answer,
        content="hello",
        state=State.WHOLE,
        reasoning="greet",
        extra={"tool_calls": []},
        tokens={"t": 2},
        answer={"model": "m", "finish_reason": "stop", "usage": {"completion_tokens": 2}},
    )
    store.write_answer(replace(ended, role="user", parent=None, created=0.0))  # its place stays
    assert store.path(session.id)[1] == ended
    with pytest.raises(UsageError, match="whole"):
        store.write_answer(replace(ended, content="other"))
    assert store.path(session.id)[1] == ended


def test_an_answer_of_a_removed_session_is_not_found(store: SessionStore) -> None:
    session = store.create()
    answer = store.append(session.id, "assistant", "", state=State.OPEN)
    store.remove(session.id)
    with pytest.raises(NotFoundError):
        store.write_answer(replace(answer, state=State.WHOLE))


def test_a_turns_end_cuts_what_is_open_and_fails_what_is_unanswered(store: SessionStore) -> None:
    session = store.create()
    with store.turn(session.id):
        say(store, session, "a")
        store.append(session.id, "assistant", "b", state=State.OPEN)
        assert states(store, session) == [State.WHOLE, State.OPEN]
    assert states(store, session) == [State.WHOLE, State.CUT]

    def fail() -> None:
        with store.turn(session.id):
            say(store, session, "c")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert states(store, session) == [State.WHOLE, State.CUT, State.FAILED]


def test_a_turns_end_leaves_what_has_ended(store: SessionStore) -> None:
    session = store.create()
    with store.turn(session.id):
        for role in ("user", "user", "assistant", "tool", "assistant"):
            store.append(session.id, role, "a")
        answer = store.append(session.id, "assistant", "", state=State.OPEN)
        store.write_answer(replace(answer, state=State.WHOLE))
    assert set(states(store, session)) == {State.WHOLE}


def test_an_imported_question_is_not_failed_by_a_later_turn(store: SessionStore) -> None:
    session = store.create()
    say(store, session, "why?")
    imported = store.import_session(*exported(store, session.id))
    with store.turn(imported.id):
        pass
    assert states(store, imported) == [State.WHOLE]


def test_a_turn_in_one_session_keeps_out_another_there_and_none_elsewhere(
    store: SessionStore, other: SessionStore
) -> None:
    session, second = store.create(), store.create()
    with store.turn(session.id):
        with pytest.raises(TryAgainError, match=session.id), other.turn(session.id, wait_seconds=0.1):
            pass
        with pytest.raises(TryAgainError), store.turn(session.id, wait_seconds=0.1):
            pass
        with other.turn(second.id, wait_seconds=0):
            pass
    with other.turn(session.id, wait_seconds=0):
        pass


def test_a_turn_begins_when_the_one_before_ends(store: SessionStore, other: SessionStore) -> None:
    session = store.create()
    order = []

    def wait() -> None:
        with other.turn(session.id):
            order.append("second")

    with store.turn(session.id):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


DYING = """
import os
from myllm.conversation import State
session = sys.argv[2]
with store.turn(session):
    store.append(session, "user", "a")
    if sys.argv[3] == "answering":
        answer = store.append(session, "assistant", "b", state=State.OPEN)
    os._exit(0)
"""


def die_in_turn(backing: Backing, folder: Path, session: Session, while_: str) -> None:
    script = f"{backing.source}\n{DYING}"
    subprocess.run([sys.executable, "-c", script, str(folder), session.id, while_], check=True)


@pytest.mark.parametrize(
    ("while_", "left"), [("asking", [State.FAILED]), ("answering", [State.WHOLE, State.CUT])]
)
@pytest.mark.parametrize("by", ["recover", "turn"])
def test_what_a_dead_process_left_is_found(
    backing: Backing, store: SessionStore, tmp_path: Path, while_: str, left: list[State], by: str
) -> None:
    session = store.create()
    die_in_turn(backing, tmp_path / "store", session, while_)
    assert not set(left) & {State.CUT, State.FAILED} & set(states(store, session))
    if by == "recover":
        store.recover()
    else:
        with store.turn(session.id):
            assert states(store, session) == left
    assert states(store, session) == left
    assert len(store.search("b")) == (while_ == "answering")


def test_what_a_living_process_does_is_left_alone(store: SessionStore, other: SessionStore) -> None:
    session = store.create()
    with store.turn(session.id):
        say(store, session, "a")
        answer = store.append(session.id, "assistant", "b", state=State.OPEN)
        began = time.monotonic()
        other.recover()
        assert time.monotonic() - began < 5
        assert states(store, session) == [State.WHOLE, State.OPEN]
        store.write_answer(replace(answer, state=State.WHOLE))
    assert states(store, session) == [State.WHOLE, State.WHOLE]


# ── search ──────────────────────────────────────────────────────────────────────────────────


def found(hits: list[Hit]) -> list[str]:
    return ["".join(hit.snippet) for hit in hits]


def test_words_are_found_in_any_case_and_with_any_accents(store: SessionStore) -> None:
    session = store.create("work")
    (message, _) = say(store, session, "The Café, by the river", "Which river?")
    for words in ("cafe", "CAFÉ river", "river  cafe", "cafe\u0301", "café, the"):
        assert found(store.search(words)) == ["The Café, by the river"], words
    (hit,) = store.search("cafe")
    assert hit == (
        session.id,
        "work",
        message.id,
        "user",
        message.created,
        ("The ", "Café", ", by the river"),
    )
    assert store.search("riv") == store.search("cafe which") == []


def test_newest_or_best_come_first(store: SessionStore) -> None:
    session = store.create()
    say(store, session, "tea tea tea", "tea with much and much and much milk", "coffee")
    assert found(store.search("tea")) == ["tea with much and much and much milk", "tea tea tea"]
    assert found(store.search("tea", order="best")) == ["tea tea tea", "tea with much and much and much milk"]
    assert found(store.search("tea", limit=1)) == ["tea with much and much and much milk"]
    assert found(store.search("tea", order="best", limit=1)) == ["tea tea tea"]


def test_a_snippet_shows_where_the_words_are(store: SessionStore) -> None:
    session = store.create()
    say(store, session, " ".join(["before"] * 500 + ["needle"] + ["after"] * 500))
    (hit,) = store.search("needle")
    assert hit.snippet[1::2] == ("needle",)
    assert len("".join(hit.snippet)) < 300


def test_an_answer_is_found_when_it_has_ended(store: SessionStore) -> None:
    session = store.create()
    answer = store.append(session.id, "assistant", "hel", state=State.OPEN)
    store.write_answer(replace(answer, content="hello wor"))
    assert store.search("hello") == []
    store.write_answer(replace(answer, content="hello world", state=State.CUT))
    assert store.search("wor") == []
    assert found(store.search("hello")) == ["hello world"]


@given(st.text(max_size=12) | st.text("\"'*^():{}+-~\0\\ANDORNEARab \n", max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_no_character_of_a_query_is_special(store: SessionStore, words: str) -> None:
    if not store.page():
        say(store, store.create(), "a AND b OR c NEAR d NOT content: ab")
    for order in ("newest", "best"):
        for hit in store.search(words, order=order):  # type: ignore[arg-type]
            assert any(hit.snippet[1::2]), "nothing was marked"


def test_operators_are_words(store: SessionStore) -> None:
    say(store, store.create(), "salt and pepper", "salt")
    assert found(store.search("salt AND pepper")) == ["salt and pepper"]
    assert store.search("salt NOT pepper") == store.search("salt OR vinegar") == store.search("peppe*") == []
    assert found(store.search('"pepper (salt')) == ["salt and pepper"]


# ── export and import ───────────────────────────────────────────────────────────────────────


def exported(store: SessionStore, session: str) -> tuple[Session, list[Message]]:
    found = store.find(session)
    return found, list(store.tree(found.id))


@pytest.fixture
def elsewhere(backing: Backing, clock: Clock, tmp_path: Path) -> Iterator[SessionStore]:
    """A store of the same kind, on another machine."""
    elsewhere = type(backing)(tmp_path / "elsewhere").open(clock)
    yield elsewhere
    elsewhere.close()


def test_import_gives_back_all_of_an_export(store: SessionStore, elsewhere: SessionStore) -> None:
    origin = store.create("origin")
    a, b = say(store, origin, "a", "b")
    session = store.fork(origin.id, b.id, "work")
    store.update(replace(session, model="m", system="s", settings={"seed": 1}))
    store.append(session.id, "assistant", "c", state=State.CUT, tokens={"t": 1}, answer={"seed": 7})
    store.append(session.id, "user", "d", parent=a.id, state=State.FAILED, extra={"name": "x"})
    whole = exported(store, session.id)
    assert len(whole[1]) == 4
    elsewhere.import_session(*whole)
    assert exported(elsewhere, "work") == whole


def test_imported_forks_share_again_what_they_shared(store: SessionStore, elsewhere: SessionStore) -> None:
    origin = store.create("origin")
    _, b = say(store, origin, "a", "b")
    fork = store.fork(origin.id, b.id, "fork")
    c = store.append(fork.id, "user", "c")
    second = store.fork(fork.id, c.id, "second")
    store.append(second.id, "assistant", "d")
    say(store, origin, "e")
    whole = [exported(store, name) for name in ("origin", "fork", "second")]
    for each in whole:
        elsewhere.import_session(*each)
    assert [exported(elsewhere, name) for name in ("origin", "fork", "second")] == whole
    elsewhere.remove(origin.id)
    assert texts(elsewhere.path(second.id)) == ["a", "b", "c", "d"]
    copy = elsewhere.import_session(replace(whole[2][0], name="copy"), whole[2][1])
    assert [message.id for message in elsewhere.tree(copy.id)][:3] == [message.id for message in whole[2][1]][
        :3
    ]


def test_an_imported_fork_shares_nothing_that_is_not_the_same(store: SessionStore) -> None:
    origin = store.create("origin")
    a, b = say(store, origin, "a", "b")
    fork = store.fork(origin.id, b.id, "fork")
    session, messages = exported(store, fork.id)
    forged = [replace(messages[0], content="forged"), *messages[1:]]
    copy = store.import_session(replace(session, name="copy"), forged)
    assert texts(store.path(copy.id)) == ["forged", "b"]
    assert texts(store.path(origin.id)) == ["a", "b"]
    assert not {message.id for message in store.path(copy.id)} & {a.id, b.id}


def test_an_import_of_what_is_there_is_a_second_session_with_new_ids(store: SessionStore) -> None:
    session = store.create(directory="/d")
    a, _ = say(store, session, "a", "b")
    store.append(session.id, "assistant", "b2", parent=a.id)
    before = exported(store, session.id)
    copy, messages = exported(store, store.import_session(*before).id)
    assert exported(store, session.id) == before
    ids = [session.id, copy.id, *(message.id for message in before[1] + messages)]
    assert len(ids) == len(set(ids))
    assert texts(messages) == ["a", "b", "b2"]
    assert [message.parent for message in messages] == [None, messages[0].id, messages[0].id]
    assert replace(copy, id=session.id, head=session.head) == replace(before[0], head=session.head)
    assert texts(store.path(copy.id)) == ["a", "b2"]


def imported_messages(*links: tuple[str, str | None]) -> list[Message]:
    return [Message(id=id_, parent=up, role="user", content=id_, created=NOON) for id_, up in links]


FOREIGN = Session(
    id="1b2c-uuid", name=None, created=5.0, updated=6.0, extra={"source": "other", "title": "T"}
)


def test_ids_of_another_kind_are_made_anew(store: SessionStore) -> None:
    tree = imported_messages(("x/1", None), ("x/2", "x/1"), ("x/3", "x/1"))
    session = store.import_session(replace(FOREIGN, head="x/2", forked_at="x/1", parent="x"), tree)
    assert texts(store.path(session.id)) == ["x/1", "x/2"]
    assert texts(store.tree(session.id)) == ["x/1", "x/2", "x/3"]
    assert (session.created, session.updated, session.extra) == (5.0, 6.0, FOREIGN.extra)
    assert session.forked_at == store.path(session.id)[0].id


@pytest.mark.parametrize("id_", ["zzzzzzzzzz", "1zzzzzzzzz"])
def test_an_id_of_the_far_future_is_not_kept(store: SessionStore, id_: str) -> None:
    session = store.import_session(replace(FOREIGN, id=id_), imported_messages((id_, None)))
    (message,) = store.tree(session.id)
    for later in (store.create().id, store.append(session.id, "user", "hi").id):
        assert later < id_
    assert session.id != id_ != message.id


def test_an_open_answer_is_imported_as_cut(store: SessionStore) -> None:
    (message,) = imported_messages(("a", None))
    session = store.import_session(FOREIGN, [replace(message, role="assistant", state=State.OPEN)])
    (imported,) = store.tree(session.id)
    assert imported.state is State.CUT


@pytest.mark.parametrize(
    ("links", "head"),
    [
        ([("b", "a"), ("a", None)], "a"),
        ([("a", "a")], "a"),
        ([("a", "b"), ("b", "a")], "a"),
        ([("a", None), ("a", None)], "a"),
        ([("a", None)], "b"),
        ([], "a"),
        ([("a", "")], "a"),
    ],
    ids=str,
)
def test_what_is_no_tree_is_refused_whole(
    store: SessionStore, links: list[tuple[str, str | None]], head: str
) -> None:
    for session in (replace(FOREIGN, head=head), replace(FOREIGN, forked_at=head)):
        with pytest.raises(BadDataError):
            store.import_session(session, imported_messages(*links))
    assert store.page() == []


def test_an_import_that_breaks_off_leaves_nothing(store: SessionStore) -> None:
    def broken() -> Iterator[Message]:
        yield from imported_messages(("a", None))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.import_session(FOREIGN, broken())
    assert store.page() == []
    assert store.search("a") == []


# ── threads ─────────────────────────────────────────────────────────────────────────────────


def test_threads_share_a_store(store: SessionStore) -> None:
    session = store.create()

    def talk() -> None:
        for _ in range(20):
            store.append(session.id, "user", "hi")
            store.path(session.id)
            store.search("hi")

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.find(session.id).n_messages == 80
