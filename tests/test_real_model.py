"""`myllm gen` as people and scripts use it, on the real model: at a tenth in CI, whole under `slow`."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.bench.processes import tree_pss

pytestmark = pytest.mark.model

MYLLM = [sys.executable, "-m", "myllm"]
MEBIBYTE = 1 << 20
PSS_LIMIT = 600_000_000
"""Bytes that all processes of a batch may have at their peak (proportional set size)."""
WORDS = ("the quick brown fox jumps over a lazy dog while engineers measure pipes and rivers of text").split()  # noqa: SIM905 - a list of these is a page
SIZES = [20, pytest.param(200, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def pulled(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data folder that has the model; the network must not be needed."""
    monkeypatch.setenv("XDG_DATA_HOME", str(smollm2_path.parents[2]))
    monkeypatch.setenv("MYLLM_OFFLINE", "1")


def gen(*arguments: object, stdin: str | bytes = b"") -> list[dict[str, Any]]:
    """The lines of a `myllm gen` that succeeded."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    ended = subprocess.run([*MYLLM, "gen", *map(str, arguments)], input=data, capture_output=True, check=True)
    return [orjson.loads(line) for line in ended.stdout.splitlines()]


def mixed_prompts(count: int) -> list[dict[str, Any]]:
    """Records of some 100 tokens each on average: mostly short, a few of about 1,500 tokens."""
    rng = random.Random(7)
    lengths = [1400 if index % 50 == 17 else rng.randint(10, 90) for index in range(count)]
    return [
        {"key": f"k{index}", "prompt": f"Item {index}: {' '.join(rng.choices(WORDS, k=length))}"}
        for index, length in enumerate(lengths)
    ]


def as_lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def peak_pss(process: subprocess.Popen[bytes]) -> int:
    """Bytes (PSS) of the process and its descendants at their peak, watched until it ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_pss(process.pid))
        time.sleep(0.2)
    return peak


def test_a_stream_is_as_documented_and_the_same_every_time() -> None:
    question = "Why do Unix pipes matter?\n"
    first, second = (gen("--max-tokens", 32, "--seed", 7, stdin=question) for _ in range(2))
    *tokens, done = first
    assert all(set(event) == {"token", "done"} and event["done"] is False for event in tokens)
    assert set(done) == {"done", "full_text", "model", "finish_reason", "usage", "timings", "seed"}
    assert "".join(event["token"] for event in tokens) == done["full_text"]
    assert (done["model"], done["finish_reason"], done["seed"]) == ("smollm2", "length", 7)
    assert done["usage"]["completion_tokens"] == 32
    assert set(done["timings"]) == {
        "queue_ms",
        "load_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms",
        "tokens_per_second",
    }
    assert (tokens, done["full_text"]) == (second[:-1], second[-1]["full_text"])
    n_prompt = done["usage"]["prompt_tokens"]
    assert [ended["usage"].pop("cached_tokens") for ended in (done, second[-1])] == [0, n_prompt - 1]
    assert done["usage"] == second[-1]["usage"]


def test_text_mode_prints_the_text_only() -> None:
    text = gen("--max-tokens", 8, "--seed", 7, stdin="Say hi")[-1]["full_text"]
    ended = subprocess.run(
        [*MYLLM, "gen", "-t", "--max-tokens", "8", "--seed", "7"],
        input=b"Say hi",
        capture_output=True,
        check=True,
    )
    assert ended.stdout.decode() == text.rstrip("\n") + "\n"
    assert ended.stderr == b""


@pytest.mark.parametrize("count", SIZES)
def test_a_batch_answers_every_record_in_order_within_its_memory(count: int, tmp_path: Path) -> None:
    records = mixed_prompts(count)
    (tmp_path / "in").write_bytes(as_lines(records))
    command = [*MYLLM, "gen", "--batch", "--max-tokens", "24"]
    with (tmp_path / "in").open("rb") as stdin, (tmp_path / "out").open("wb") as stdout:
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout)
        peak = peak_pss(process)
    assert process.returncode == 0
    answers = [orjson.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    assert [answer["index"] for answer in answers] == list(range(count))
    assert [answer["key"] for answer in answers] == [record["key"] for record in records]
    for answer in answers:
        assert answer["usage"]["completion_tokens"] <= 24
        assert answer["finish_reason"] in ("stop", "length")
    longest = max(answer["usage"]["prompt_tokens"] for answer in answers)
    assert longest > 1300
    print(f"{count} prompts: {sum(a['usage']['prompt_tokens'] for a in answers)} tokens, {peak:,} bytes PSS")
    assert peak <= PSS_LIMIT


@pytest.mark.parametrize("count", SIZES)
def test_a_killed_batch_is_resumed_with_nothing_twice_and_nothing_missing(count: int, tmp_path: Path) -> None:
    stdin, out = tmp_path / "in", tmp_path / "out"
    stdin.write_bytes(as_lines(mixed_prompts(count)))
    command = [*MYLLM, "gen", "--batch", "--max-tokens", "8"]
    with stdin.open("rb") as source, out.open("wb") as target:
        process = subprocess.Popen(command, stdin=source, stdout=target)
        wait_until(lambda: out.read_bytes().count(b"\n") >= count // 4, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = out.read_bytes().count(b"\n")
    assert before < count
    with stdin.open("rb") as source, out.open("ab") as target:
        subprocess.run([*command, "--resume", out], stdin=source, stdout=target, check=True)
    answers = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(answer["index"] for answer in answers) == list(range(count))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "the batch ended before it could be killed"
        time.sleep(0.05)


def test_unordered_and_streamed_batches_lose_nothing() -> None:
    records = mixed_prompts(12)
    unordered = gen("--batch", "--unordered", "--max-tokens", 6, stdin=as_lines(records))
    assert sorted(answer["index"] for answer in unordered) == list(range(12))
    streamed = gen("--batch", "--stream", "--max-tokens", 6, stdin=as_lines(records))
    done = [event for event in streamed if event["done"]]
    assert [event["index"] for event in done] == list(range(12))
    for answer in done:
        tokens = [e["token"] for e in streamed if not e["done"] and e["index"] == answer["index"]]
        assert "".join(tokens) == answer["full_text"]


def test_a_map_prefills_its_shared_prefix_once() -> None:
    task = "You sort texts by topic. " * 20 + "Text: {}"
    answers = gen("--map", task, "--max-tokens", 3, stdin="apples\npears\nplums\ncherries\n")
    shared = sum(answer["usage"]["cached_tokens"] > 80 for answer in answers)
    assert (len(answers), shared) == (4, 3)


def test_a_reader_that_has_enough_ends_the_generation_quietly() -> None:
    command = " ".join([*MYLLM, "gen", "-n", "--ignore-eos", "'Tell me a long story'", "| head -1"])
    started = time.monotonic()
    ended = subprocess.run(command, shell=True, capture_output=True, check=True)
    assert time.monotonic() - started < 60
    assert ended.stdout.count(b"\n") == 1
    assert ended.stderr == b""
