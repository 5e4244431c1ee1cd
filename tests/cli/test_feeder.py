"""The feeder: how far it reads ahead, what it sends, and which records of a batch it is given."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import Any

import pytest

from myllm.cli.batch import jobs
from myllm.cli.feeder import Asked, Asking, Feeder, Finished, Job, NotSent, Refused, Window
from myllm.cli.input_records import parsed_lines
from myllm.cli.resume import Done, hash_of
from myllm.errors import BadDataError, InternalError, IOFailureError, UnavailableError

ONE = Asking(lambda requests: dict(requests[0]))


class Sender:
    """A client that keeps what it is given, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._error = error

    def send(self, request: dict[str, Any]) -> None:
        if self._error:
            raise self._error
        self.sent.append(request)


def told(news: Queue[Any]) -> list[Any]:
    """All that a feeder tells until it ends."""
    heard = [news.get(timeout=5)]
    while not isinstance(heard[-1], Finished | InternalError):
        heard.append(news.get(timeout=5))
    return heard


def feed(
    chunks: Iterable[bytes], mode: str = "auto", sender: Sender | None = None, done: Done | None = None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """What is sent of a batch's records, and the news, of a feeder that runs to its end."""
    sender = sender or Sender()
    news: Queue[Any] = Queue()
    feeder: Feeder[Any] = Feeder(sender, ONE, Window(), news)  # type: ignore[arg-type]
    lines = parsed_lines(chunks, mode, None, "or not")
    feeder.start(lambda idle: jobs(lines, lambda record: {"prompt": record.text}, done or Done()))
    return sender.sent, told(news)


def asked(sizes: Iterable[int]) -> Iterator[Asked[Job]]:
    """A job of each size, its content a text of that many bytes."""
    return (Asked(Job(n, n, {}, size), "x" * size) for n, size in enumerate(sizes))


def test_index_counts_records_and_not_blank_lines() -> None:
    sent, news = feed([b'\n{"text":"a"}\n\n{"token":"x","done":false}\nbad\n{"text":"b"}'])
    assert sent == [{"prompt": "a", "id": 0}, {"prompt": "b", "id": 1}]
    assert isinstance(news[0], Refused)
    assert (news[0].job.index, news[0].error["code"]) == (1, "bad_data")
    assert news[1] == Finished(3, None)


def test_lines_are_texts_unless_the_first_is_an_object() -> None:
    assert feed([b"one\ntwo\n"])[0] == [{"prompt": "one", "id": 0}, {"prompt": "two", "id": 1}]
    assert feed([b'{"text":"one"}\n'], "lines")[0] == [{"prompt": '{"text":"one"}', "id": 0}]


def test_a_record_that_is_done_is_not_sent_again() -> None:
    done = Done({0: hash_of(b"one"), 1: hash_of(b"other")})
    sent, news = feed([b"one\ntwo\n"], done=done)
    assert sent == [{"prompt": "two", "id": 0}]
    assert news == [Finished(1, None)]
    assert (done.skipped, done.changed) == (1, 1)


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
    feeder: Feeder[Job] = Feeder(Sender(UnavailableError("gone")), ONE, Window(), news)  # type: ignore[arg-type]
    feeder.start(lambda idle: [Asked(Job(n, n, {}, 1), {}) for n in range(2)])
    assert news.get(timeout=5) == Finished(2, None)
    assert [job.index for job in feeder.give_up(UnavailableError("gone"))] == [0, 1]
    assert not feeder.groups


def test_what_is_read_after_a_connection_has_been_given_up_is_told_and_not_sent() -> None:
    given_up = threading.Event()

    def source(idle: Any) -> Iterator[Asked[Job]]:
        given_up.wait(5)
        yield Asked(Job(0, 0, {}, 1), {})

    news: Queue[Any] = Queue()
    feeder: Feeder[Job] = Feeder(Sender(UnavailableError("gone")), ONE, Window(), news)  # type: ignore[arg-type]
    feeder.start(source)
    assert feeder.give_up(UnavailableError("gone")) == []
    given_up.set()
    assert [type(each) for each in told(news)] == [NotSent, Finished]


def test_a_group_is_sent_when_it_is_full_or_large_or_the_input_is_waited_for() -> None:
    sender = Sender()
    news: Queue[Any] = Queue()
    asking = Asking(lambda texts: {"texts": texts}, 3, 10)
    feeder: Feeder[Job] = Feeder(sender, asking, Window(), news)  # type: ignore[arg-type]

    def source(idle: Any) -> Iterator[Asked[Job]]:
        yield from asked([1, 1, 1, 9, 9, 1])
        idle()
        yield Asked(Job(6, 6, {}, 1), "x")

    feeder.start(source)
    assert told(news) == [Finished(7, None)]
    assert [list(map(len, request["texts"])) for request in sender.sent] == [[1, 1, 1], [9, 9], [1], [1]]
    assert [request["id"] for request in sender.sent] == [0, 1, 2, 3]


def test_what_is_gathered_is_sent_before_room_for_more_is_waited_for() -> None:
    class Answering(Sender):
        def send(self, request: dict[str, Any]) -> None:
            super().send(request)
            for _ in request["texts"]:
                window.release(1)

    window = Window(n_jobs=2)
    news: Queue[Any] = Queue()
    sender = Answering()
    feeder: Feeder[Job] = Feeder(sender, Asking(lambda texts: {"texts": texts}, 64), window, news)  # type: ignore[arg-type]
    feeder.start(lambda idle: asked([1] * 5))
    assert told(news) == [Finished(5, None)]
    assert [len(request["texts"]) for request in sender.sent] == [2, 2, 1]


@pytest.mark.parametrize("n_jobs", [1, 64])
def test_what_came_before_the_input_failed_is_sent_and_a_bug_is_told(n_jobs: int) -> None:
    def source(error: Exception) -> Iterator[Asked[Job]]:
        yield from asked([1, 1])
        raise error

    for error, end in ((IOFailureError("broken"), Finished), (KeyError("bug"), InternalError)):
        news: Queue[Any] = Queue()
        sender = Sender()
        feeder: Feeder[Job] = Feeder(sender, Asking(lambda texts: {"n": len(texts)}, n_jobs), Window(), news)  # type: ignore[arg-type]
        feeder.start(lambda idle, error=error: source(error))  # type: ignore[misc]
        (last,) = told(news)
        assert isinstance(last, end)
        if isinstance(last, Finished):
            assert (last.n_jobs, last.error) == (2, error)
            assert sum(request["n"] for request in sender.sent) == 2


def test_reading_waits_for_writing() -> None:
    window = Window(n_jobs=2)
    read: list[int] = []
    third = threading.Event()

    def source(idle: Any) -> Iterator[Asked[Job]]:
        for n in range(4):
            read.append(n)
            if n == 3:
                third.set()
            yield Asked(Job(n, n, {}, 4), {})

    feeder: Feeder[Job] = Feeder(Sender(), ONE, window, Queue())  # type: ignore[arg-type]
    feeder.start(source)
    assert not third.wait(0.1)
    assert read == [0, 1, 2]
    window.release(4)
    assert third.wait(5)


@pytest.mark.parametrize("size", [1, 100])
def test_a_single_job_always_has_room(size: int) -> None:
    window = Window(n_jobs=1, n_bytes=10)
    window.acquire(size)
    window.release(size)
    window.acquire(size)
