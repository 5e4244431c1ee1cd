"""The REPL in a terminal: keys, pastes, Ctrl-C, signals, narrow windows and those that obey nothing."""

from __future__ import annotations

import base64
import os
import signal
import time
from pathlib import Path

import pytest

from myllm.storage.sessions import SQLiteSessions
from tests.cli.repl.conftest import OpenTerminal, Terminal

CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"


def path(store: SQLiteSessions) -> list[str]:
    """What is on the path of the one session there is."""
    (session,) = store.page()
    return [message.content for message in store.path(session.id)]


def test_a_message_is_answered_and_ctrl_d_leaves(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    screen = terminal()
    screen.prompt()
    screen.say("hello", "echo: hellohello\n")
    screen.expect("tokens · stand-in")
    screen.type(CTRL_D)
    assert screen.leave() == 0
    assert path(store) == ["hello", "echo: hellohello"]
    assert screen.modes_now() == screen.modes


def test_a_message_may_have_many_lines(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    screen = terminal()
    screen.prompt()
    screen.type(f"one{ALT_ENTER}")
    screen.say("two", "2 lines: one")
    screen.type('"""\ra\r\r')
    screen.say('b"""', "3 lines: a")
    assert path(store)[::2] == ["one\ntwo", "a\n\nb"]


def test_a_paste_of_500_lines_is_one_message(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    text = "\n".join(f"/line {number}" for number in range(500))
    screen = terminal()
    screen.prompt()
    screen.paste(text)
    screen.say("", "500 lines: ")
    assert path(store)[0] == text


def test_a_paste_into_an_answer_waits_whole_for_the_next_prompt(
    terminal: OpenTerminal, store: SQLiteSessions
) -> None:
    text = "\n".join(f"pasted {number}" for number in range(500))
    screen = terminal()
    screen.prompt()
    screen.type("count 60\r")
    screen.expect("3 4 5")
    screen.paste(text)
    screen.expect("59 60 \n")
    screen.prompt()
    assert "pasted" not in screen.shown.partition("59 60")[0]
    screen.say("", "500 lines: ")
    assert path(store)[2] == text


def test_keys_typed_into_an_answer_mean_the_same_at_the_next_prompt(
    terminal: OpenTerminal, store: SQLiteSessions
) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("count 20\r")
    screen.expect("3 4 5")
    screen.type(f"one{ALT_ENTER}two\r")
    screen.expect("2 lines: one")
    screen.prompt()
    assert path(store)[2] == "one\ntwo"


def test_ctrl_c_stops_the_answer_and_keeps_what_came(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("count 100000\r")
    screen.expect("5 6 7")
    screen.type(CTRL_C)
    screen.expect("myllm: stopped; what came is kept")
    screen.prompt()
    assert path(store)[1].startswith("1 2 3 4 5 6 7")
    screen.type(CTRL_C)
    screen.expect("myllm: Ctrl-D leaves")
    screen.prompt()
    screen.say("go on", "echo: go on")


def test_ctrl_c_drops_what_is_typed(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("never sent")
    screen.expect("never sent")
    screen.type(CTRL_C)
    screen.prompt()
    screen.say("sent", "echo: sent")
    assert "Ctrl-D" not in screen.shown
    assert path(store) == ["sent", "echo: sentsent"]


def test_undo_retry_edit_fork_and_model(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    screen = terminal()
    screen.prompt()
    screen.say("one", "echo: oneone")
    screen.say("two", "echo: twotwo")
    screen.say("/undo", "undone: two")
    screen.say("/retry", "echo: oneone")
    screen.say("/edit", "one")
    screen.say("\x7fly", "echo: onlyonly")
    screen.say("/model other", "model: other")
    screen.say("/fork b", "session b, from ")
    screen.type(CTRL_D)
    screen.leave()
    fork, old = store.page()
    assert (fork.name, fork.parent, fork.model) == ("b", old.id, "other")
    assert [message.content for message in store.path(fork.id)] == ["only", "echo: onlyonly"]


def test_a_session_goes_on_where_it_was_left(terminal: OpenTerminal, store: SQLiteSessions) -> None:
    first = terminal()
    first.prompt()
    first.say("/save trip", "session trip")
    first.say("hello", "echo: hellohello")
    first.type("/quit\r")
    assert first.leave() == 0
    again = terminal("trip")
    again.expect("session trip: 2 messages\n> hello\necho: hellohello\n")
    again.prompt()
    again.expect("tokens · stand-in · trip")
    again.say("more", "echo: moremore")
    assert path(store) == ["hello", "echo: hellohello", "more", "echo: moremore"]


def test_tab_completes(terminal: OpenTerminal) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("/tok\t")
    screen.expect("/tokens")
    screen.say("", "nothing has been answered yet")


def test_what_was_typed_is_kept_for_the_owner_only(terminal: OpenTerminal, history: Path) -> None:
    screen = terminal()
    screen.prompt()
    screen.say("hello", "echo: hello")
    screen.type(CTRL_D)
    screen.leave()
    assert b"+hello\n" in history.read_bytes()
    assert (history.stat().st_mode & 0o777, history.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    again = terminal()
    again.prompt()
    again.type("\x1b[A")
    again.expect("hello")


def test_reasoning_is_dim_and_model_text_cannot_draw(terminal: OpenTerminal) -> None:
    screen = terminal()
    screen.prompt()
    screen.say("think", "hmm\n\n42\n")
    screen.say("escape", "\\x1b]0;owned\\x07\\x9b31m\n")
    assert b"\x1b[2mhmm\x1b[0m" in screen.raw
    assert b"\x1b]0;" not in screen.raw


def test_a_code_block_is_copied_by_the_terminal(terminal: OpenTerminal) -> None:
    screen = terminal()
    screen.prompt()
    screen.say("code", "ls -l")
    screen.say("/copy 1", "copied 9 characters")
    assert b"\x1b]52;c;" + base64.b64encode(b"print(1)\n") + b"\x07" in screen.raw


def test_without_colour_reasoning_stands_in_tags(terminal: OpenTerminal) -> None:
    screen = terminal(environ={"NO_COLOR": "1"})
    screen.prompt()
    screen.say("think", "<think>\nhmm\n</think>\n\n42\n")


def test_forty_columns_and_a_change_of_size_while_it_streams(terminal: OpenTerminal) -> None:
    screen = terminal(columns=40)
    screen.prompt()
    screen.type("count 60\r")
    screen.expect("3 4 5")
    screen.resize(60)
    os.kill(screen.process.pid, signal.SIGWINCH)
    screen.expect(" ".join(map(str, range(6, 61))) + " \n")  # plainly: nothing is drawn anew
    screen.prompt()


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": ""}])
def test_a_terminal_that_obeys_nothing_gets_plain_lines(
    terminal: OpenTerminal, store: SQLiteSessions, environ: dict[str, str]
) -> None:
    screen = terminal(environ=environ)
    screen.expect("> ")
    screen.type("think\n")
    screen.expect("<think>\nhmm\n</think>\n\n42\n> ")
    screen.type('"""a\nb"""\n')
    screen.expect("2 lines: a")
    screen.type("/copy\n")
    screen.expect("no clipboard")
    screen.type("count 100000\n")
    screen.expect("5 6 7")
    screen.type(CTRL_C)
    screen.expect("stopped; what came is kept")
    screen.expect("> ")
    screen.type(CTRL_D)
    assert screen.leave() == 0
    assert b"\x1b" not in screen.raw
    assert path(store)[2] == "a\nb"


def test_where_stdout_is_a_file_it_gets_the_answers_alone(terminal: OpenTerminal, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        screen = terminal(stdout=out)
    screen.expect("> ")
    screen.type("think\n/tokens\n")
    screen.expect("1 tokens at")
    screen.type(CTRL_D)
    assert screen.leave() == 0
    assert (tmp_path / "out").read_text() == "\n\n42\n"


def ended_by(screen: Terminal, number: int) -> bool:
    os.kill(screen.process.pid, number)
    return screen.leave() == -number


def test_sigterm_at_the_prompt_leaves_the_terminal_as_it_was(terminal: OpenTerminal) -> None:
    screen = terminal()
    screen.prompt()
    assert ended_by(screen, signal.SIGTERM)
    assert screen.modes_now() == screen.modes
    assert "Traceback" not in screen.shown
    assert "exception" not in screen.shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_keeps_what_came_of_the_answer(
    terminal: OpenTerminal, store: SQLiteSessions, number: int
) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("count 100000\r")
    screen.expect("5 6 7")
    assert ended_by(screen, number)
    assert path(store)[1].startswith("1 2 3 4 5 6 7")
    assert screen.modes_now() == screen.modes
    assert not screen.marks_pastes


def test_a_terminal_that_is_closed_ends_the_conversation(
    terminal: OpenTerminal, store: SQLiteSessions
) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("count 100000\r")
    screen.expect("5 6 7")
    screen.hang_up()
    assert screen.process.wait(30) == -signal.SIGHUP
    assert path(store)[0] == "count 100000"


def test_a_second_ctrl_c_gives_up_on_an_answer_that_does_not_stop(terminal: OpenTerminal) -> None:
    screen = terminal()
    screen.prompt()
    screen.type("hang\r")
    screen.expect("hanging")
    screen.type(CTRL_C)
    time.sleep(0.3)  # two at once would be one signal
    screen.type(CTRL_C)
    screen.expect("myllm: stopped")
    screen.prompt()
    screen.say("hello", "echo: hello")
