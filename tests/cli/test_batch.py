"""Many prompts: one record an input whatever happens, on scripted models and on a scripted connection."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

import myllm.client
from myllm.cli import myllm as root
from myllm.errors import MyllmError

from .conftest import MYLLM, Captured, Run, ScriptedClient

FakeModel = Callable[..., Path]


def jsonl(*records: object) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


# ── with a worker ───────────────────────────────────────────────────────────────────────────


def test_records_come_in_order_with_their_own_keys(run: Run, fake_model: FakeModel) -> None:
    inputs = [{"id": f"r{n}", "text": "w " * (20 - n), "label": n} for n in range(20)]
    ended = run("gen", "--batch", "-m", fake_model(), stdin=jsonl(*inputs))
    assert (ended.status, ended.err) == (0, "")
    assert [record["index"] for record in ended.lines] == list(range(20))
    for given, record in zip(inputs, ended.lines, strict=True):
        assert {key: record[key] for key in given} == given
        assert record["full_text"] == given["text"]
        assert record["done"] is True
        assert record["usage"]["completion_tokens"] > 0
        assert len(record["input_hash"]) == 16


def test_unordered_records_come_as_they_end(run: Run, fake_model: FakeModel) -> None:
    inputs = [{"text": "w " * 400}, {"text": "short"}]
    model = fake_model(ms_per_token=1)
    ended = run("gen", "--batch", "--unordered", "-m", model, stdin=jsonl(*inputs))
    assert [record["index"] for record in ended.lines] == [1, 0]
    ended = run("gen", "--batch", "-m", model, stdin=jsonl(*inputs))
    assert [record["index"] for record in ended.lines] == [0, 1]


def test_a_bad_line_is_one_error_record_and_the_rest_is_done(run: Run, fake_model: FakeModel) -> None:
    stdin = (
        jsonl({"text": "one"})
        + b'{"id":7,"text":'
        + b"\n"
        + jsonl({"id": 8, "x": 1})
        + b'\xff"\n\n'
        + jsonl({"text": "two"})
    )
    ended = run("gen", "--batch", "-m", fake_model(), stdin=stdin)
    assert ended.status == 1
    assert [record.get("full_text") for record in ended.lines] == ["one", None, None, None, "two"]
    assert [record["index"] for record in ended.lines] == [0, 1, 2, 3, 4]
    assert {record["error"]["code"] for record in ended.lines[1:4]} == {"bad_data"}
    assert (ended.lines[2]["id"], ended.lines[2]["x"]) == (8, 1)
    assert ended.err == "myllm: 3 of 5 records failed; each says why in its error\n"


def test_a_record_may_carry_parameters_and_a_bad_one_fails_alone(run: Run, fake_model: FakeModel) -> None:
    stdin = jsonl({"text": "a b c", "max_tokens": 1}, {"text": "x", "temperature": "hot"}, {"text": "a b c"})
    ended = run("gen", "--batch", "-m", fake_model(), "--max-tokens", 2, stdin=stdin)
    assert ended.status == 1
    assert [record.get("full_text") for record in ended.lines] == ["a", None, "a b"]
    assert ended.lines[1]["error"]["code"] == "usage"


def test_map_puts_each_text_in_and_obeys_no_parameters(run: Run, fake_model: FakeModel) -> None:
    stdin = jsonl({"text": "one {}", "max_tokens": 0, "model": "other"})
    ended = run("gen", "--map", "<{}|{{}}>", "-m", fake_model(), stdin=stdin)
    assert ended.lines[0]["full_text"] == "<one {}|{}>"
    assert ended.lines[0]["max_tokens"] == 0


def test_map_over_lines_as_text_is_a_line_each(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-t", "--map", "N {}", "-m", fake_model(), stdin=b"1\n\n2\r\n3")
    assert ended.out == b"N 1\nN 2\nN 3\n"


def test_stream_prints_tokens_by_index_and_in_order(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "--map", "{}", "--stream", "-m", fake_model(), stdin=b"a b\nc d e\n")
    assert [(line["index"], line.get("token")) for line in ended.lines] == [
        *((0, token) for token in ("a", " b", None)),
        *((1, token) for token in ("c", " d", " e", None)),
    ]


def test_a_batch_reads_a_batch(run: Run, fake_model: FakeModel) -> None:
    stdin = jsonl({"id": 1, "prompt": "question"}, {"id": 2})
    first = run("gen", "--batch", "--stream", "-m", fake_model(tokens=["answer"]), stdin=stdin)
    second = run("gen", "--map", "<{}>", "-m", fake_model(), stdin=first.out)
    assert [(record["index"], record["id"], record.get("full_text")) for record in second.lines] == [
        (0, 1, "<answer>"),
        (1, 2, None),
    ]
    assert second.status == 1


def test_messages_are_answered_and_counted(run: Run, fake_model: FakeModel) -> None:
    stdin = jsonl({"messages": [{"role": "user", "content": "a b c"}]})
    assert run("gen", "--batch", "-m", fake_model(), stdin=stdin).lines[0]["full_text"] == "a b c"
    assert run("gen", "--batch", "--count", "-t", "-m", fake_model(), stdin=stdin).out == b"3\n"


def test_an_empty_input_is_no_records(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "--batch", "-m", fake_model(), stdin=b"\n\n")
    assert (ended.status, ended.out) == (0, b"")


def test_a_model_that_is_not_there_ends_the_batch_with_its_own_status(run: Run) -> None:
    ended = run("gen", "--batch", "-m", "nosuch", stdin=jsonl(*({"text": "x"} for _ in range(50))))
    assert (ended.status, ended.out) == (66, b"")
    assert "nosuch" in ended.err


def test_a_hundred_megabyte_line_is_one_error_record_in_little_memory(
    run: Run, fake_model: FakeModel, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    with file.open("wb") as out:
        out.write(b'{"text":"a"}\n{"text":"')
        for _ in range(100):
            out.write(b"x" * 2**20)
        out.write(b'"}\n{"text":"b"}\n')
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (400 * 2**20,) * 2); "
    start = limit + "sys.argv[0] = 'myllm'; from myllm.__main__ import main; main()"
    with file.open("rb") as stdin:
        ended = subprocess.run(
            [MYLLM[0], "-c", start, "gen", "--batch", "-m", str(fake_model())],
            stdin=stdin,
            capture_output=True,
            check=False,
        )
    records = [orjson.loads(line) for line in ended.stdout.splitlines()]
    assert [record.get("full_text") for record in records] == ["a", None, "b"]
    assert "longer than" in records[1]["error"]["message"]
    assert ended.returncode == 1


def test_statistics_and_a_bar_are_on_stderr(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "--map", "{}", "-v", "--progress", "-m", fake_model(), stdin=b"a b\nc\n")
    assert "2 records, 0 failed, 0 done before; 3 tokens in" in ended.err
    assert "records/s" in ended.err.replace(" records", "records")
    assert len(ended.lines) == 2


def test_killed_in_the_middle_and_resumed_nothing_is_missing_and_nothing_twice(
    fake_model: FakeModel, tmp_path: Path
) -> None:
    inputs, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    inputs.write_bytes(jsonl(*({"id": n, "text": f"record {n} " + "w " * (n % 7)} for n in range(300))))
    out.touch()
    model = fake_model(ms_per_token=2, parallel=8)
    command = [*MYLLM, "gen", "--batch", "--resume", str(out), "-m", str(model)]

    def start() -> subprocess.Popen[bytes]:
        with inputs.open("rb") as stdin, out.open("ab") as stdout:
            return subprocess.Popen(command, stdin=stdin, stdout=stdout)

    for wanted in (40, 120):
        process = start()
        while out.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        with out.open("ab") as torn:
            torn.write(b'{"index":299,"id":299,"te')
    assert start().wait(60) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["index"] for record in records) == list(range(300))
    assert all(
        record["id"] == record["index"] and record["full_text"] == record["text"] for record in records
    )


def test_resume_prints_what_is_missing_and_tries_errors_again(
    run: Run, fake_model: FakeModel, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    first = run("gen", "--batch", "-m", fake_model(), stdin=b'{"text":"a"}\nbad\n{"text":"c"}\n')
    out.write_bytes(first.out)
    second = run(
        "gen", "--batch", "--resume", out, "-m", fake_model(), stdin=b'{"text":"a"}\nbad\n{"text":"C"}\n'
    )
    assert [(record["index"], record.get("full_text")) for record in second.lines] == [(1, None), (2, "C")]
    assert "1 records of the file to resume were of other input lines" in second.err


# ── on a scripted connection ────────────────────────────────────────────────────────────────


@pytest.fixture
def batch(captured: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `gen --batch` here on a scripted connection; returns the records and the exit status."""

    def run(answer: Callable[..., Any], stdin: bytes, *arguments: str) -> tuple[list[dict[str, Any]], int]:
        monkeypatch.setattr(myllm.client, "connect", lambda settings, note, **how: ScriptedClient(answer))
        files = captured(stdin)
        try:
            with root.make_context("myllm", ["gen", "--batch", *arguments], obj=files.streams) as context:
                status = root.invoke(context)
        except MyllmError as error:
            status = error.exit_status
        return [orjson.loads(line) for line in files.out.splitlines()], status

    return run


def ok(request: dict[str, Any]) -> dict[str, Any]:
    return {"done": True, "full_text": request["prompt"], "finish_reason": "stop", "usage": {}}


def failing(code: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda request: {"done": True, "error": {"code": code, "message": "m"}}


def test_requests_are_patient_and_carry_no_foreign_id(batch: Callable[..., Any]) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return ok(request)

    batch(answer, b'{"id":"mine","text":"a"}\n', "--top-k", "5")
    assert asked == [{"op": "gen", "top_k": 5, "priority": 1, "stream": False, "prompt": "a", "id": 0}]


@pytest.mark.parametrize(
    ("code", "status"), [("worker_crashed", 69), ("bad_data", 65), ("context_overflow", 1), ("usage", 1)]
)
def test_where_all_fail_alike_and_not_by_their_own_fault_the_status_says_why(
    batch: Callable[..., Any], code: str, status: int
) -> None:
    records, ended = batch(failing(code), b"1\n2\n")
    assert [record["error"]["code"] for record in records] == [code, code]
    assert ended == status


def test_an_answer_cut_by_the_deadline_counts_as_failed(batch: Callable[..., Any]) -> None:
    records, status = batch(lambda request: {**ok(request), "finish_reason": "deadline"}, b"1\n")
    assert records[0]["full_text"] == "1"
    assert status == 1


def test_our_keys_win_over_those_of_the_record(batch: Callable[..., Any]) -> None:
    theirs = {
        "full_text": "mine",
        "index": 9,
        "input_hash": "x",
        "error": "e",
        "done": 5,
        "finish_reason": "q",
    }
    (record,), status = batch(ok, jsonl({"text": "a", **theirs}))
    assert (record["index"], record["full_text"], record["done"], status) == (0, "a", True, 0)
    assert record["finish_reason"] == "stop"
    assert record["input_hash"] != "x"
    assert "error" not in record


def test_thousands_of_records_flow_through_a_small_window(batch: Callable[..., Any]) -> None:
    records, status = batch(ok, b"".join(b"%d\n" % n for n in range(3000)))
    assert [record["full_text"] for record in records] == [str(n) for n in range(3000)]
    assert status == 0
