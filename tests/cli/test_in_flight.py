"""Many in flight: what is the same for the records of `gen --batch` and the texts of `embed`."""

from __future__ import annotations

import base64
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

import myllm.client
from myllm import events
from myllm.cli import myllm as root
from myllm.cli.feeder import Asked, Asking, Job, Refused
from myllm.cli.in_flight import Answers, Connected, InFlight
from myllm.cli.ordering import InOrder
from myllm.cli.progress import Progress
from myllm.errors import BadDataError, InternalError, IOFailureError, MyllmError, UnavailableError

from .conftest import Captured, ScriptedClient

COMMANDS = {"gen": ("gen", "--batch"), "embed": ("embed", "--input", "lines")}
VECTOR = base64.b64encode(struct.pack("<f", 1)).decode()

Asker = Callable[..., tuple[list[dict[str, Any]], Any, str]]


def answered(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a Runtime says to a request of either command."""
    if "prompt" in request:
        return [{"done": True, "full_text": request["prompt"], "finish_reason": "stop"}]
    items = [
        {"item": n, "chunk": 0, "start": 0, "end": len(text), "tokens": 1, "embedding": VECTOR}
        for n, text in enumerate(request["texts"])
    ]
    return [*items, {"done": True}]


def failed(request: dict[str, Any], error: MyllmError) -> list[dict[str, Any]]:
    return [events.failed(error)]


@pytest.fixture(params=COMMANDS)
def ask(
    request: pytest.FixtureRequest, captured: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> Asker:
    """Runs either command, a request a record, on a script: records, exit status or error, stderr."""

    def run(answer: Callable[..., Any], stdin: bytes, *arguments: str) -> tuple[list[Any], Any, str]:
        monkeypatch.setattr("myllm.cli.vector_records.GROUP", 1)
        monkeypatch.setattr(myllm.client, "connect", lambda settings, note, **how: ScriptedClient(answer))
        files = captured(stdin)
        command = [*COMMANDS[request.param], *arguments]
        try:
            status: Any = root.main(command, "myllm", standalone_mode=False, obj=files.streams)
        except MyllmError as error:
            status = error
        return [orjson.loads(line) for line in files.out.splitlines()], status, files.err

    return run


def text_of(request: dict[str, Any]) -> str:
    return str(request.get("prompt") or request["texts"][0])


def test_a_connection_lost_in_the_middle_gives_the_rest_error_records(ask: Asker) -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        return [UnavailableError("gone")] if text_of(request) == "3" else answered(request)

    records, status, said = ask(answer, b"1\n2\n3\n4\n5\n")
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    assert [record.get("error", {}).get("code") for record in records] == [None, None, *["unavailable"] * 3]
    assert (status, "3 of 5" in said) == (1, True)


def test_a_connection_lost_before_anything_was_done_is_its_error_alone(ask: Asker) -> None:
    records, status, _ = ask(lambda request: UnavailableError("gone"), b"1\n2\n")
    assert (records, status.exit_status) == ([], 69)


def test_an_error_that_none_can_escape_ends_a_run_that_has_no_answer(ask: Asker) -> None:
    records, status, _ = ask(lambda request: {"done": True, "error": {"code": "config"}}, b"1\n2\n")
    assert (records, status.exit_status) == ([], 78)


@pytest.mark.parametrize(("code", "status"), [("worker_crashed", 69), ("internal", 70), ("try_again", 75)])
def test_where_all_fail_alike_and_not_by_their_own_fault_the_status_says_why(
    ask: Asker, code: str, status: int
) -> None:
    error = {"code": code, "message": "m"}
    records, ended, _ = ask(lambda request: {"done": True, "error": error}, b"1\n2\n")
    assert [record["error"]["code"] for record in records] == [code, code]
    assert ended.exit_status == status
    records, ended, _ = ask(lambda request: {"done": True, "error": error}, b"1\n\xff\n2\n")
    assert (len(records), ended) == (3, 1)


def test_where_all_lines_are_bad_the_status_is_that_of_records_that_failed(ask: Asker) -> None:
    records, status, _ = ask(answered, b"\xff\n\xfe\n")
    assert ([record["error"]["code"] for record in records], status) == (["bad_data"] * 2, 1)


def test_a_note_of_the_runtime_is_said_once(ask: Asker) -> None:
    _, status, said = ask(lambda request: [{"note": "the disk is full"}, *answered(request)], b"1\n2\n")
    assert (status, said) == (0, "myllm: the disk is full\n")


def test_the_bar_of_a_model_that_loads_stays_until_there_is_an_answer(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    for name in ("preparing", "records", "texts"):
        monkeypatch.setattr(Progress, name, lambda self, *what, name=name, **how: shown.append(name))

    loading = [{"loading": 0.1}, {"loading": 0.9}]
    ask(lambda request: [*loading, *answered(request)], b"1\n")
    assert shown[:2] == ["preparing", "preparing"]
    assert "preparing" not in shown[2:]
    assert shown[2:]


def test_thousands_flow_through_a_small_window(ask: Asker) -> None:
    records, status, _ = ask(answered, b"".join(b"%d\n" % n for n in range(3000)))
    assert ([record["index"] for record in records], status) == (list(range(3000)), 0)


def test_an_input_that_fails_does_so_after_the_answers_to_what_was_read_and_the_statistics(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(self: object, awaited: str) -> Iterator[bytes]:
        yield b"1\n2\n"
        raise IOFailureError("stdin: broken")

    monkeypatch.setattr("myllm.cli.console.Streams.chunks", chunks)
    records, error, said = ask(answered, b"", "-v")
    assert [record["index"] for record in records] == [0, 1]
    assert (error.code, said.count("\n")) == ("io", 1)


# ── the loop by itself ──────────────────────────────────────────────────────────────────────


class Echo(Answers[Job]):
    """Writes the index of each job, and of one that failed its error's code."""

    def __init__(self, write: Callable[[bytes], None] = lambda data: None) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self._write = write

    def item(self, job: Job, event: dict[str, Any]) -> bytes:
        self.tally.answered = True
        return b"%d " % job.index

    def done(self, job: Job, event: dict[str, Any]) -> bytes:
        if error := event.get("error"):
            self.tally.fail(BadDataError("m"))
            return f"{job.index}:{error['code']} ".encode()
        self.tally.answered = True
        return b"%d. " % job.index

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self._write(data)


def flight(
    client: Any, answers: Answers[Job], n_jobs: int = 1, advanced: Callable[[], None] = lambda: None
) -> InFlight[Job]:
    class Unseen:
        def preparing(self, event: dict[str, Any]) -> None: ...
        def close(self) -> None: ...

    side = Connected(client, Unseen(), print)  # type: ignore[arg-type]
    return InFlight(side, Asking(lambda texts: {"n": len(texts)}, n_jobs), answers, InOrder(), advanced)


def job(index: int, size: int = 1) -> Asked[Job]:
    return Asked(Job(index, index, {}, size), None)


@pytest.mark.parametrize("n_jobs", [1, 64])
def test_what_has_arrived_goes_out_before_more_is_waited_for(n_jobs: int) -> None:
    written = threading.Event()
    in_time: list[bool] = []

    def source(idle: Callable[[], None]) -> Iterator[Asked[Job]]:
        yield job(0)
        idle()
        in_time.append(written.wait(5))
        yield job(1)

    answers = Echo(lambda data: written.set())
    flight(ScriptedClient(lambda request: {"done": True}), answers, n_jobs).run(source)
    assert in_time == [True]
    assert b"".join(answers.written) == b"0. 1. "


class Vanishing:
    """A client whose connection is lost after a part of the answer to a request of two jobs."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def send(self, request: dict[str, Any]) -> None:
        self._asked.set()

    def batches(self) -> Iterator[list[bytes]]:
        assert self._asked.wait(5)
        yield [orjson.dumps({"id": 0, "item": 0})]
        raise UnavailableError("connection lost")


def test_what_came_before_a_connection_is_lost_is_written_though_the_loss_is_known_by_then() -> None:
    answers = Echo()
    before = threading.enumerate()

    def when_all_is_heard() -> None:
        for thread in threading.enumerate():
            if thread.name == "listener" and thread not in before:
                thread.join(5)

    flight(Vanishing(), answers, 2, when_all_is_heard).run(lambda idle: [job(0), job(1)])
    assert b"".join(answers.written) == b"0 0:unavailable 1:unavailable "


def test_a_bug_in_the_source_ends_the_run() -> None:
    def source(idle: Callable[[], None]) -> Iterator[Asked[Job]]:
        yield job(0)
        raise KeyError("bug")

    with pytest.raises(InternalError, match="feeder: KeyError"):
        flight(ScriptedClient(lambda request: {"done": True}), Echo(), 64).run(source)


def test_a_bug_in_the_listener_ends_the_run_after_what_came_before_is_written() -> None:
    class Broken(Vanishing):
        def batches(self) -> Iterator[list[bytes]]:
            yield from [next(super().batches())]
            raise KeyError("bug")

    answers = Echo()
    with pytest.raises(InternalError, match="listener: KeyError"):
        flight(Broken(), answers, 2).run(lambda idle: [job(0), job(1)])
    assert answers.written == [b"0 "]


def test_what_asks_for_nothing_fails_alone_and_in_its_place() -> None:
    answers = Echo()
    refused = Refused(Job(1, 1, {}, 1), {"code": "bad_data"})
    flight(ScriptedClient(lambda request: [{"done": True}]), answers).run(
        lambda idle: [job(0), refused, job(2)]
    )
    assert b"".join(answers.written) == b"0. 1:bad_data 2. "
    assert (answers.tally.n_ended, answers.tally.n_failed, answers.tally.n_refused) == (3, 1, 1)


@pytest.mark.parametrize("n_jobs", [1, 64])
def test_reading_is_as_far_ahead_of_a_stdout_that_nobody_reads_as_the_window_allows(n_jobs: int) -> None:
    reading = threading.Event()
    read: list[int] = []

    def source(idle: Callable[[], None]) -> Iterator[Asked[Job]]:
        for n in range(2000):
            read.append(n)
            yield job(n)

    def write(data: bytes) -> None:
        reading.wait(5)

    answers = Echo(write)
    run = flight(ScriptedClient(lambda request: {"done": True} | request), answers, n_jobs)
    thread = threading.Thread(target=run.run, args=(source,))
    thread.start()
    n_read = -1
    while n_read != len(read):  # until it stands still
        n_read = len(read)
        time.sleep(0.05)
    assert 256 <= n_read < 1000
    reading.set()
    thread.join(10)
    assert answers.tally.n_ended == 2000
