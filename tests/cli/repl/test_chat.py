"""What the next message is sent with."""

from __future__ import annotations

import pytest

from myllm.cli.repl.chat import assigned, begun
from myllm.conversation import Session
from myllm.errors import UsageError

SESSION = Session(
    id="s1", name="trip", created=0, updated=0, model="kept", system="Kept.", settings={"top_k": 5, "seed": 1}
)


def test_options_go_before_what_the_session_has() -> None:
    chat = begun({"model": "given", "seed": 7, "options": {"context": 512}}, SESSION, "/here")
    assert chat.request("hi") == {
        "op": "chat",
        "prompt": "hi",
        "session": "s1",
        "model": "given",
        "top_k": 5,
        "seed": 7,
        "options": {"context": 512},
        "directory": "/here",
    }


def test_the_system_message_is_sent_where_no_session_keeps_it() -> None:
    assert begun({"system": "Be brief."}, None, "/").request("hi")["system"] == "Be brief."
    assert "system" not in begun({"system": "Be brief."}, SESSION, "/").request("hi")


@pytest.mark.parametrize("typed", ["top_k 3", "top_k=3", "top_k = 3"])
def test_set_takes_a_name_and_a_value(typed: str) -> None:
    assert assigned({"seed": 1}, typed) == {"seed": 1, "top_k": 3}


def test_set_without_a_value_is_the_default() -> None:
    assert assigned({"seed": 1, "top_k": 3}, "top_k") == {"seed": 1}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("temprature 1", "did you mean temperature"),
        ("top_p 2", "from 0 to 1"),
        ("top_k x", "expected a number"),
        ("top_k nan", "expected a number"),
        ("seed inf", "expected a number"),
        ("max_tokens 1.5", "whole number"),
    ],
)
def test_set_refuses_what_no_request_takes(typed: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        assigned({}, typed)
