"""A conversation by commands, without a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from myllm.conversation import State
from tests.cli.repl.conftest import Conversation


def test_a_message_is_answered_in_a_session_of_its_own(conversation: Conversation) -> None:
    conversation.type("hi")
    assert conversation.out == "echo: hihi\n"
    assert conversation.path == ["hi", "echo: hihi"]
    assert conversation.session.directory == "/begun/here"


def test_leaving_at_once_leaves_no_session(conversation: Conversation) -> None:
    conversation.type("", "/help", "/tokens")
    assert conversation.store.page() == []


def test_undo_takes_back_a_message_and_its_answer(conversation: Conversation) -> None:
    conversation.type("one", "two", "/undo", "three")
    assert conversation.path == ["one", "echo: oneone", "three", "echo: threethree"]
    assert "two" in [message.content for message in conversation.store.tree(conversation.session.id)]


def test_undo_of_all_leaves_nothing_to_undo(conversation: Conversation) -> None:
    conversation.type("one", "/undo", "/undo", "/copy")
    assert conversation.path == []
    assert "nothing has been said" in conversation.err
    assert "nothing has been answered" in conversation.err


def test_retry_answers_again_and_keeps_the_old_answer(conversation: Conversation) -> None:
    conversation.type("one", "/retry")
    assert conversation.path == ["one", "echo: oneone"]
    assert conversation.out == "echo: oneone\n" * 2
    assert len(list(conversation.store.tree(conversation.session.id))) == 4


def test_edit_brings_the_message_back_and_sends_what_became_of_it(conversation: Conversation) -> None:
    conversation.type("one", "two", "/edit", " /three", "/edit", "four")
    assert conversation.before == ["", "", "", "two", "", " /three", ""]
    assert conversation.path == ["one", "echo: oneone", "four", "echo: fourfour"]


def test_a_command_in_place_of_an_edit_is_a_command(conversation: Conversation) -> None:
    conversation.type("one", "/edit", "/tokens", "two")
    assert "2 tokens at" in conversation.err
    assert conversation.path == ["one", "echo: oneone", "two", "echo: twotwo"]


@pytest.mark.parametrize("command", ["/undo", "/fork"])
def test_what_the_options_said_outlives(conversation: Conversation, command: str) -> None:
    conversation.type("one")
    conversation.chat.model = "given"  # as by -m, for this command alone
    conversation.type(command, "two")
    assert conversation.client.requests[-1]["model"] == "given"


def test_an_edit_that_is_dropped_changes_nothing(conversation: Conversation) -> None:
    conversation.type("one", "/edit", "", "two")
    assert conversation.path == ["one", "echo: oneone", "two", "echo: twotwo"]


def test_edit_takes_the_new_text_as_well(conversation: Conversation) -> None:
    conversation.type("one", "/edit uno")
    assert conversation.path == ["uno", "echo: unouno"]


def test_where_a_retry_is_not_even_asked_the_session_stays_as_it_was(conversation: Conversation) -> None:
    conversation.type("one", "/edit die")
    assert conversation.path == ["one", "echo: oneone"]
    conversation.type("two")
    assert conversation.path == ["one", "echo: oneone", "two", "echo: twotwo"]


def test_a_fork_goes_on_and_leaves_the_old_session_alone(conversation: Conversation) -> None:
    conversation.type("one")
    old = conversation.session
    conversation.type("/fork b", "two")
    assert conversation.session.name == "b"
    assert conversation.session.parent == old.id
    assert conversation.path == ["one", "echo: oneone", "two", "echo: twotwo"]
    assert conversation.store.find(old.id) == old


def test_settings_go_into_requests_and_stay_with_the_session(conversation: Conversation) -> None:
    conversation.type("/set top_k 3", "/system Be brief.", "one", "/model other", "/set top_p 0.5", "two")
    first, second = conversation.client.requests
    assert (first["top_k"], first.get("model")) == (3, None)
    assert (second["top_k"], second["top_p"], second["model"]) == (3, 0.5, "other")
    session = conversation.session
    assert (session.model, session.system, session.settings) == (
        "other",
        "Be brief.",
        {"top_k": 3, "top_p": 0.5},
    )


def test_the_system_message_can_be_taken_away(conversation: Conversation) -> None:
    conversation.type("/system Be brief.", "one", '/system ""')
    assert conversation.session.system is None


def test_a_saved_name_finds_the_session_again(conversation: Conversation) -> None:
    conversation.type("/save a", "one", "/fork b", "two", "/sessions a", "three")
    assert conversation.session.name == "a"
    assert conversation.path == ["one", "echo: oneone", "three", "echo: threethree"]
    assert "> one\necho: oneone\n" in conversation.err


def test_sessions_are_listed(conversation: Conversation) -> None:
    conversation.type("/sessions", "/save trip", "one", "/sessions")
    assert "no sessions yet" in conversation.err
    assert "SESSION  MESSAGES  MODEL\ntrip     2\n" in conversation.err


def test_a_file_waits_for_the_message_that_goes_with_it(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("inside")
    name = tmp_path / "a.txt"
    conversation.type(f"/file {name}", "/file", "Why?", "And?")
    assert conversation.path[0] == f"{name}:\n```\ninside\n```\n\nWhy?"
    assert conversation.path[2] == "And?"
    assert f"{name} (6 characters)" in conversation.err


def test_a_file_goes_on_waiting_where_its_message_was_not_sent(
    conversation: Conversation, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("inside")
    conversation.type(f"/file {tmp_path / 'a.txt'}", "die", "Why?")
    assert conversation.path[0].endswith("inside\n```\n\nWhy?")


def test_files_can_be_let_go(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("inside")
    conversation.type(f"/file {tmp_path / 'a.txt'}", "/file -", "Why?")
    assert conversation.path[0] == "Why?"


def test_a_mentioned_file_goes_along_and_is_named(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("inside")
    conversation.type("see @a.txt")
    assert conversation.path[0] == "a.txt:\n```\ninside\n```\n\nsee @a.txt"
    assert "with a.txt\n" in conversation.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/retyr", "did you mean /retry?"),
        ("/undo", "there is none yet"),
        ("/save", "it takes a NAME"),
        ("/save a/b", "it has a slash"),
        ("/sessions nosuch", "nosuch"),
        ("/file nosuch", "no such file"),
        ("/set nosuch 1", "no such parameter"),
        ("/copy", "nothing has been answered"),
        ("fail", "no such model"),
        ("die", "connection ended"),
    ],
)
def test_an_error_is_one_line_and_the_conversation_goes_on(
    conversation: Conversation, typed: str, said: str
) -> None:
    conversation.type(typed, "hi")
    assert conversation.out == "echo: hihi\n"
    (line,) = [line for line in conversation.err.splitlines() if said in line]
    assert line.startswith("myllm: ")


def test_a_connection_that_broke_is_made_anew(conversation: Conversation) -> None:
    conversation.type("die")
    assert conversation.client.closed


def test_a_code_block_that_is_not_there_is_named(conversation: Conversation) -> None:
    conversation.type("code", "/copy 3")
    assert "the answer has 2 code blocks; 3 is none of them" in conversation.err


def test_tokens_tells_the_window(conversation: Conversation) -> None:
    conversation.type("one two", "/tokens")
    assert "1,005/2,048 tokens\n" in conversation.err


def test_quit_leaves(conversation: Conversation) -> None:
    conversation.type("/quit", "never said")
    assert conversation.client.requests == []


def test_where_nothing_can_be_saved_the_conversation_warns_once_and_goes_on(
    conversation: Conversation, home: Path
) -> None:
    state = home / ".local/state"
    state.parent.mkdir()
    state.write_text("in the way")
    conversation.type("one", "two")
    assert conversation.out == "echo: oneone\necho: twotwo\n"
    assert conversation.err.count("This conversation is not saved") == 1


def test_a_session_removed_meanwhile_gives_place_to_a_new_one(conversation: Conversation) -> None:
    conversation.type("one")
    old = conversation.session
    conversation.store.remove(old.id)
    conversation.type("lost", "two")
    assert conversation.path == ["two", "echo: twotwo"]


def test_a_message_without_an_answer_can_be_asked_again(conversation: Conversation) -> None:
    conversation.type("fail")
    with conversation.store.turn(conversation.session.id):
        pass  # the Runtime's turn marks it
    (failed,) = conversation.store.path(conversation.session.id)
    assert failed.state is State.FAILED
    conversation.type("/edit hi")
    assert conversation.path == ["hi", "echo: hihi"]


def test_a_conversation_that_is_not_saved_goes_on_under_the_id_it_was_given(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation.chat.unsaved = "only-in-memory"
    assert conversation.chat.request("hi")["session"] == "only-in-memory"
