"""`myllm chat` and `gen -s`: turns that are kept, cold, warm and mixed, and what may stand in their way."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm import paths, settings
from myllm.client import connect
from myllm.conversation import Message, State
from myllm.snapshot_files import folder
from myllm.socket_file import socket_path
from myllm.storage.sessions import SQLiteSessions, sessions_file

from .conftest import MYLLM, Run

FakeModel = Callable[..., Path]
NAME, ASKED = b"My name is Ada.\n", b"What is my name?\n"


def conversation(name: str) -> list[Message]:
    store = SQLiteSessions(paths.state_dir())
    try:
        return store.path(store.find(name).id)
    finally:
        store.close()


def said(name: str) -> list[tuple[str, str, State]]:
    return [(message.role, message.content, message.state) for message in conversation(name)]


def until(true: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("daemons")
@pytest.mark.parametrize("how", ["cold", "warm", "cold, then warm", "warm, then cold"])
def test_the_second_turn_goes_on_from_the_first(run: Run, fake_model: FakeModel, how: str) -> None:
    model = fake_model(template="chatml")
    first_flag, second_flag = (
        [] if part == "warm" else ["--no-daemon"] for part in (how.split(", then ") * 2)[:2]
    )
    if "warm" in how:
        run("load", model)
    run("chat", "-m", model, "-s", "t", "-t", *first_flag, stdin=NAME)
    second = run("chat", "-m", model, "-s", "t", *second_flag, stdin=ASKED)
    assert second.status == 0
    sent = second.lines[-1]["full_text"]  # the fake says what it was sent
    assert sent.index("My name is Ada.") < sent.index("What is my name?")
    assert [role for role, *_ in said("t")] == ["user", "assistant", "user", "assistant"]
    assert {state for *_, state in said("t")} == {State.WHOLE}


def test_what_is_sent_is_the_whole_conversation_rendered_at_once(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(template="chatml", tokens=["Fine", "."])
    for text in (b"one two\n", b"three\n", b"four five six\n"):
        event = run("chat", "-m", model, "-s", "t", "--system", "Be brief.", stdin=text).lines[-1]
    lines = [{"role": "system", "content": "Be brief."}]
    lines += [{"role": m.role, "content": m.content} for m in conversation("t")[:-1]]
    counted = run("gen", "--count", "-m", model, stdin=b"\n".join(map(orjson.dumps, lines)))
    assert event["usage"]["prompt_tokens"] == counted.lines[-1]["usage"]["prompt_tokens"]


def test_a_turn_resumes_from_what_the_one_before_computed(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(template="chatml", window=4096, tokens=["Yes", "."])
    text = b" ".join(b"word%d" % number for number in range(300))
    run("chat", "-m", model, "-s", "t", stdin=text)
    event = run("chat", "-m", model, "-s", "t", stdin=b"and on?").lines[-1]
    assert event["usage"]["cached_tokens"] > 0.95 * event["usage"]["prompt_tokens"]


def test_the_last_event_names_the_session_and_an_id_goes_on_with_it(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    event = run("chat", "-m", model, "-n", "one").lines[-1]
    again = run("chat", "-n", "two", "-s", event["session_id"]).lines[-1]
    assert again["session_id"] == event["session_id"]
    assert [content for role, content, _ in said(event["session_id"]) if role == "user"] == ["one", "two"]
    assert list(event)[:4] == ["done", "full_text", "session_id", "model"]


def test_continue_takes_the_last_session_of_this_folder_first(
    run: Run, fake_model: FakeModel, tmp_path: Path
) -> None:
    model = fake_model()
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        run("chat", "-m", model, "-s", place.name, "-n", "one", cwd=place)
    run("chat", "-c", "-n", "two", cwd=here)
    run("chat", "-c", "-n", "three", cwd=tmp_path)  # the last one of all
    assert [content for role, content, _ in said("here") if role == "user"] == ["one", "two", "three"]


def test_there_must_be_a_session_to_continue(run: Run) -> None:
    ended = run("chat", "-c", "-n", "one")
    assert ended.status == 66
    assert "there is none to go on with" in ended.err


def test_gen_takes_turns_in_the_same_sessions(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(template="chatml")
    run("chat", "-m", model, "-s", "t", stdin=NAME)
    assert "My name is Ada." in run("gen", "-s", "t", stdin=ASKED).lines[-1]["full_text"]
    assert run("gen", "-s", "t", "--raw", stdin=ASKED).status == 2


def test_a_session_remembers_its_model_and_system_prompt(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(template="chatml")
    run("chat", "-m", model, "-s", "t", "--system", "Be brief.", stdin=NAME)
    event = run("chat", "-s", "t", stdin=ASKED).lines[-1]
    assert event["model"] == str(model)
    assert event["full_text"].index("Be brief.") < event["full_text"].index("Ada")


def test_files_go_along_under_their_names(run: Run, fake_model: FakeModel, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("one\n```\ntwo\n```\n")
    for command in (["chat"], ["gen"]):
        words = [*command, "-m", fake_model(), "-n", "-f", notes.name, "What is in it?"]
        text = run(*words, cwd=tmp_path).lines[-1]["full_text"]
        assert text.endswith("notes.md:\n````\none\n```\ntwo\n```\n````\n\nWhat is in it?")


@pytest.mark.parametrize(
    ("content", "status", "why"),
    [(b"a\0b", 65, "binary"), (b"caf\xe9", 65, "not UTF-8"), (None, 66, "no such file")],
)
def test_a_file_that_is_no_text_is_refused(
    run: Run, fake_model: FakeModel, tmp_path: Path, content: bytes | None, status: int, why: str
) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    ended = run("chat", "-m", fake_model(), "-n", "-f", tmp_path / "x", "hi")
    assert (ended.status, why in ended.err) == (status, True)


def test_a_small_window_leaves_out_the_oldest_turns_and_says_so(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(template="chatml", window=200, tokens=["Yes", "."])
    dropped = []
    for number in range(12):
        text = b" ".join(b"w%d-%d" % (number, at) for at in range(30))
        ended = run("chat", "-m", model, "-s", "t", "--max-tokens", "8", stdin=text)
        assert ended.status == 0, ended.err
        dropped.append(ended.lines[-1]["usage"]["dropped_messages"])
        assert ("messages left out" in ended.err) == bool(dropped[-1])
    assert dropped[0] == 0 < dropped[-1] < 24
    assert dropped == sorted(dropped)  # and only now and then more
    assert len(set(dropped)) < 8
    assert len(said("t")) == 24


def test_an_interrupt_keeps_what_has_come(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=[" a"] * 500, ms_per_token=20)
    command = [*MYLLM, "chat", "-m", str(model), "-s", "t", "-t", "-n", "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(6)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(20) == -signal.SIGINT
    (user, answer) = said("t")
    assert user[1:] == ("hi", State.WHOLE)
    assert answer[2] is State.CUT
    assert len(answer[1]) >= 6
    assert answer[1].strip() in (b"a a a" + rest).decode()


@pytest.mark.usefixtures("daemons")
def test_a_daemon_that_is_killed_loses_no_more_than_a_second(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=[" a"] * 500, ms_per_token=20)
    run("load", model)
    command = [*MYLLM, "chat", "-m", str(model), "-s", "t", "-n", "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        until(lambda: len(said("t")) == 2 and len(said("t")[1][1]) > 100)
        (entry,) = run("load", "--list").lines
        daemon = int(Path(f"/proc/{entry['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(daemon, signal.SIGKILL)
        assert process.wait(20) == 69
    Path(socket_path()).unlink()  # the killed one's, which the next daemon would take
    event = run("chat", "-m", fake_model("other"), "-s", "t", "-n", "go on", "--no-daemon").lines[-1]
    assert " a a a" in event["full_text"]
    assert said("t")[1][2] is State.CUT


def test_a_worker_that_dies_leaves_what_it_said(run: Run, fake_model: FakeModel) -> None:
    fault = {"kind": "abort", "after_tokens": 2, "words": "GGML_ASSERT failed"}
    ended = run("chat", "-m", fake_model(tokens=["a", " b", " c"], fault=fault), "-s", "t", "-n", "hi")
    assert ended.status == 69
    assert [(role, content) for role, content, _ in said("t")] == [("user", "hi"), ("assistant", "a b")]


def test_a_message_that_gets_no_answer_is_kept_and_not_sent_again(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(template="chatml", window=40)
    assert run("chat", "-m", model, "-s", "t", stdin=b"far too long " * 40).status == 67
    assert said("t")[0][2] is State.FAILED
    assert "far" not in run("chat", "-m", model, "-s", "t", stdin=b"hi").lines[-1]["full_text"]


def test_two_commands_take_turns_one_after_the_other(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 40, ms_per_token=20)
    run("chat", "-m", model, "-s", "t", "-n", "zero")
    ended: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: ended.append(run("chat", "-s", "t", "-n", n).status))
        for n in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [0, 0]
    assert [role for role, *_ in said("t")] == ["user", "assistant"] * 3


def locked(seconds: float) -> threading.Thread:
    """Another process's lock on the store, as a writer has it."""
    connection = sqlite3.connect(sessions_file(paths.state_dir()), check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")

    def hold() -> None:
        time.sleep(seconds)
        connection.rollback()
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    return thread


@pytest.mark.parametrize(("seconds", "status"), [(1, 0), (12, 75)])
def test_a_locked_store_is_waited_for_and_then_the_answer_is_shown_unsaved(
    run: Run, fake_model: FakeModel, seconds: float, status: int
) -> None:
    model = fake_model(tokens=["Yes"])
    run("chat", "-m", model, "-s", "t", "-n", "one")
    holder = locked(seconds)
    ended = run("chat", "-s", "t", "-t", "-n", "two")
    holder.join()
    assert (ended.status, ended.out) == (status, b"Yes\n")
    assert ("not saved" in ended.err) == bool(status)
    assert len(said("t")) == (2 if status else 4)


def test_where_nothing_can_be_kept_the_answer_comes_with_a_warning(
    run: Run, fake_model: FakeModel, home: Path
) -> None:
    (home / ".local").mkdir(exist_ok=True)
    (home / ".local" / "state").write_text("in the way")
    ended = run("chat", "-m", fake_model(tokens=["Yes"]), "-s", "t", "-t", "-n", "one")
    assert (ended.status, ended.out) == (0, b"Yes\n")
    assert "not saved" in ended.err


def test_a_conversation_that_cannot_be_kept_goes_on_in_its_runtime(
    run: Run, fake_model: FakeModel, home: Path
) -> None:
    """As at a terminal, where one Runtime has all turns."""
    (home / ".local").mkdir(exist_ok=True)
    (home / ".local" / "state").write_text("in the way")
    request = {"op": "chat", "model": str(fake_model(template="chatml")), "prompt": "My name is Ada."}
    with connect(settings.load(), lambda note: None) as client:
        *_, first = map(orjson.loads, client.stream(request))
        again = {**request, "prompt": "And yours?", "session": first["session_id"]}
        *_, second = map(orjson.loads, client.stream(again))
    assert second["full_text"].index("My name is Ada.") < second["full_text"].index("And yours?")


def test_a_store_of_a_newer_version_is_refused_untouched(run: Run, fake_model: FakeModel) -> None:
    run("chat", "-m", fake_model(), "-s", "t", "-n", "one")
    file = sessions_file(paths.state_dir())
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    before = file.read_bytes()
    ended = run("chat", "-m", fake_model(), "-s", "t", "-n", "two")
    assert ended.status == 65
    assert "newer" in ended.err
    assert file.read_bytes() == before


def test_options_that_contradict_each_other_are_refused(run: Run) -> None:
    assert run("chat", "-c", "-s", "t", "-n", "hi").status == 2
    assert run("chat", "-n").status == 2


SMALL_DISK = """
mkdir -p "$0" && mount -t tmpfs -o size=400k,mode=700 none "$0" && cp -r "$1" "$0/myllm" && shift
head -c 10M /dev/zero > "$0/filler" 2>/dev/null
exec "$@"
"""


def test_on_a_full_disk_the_answer_is_shown_and_what_was_kept_stays(
    run: Run, fake_model: FakeModel, home: Path, tmp_path: Path
) -> None:
    model = fake_model(tokens=["Yes"])
    run("chat", "-m", model, "-s", "t", "-n", "one")
    state = home / ".local" / "state"
    saved = tmp_path / "saved"
    shutil.copytree(state / "myllm", saved)
    under = ["unshare", "-Urm", "sh", "-c", SMALL_DISK, str(state), str(saved)]
    ended = run("chat", "-m", model, "-s", "t", "-t", "-n", "two", under=under)
    assert (ended.status, ended.out) == (74, b"Yes\n")
    assert "not saved" in ended.err
    assert len(said("t")) == 2


@pytest.mark.usefixtures("daemons")
def test_a_long_conversation_in_a_small_window_seldom_reads_anything_again(
    run: Run, fake_model: FakeModel
) -> None:
    words = [f" a{number}" for number in range(14)]
    model = fake_model(template="chatml", window=2048, tokens=words)
    run("load", model)
    reused, dropped = 0, []
    for turn in range(80):
        text = b" ".join(b"w%d-%d" % (turn, at) for at in range(14))
        usage = run("chat", "-m", model, "-s", "t", "--max-tokens", "100", stdin=text).lines[-1]["usage"]
        reused += usage["cached_tokens"] >= 0.8 * usage["prompt_tokens"]
        dropped.append(usage["dropped_messages"])
    assert 0 == dropped[40] < dropped[-1]
    assert len(set(dropped)) <= 5  # seldom, and then many at once
    assert reused >= 0.85 * 80


def kept_tokens() -> int:
    return sum(int(file.name.split("-")[1]) for file in folder().iterdir())


def test_a_session_that_is_removed_takes_along_what_was_computed_for_it_alone(
    run: Run, fake_model: FakeModel
) -> None:
    model = fake_model(template="chatml", window=4096, tokens=["Yes", "."])
    common = " ".join(f"word{number}" for number in range(300))
    for name in ("one", "two"):
        for text in ("a question", "another one"):
            own = " ".join(f"{name}{number}" for number in range(50))
            run("chat", "-m", model, "-s", name, "-n", f"{common} {text} {own}")
    together = kept_tokens()
    run("sessions", "rm", "-y", "one")
    assert 350 < kept_tokens() < 0.7 * together
    event = run("chat", "-s", "two", "-n", "go on").lines[-1]
    assert event["usage"]["cached_tokens"] > 0.9 * event["usage"]["prompt_tokens"] - 10
    run("sessions", "rm", "-y", "two")
    assert kept_tokens() == 0
