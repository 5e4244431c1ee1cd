"""The blocking client against another side that goes, or is no MyLLM."""

from __future__ import annotations

import socket

import orjson
import pytest

from myllm.client.client import Client
from myllm.errors import BadDataError, UnavailableError
from myllm.events import failed
from myllm.protocol import encode, hello


def ended_with(*lines: bytes) -> Client:
    """A client whose other side has said these lines and is gone."""
    ours, theirs = socket.socketpair()
    client = Client(ours)
    theirs.sendall(b"".join(lines))
    theirs.close()
    return client


def test_the_error_with_which_the_other_side_ends_is_the_answer_though_nothing_can_be_sent_any_more() -> None:
    error = failed(BadDataError("connection: not understood"))
    with ended_with(encode(hello("test")), encode(error)) as client:
        assert [orjson.loads(line) for line in client.stream({"op": "status"})] == [error]


def test_an_end_without_a_word_is_told() -> None:
    with (
        ended_with(encode(hello("test"))) as client,
        pytest.raises(UnavailableError, match="before the answer did"),
    ):
        list(client.stream({"op": "status"}))


def test_events_that_came_before_the_end_are_read_also_after_sending_failed() -> None:
    event = encode({"id": 1, "token": "a", "done": False})
    with ended_with(encode(hello("test")), event) as client:
        with pytest.raises(UnavailableError):
            client.send({"op": "gen", "id": 2})
        events = client.events()
        assert next(events) == event.rstrip()
        with pytest.raises(UnavailableError):
            next(events)


def test_what_is_no_myllm_is_told() -> None:
    with ended_with(b'{"hi":1}\n') as client, pytest.raises(UnavailableError, match="no MyLLM"):
        _ = client.greeting
