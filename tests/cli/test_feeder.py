"""The feeder of a batch: how far it reads ahead, and what it sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest

from myllm.cli.feeder import BadLine, Feeder, Finished, NotSent, Window, hash_of
from myllm.cli.resume import Done
from myllm.errors import BadDataError, IOFailureError, UnavailableError


class Sender:
    """A client that keeps what it is given, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._error = error

    def send(self, request: dict[str, Any]) -> None:
        if self._error:
            raise self._error
        self.sent.append(request)


def feed(
    chunks: Iterator[bytes] | list[bytes],
    mode: str = "auto",
    sender: Sender | None = None,
    done: Done | None = None,
    window: Window | None = None,
) -> tuple[list[dict[str, Any]], list[Any]]:
    """What is sent, and the news, of a feeder that runs to its end."""
    sender = sender or Sender()
    news: Queue[Any] = Queue()
    feeder = Feeder(sender, lambda record: {"prompt": record.text}, window or Window(), news, done or Done())  # type: ignore[arg-type]
    feeder.start(chunks, mode, None)
    told = [news.get(timeout=5)]
    while not isinstance(told[-1], Finished):
        told.append(news.get(timeout=5))
    return sender.sent, told


def test_a_hash_is_of_the_line_without_its_ending() -> None:
    assert hash_of(b'{"a":1}\r') == hash_of(b'{"a":1}')
    assert hash_of(b"a") != hash_of(b"b")


def test_index_counts_records_and_not_blank_lines() -> None:
    sent, news = feed([b'\n{"text":"a"}\n\n{"token":"x","done":false}\nbad\n{"text":"b"}'])
    assert sent == [{"prompt": "a", "id": 0}, {"prompt": "b", "id": 2}]
    assert isinstance(news[0], BadLine)
    assert (news[0].job.index, news[0].error["code"]) == (1, "bad_data")
    assert news[1] == Finished(3, 0, None)


def test_lines_are_texts_unless_the_first_is_an_object() -> None:
    assert feed([b"one\ntwo\n"])[0] == [{"prompt": "one", "id": 0}, {"prompt": "two", "id": 1}]
    assert feed([b'{"text":"one"}\n'], "lines")[0] == [{"prompt": '{"text":"one"}', "id": 0}]


def test_a_record_that_is_done_is_not_sent_again() -> None:
    done = Done({0: hash_of(b"one"), 1: hash_of(b"other")})
    sent, news = feed([b"one\ntwo\n"], done=done)
    assert sent == [{"prompt": "two", "id": 0}]
    assert news == [Finished(1, 1, None)]
    assert done.changed == 1


def test_a_line_too_long_is_an_error_record_and_costs_no_memory() -> None:
    chunks = (b"x" * 2**20 for _ in range(100))
    sent, news = feed(chunk for part in (iter([b"a\n"]), chunks, iter([b"\nb\n"])) for chunk in part)
    assert [request["prompt"] for request in sent] == ["a", "b"]
    assert (news[0].job.index, news[0].job.size) == (1, 256)
    assert "longer than" in news[0].error["message"]


def test_a_stdin_that_fails_ends_the_batch_with_its_error() -> None:
    def failing() -> Iterator[bytes]:
        yield b"one\ntw"
        raise IOFailureError("stdin: broken")

    sent, news = feed(failing())
    assert len(sent) == 1
    assert isinstance(news[-1].error, IOFailureError)


def test_a_request_that_cannot_be_sent_fails_alone() -> None:
    _, news = feed([b"one\ntwo\n"], sender=Sender(BadDataError("too large")))
    assert [type(each) for each in news] == [NotSent, NotSent, Finished]


def test_what_was_sent_into_a_connection_that_is_gone_is_given_up() -> None:
    news: Queue[Any] = Queue()
    feeder = Feeder(Sender(UnavailableError("gone")), lambda record: {}, Window(), news, Done())  # type: ignore[arg-type]
    feeder.start([b"one\ntwo\n"], "lines", None)
    assert news.get(timeout=5) == Finished(2, 0, None)
    assert [job.index for job in feeder.give_up(UnavailableError("gone"))] == [0, 1]
    assert not feeder.jobs


def test_reading_waits_for_writing() -> None:
    window = Window(records=2)
    read: list[int] = []
    third = threading.Event()

    def lines() -> Iterator[bytes]:
        for n in range(4):
            read.append(n)
            if n == 3:
                third.set()
            yield b"line\n"

    sender = Sender()
    feeder = Feeder(sender, lambda record: {}, window, Queue(), Done())  # type: ignore[arg-type]
    feeder.start(lines(), "lines", None)
    assert not third.wait(0.1)
    assert read == [0, 1, 2]
    window.release(4)
    assert third.wait(5)


@pytest.mark.parametrize("size", [1, 100])
def test_a_single_record_always_has_room(size: int) -> None:
    window = Window(records=1, size=10)
    window.acquire(size)
    window.release(size)
    window.acquire(size)
