"""Turns in sessions, whatever happens to who keeps them: what was acknowledged is there, the rest marked."""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import orjson

from myllm import paths
from myllm.conversation import Message, State
from myllm.errors import UnavailableError
from myllm.storage.sessions import SQLiteSessions, sessions_file

from .conftest import Launch
from .rig import Daemon, Event, times, until

FakeModel = Callable[..., Path]
SESSION = "t"


def chat(model: Path, prompt: str) -> Event:
    return {"op": "chat", "model": str(model), "session": SESSION, "prompt": prompt}


def kept() -> list[Message]:
    with closing(SQLiteSessions(paths.state_dir())) as store:
        store.recover()
        return store.path(store.find(SESSION).id)


def take_turns(daemon: Daemon, model: Path, prefix: str, begin: Callable[[], None]) -> tuple[list[str], str]:
    """Turns until the daemon dies: what was answered to the end, and what had been asked when it died."""
    answered: list[str] = []
    with daemon.client() as client:
        begin()
        while True:
            asked = f"{prefix}-{len(answered)}"
            try:
                *_, last = map(orjson.loads, client.stream(chat(model, asked)))
            except UnavailableError:
                return answered, asked
            assert last["full_text"], last
            answered.append(asked)


@times(5, 200)
def test_a_daemon_that_is_killed_keeps_every_turn_that_it_acknowledged(
    launch: Launch, fake_model: FakeModel, count: int
) -> None:
    model = fake_model(tokens=["Yes", ",", " of", " course", "."], ms_per_token=3)
    seed = random.randrange(2**32)
    source = random.Random(seed)
    acknowledged: list[str] = []
    for life in range(count):
        daemon = launch()
        daemon.done(chat(model, f"{life}-first"))  # loads, and makes the session
        killer = threading.Timer(source.uniform(0, 0.4), daemon.signal, [signal.SIGKILL])
        answered, asked = take_turns(daemon, model, str(life), killer.start)
        killer.join()
        assert daemon.ended() == -signal.SIGKILL
        acknowledged += [f"{life}-first", *answered]
        messages = kept()
        answers = {m.content: n.content for m, n in pairwise(messages) if m.role == "user"}
        for each in acknowledged:
            assert answers[each] == "Yes, of course.", (seed, each)
        last = messages[-1]
        assert (last.role == "user" and last.state is State.FAILED) or last.state in (State.CUT, State.WHOLE)
        assert {m.state for m in messages if m.content in acknowledged} == {State.WHOLE}, (seed, asked)
    with closing(sqlite3.connect(sessions_file(paths.state_dir()))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_client_that_goes_leaves_its_answer_as_far_as_it_came(
    launch: Launch, fake_model: FakeModel
) -> None:
    model = fake_model(tokens=[" a"] * 2000, ms_per_token=5)
    daemon = launch()
    with daemon.client() as client:
        lines = client.stream(chat(model, "hi"))
        while b'"token"' not in next(lines):
            pass
    until(lambda: kept()[-1].state is State.CUT)
    user, answer = kept()
    assert user.state is State.WHOLE
    assert answer.content.startswith(" a")
    daemon.signal(signal.SIGTERM)
    assert daemon.ended() == 0
