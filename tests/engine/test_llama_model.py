"""The engine on the real model, against llama-cpp-python's own high-level loop and against itself alone."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from myllm.engine import open_engine
from myllm.engine.context import Context
from myllm.errors import BadDataError, ContextOverflowError
from myllm.requests import Arrival, GenRequest, LoadOptions

pytestmark = pytest.mark.model

QUESTIONS = (
    "Why do Unix pipes matter?",
    "Name three colours.",
    "Write a haiku about the sea.",
    "What is 2 + 2?",
    "Translate 'good morning' into French.",
    "def fibonacci(n):",
    "List the planets of the solar system in order.",
    "Explain recursion to a child.",
    "Was ist ein Prozess?",
    "Who wrote Hamlet, and when?",
    "Give me a recipe for pancakes.",
    "日本の首都はどこですか。",
)
GREEDY = {"temperature": 0.0}


class Harness:
    """An engine and the events it emits, gathered by request."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.events: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
        self.path = path
        self.engine = open_engine(path, LoadOptions(**options), self.events.put, lambda _: None)

    def prompt(self, question: str) -> list[int]:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return self.engine.tokenizer.encode(text, special=True)

    def submit(self, request_id: int, question: str, **fields: Any) -> None:
        request = GenRequest(prompt=question, **fields)
        self.engine.submit(request, self.prompt(question), Arrival(request_id, time.monotonic()))

    def gather(self, n_requests: int) -> dict[int, list[dict[str, Any]]]:
        """Events by request until `n_requests` are done."""
        gathered: dict[int, list[dict[str, Any]]] = {}
        done = 0
        while done < n_requests:
            for event in self.events.get(timeout=120):
                gathered.setdefault(event["id"], []).append(event)
                done += event["done"]
        return gathered

    def run(self, question: str, **fields: Any) -> list[dict[str, Any]]:
        self.submit(0, question, **fields)
        return self.gather(1)[0]


@pytest.fixture
def harness(smollm2_path: Path) -> Iterator[Harness]:
    """One engine at a time: with two in a process, OpenMP sees more threads than cores and stops spinning."""
    harness = Harness(smollm2_path, threads=2)
    yield harness
    harness.engine.close()


def reference(path: Path, prompts: list[list[int]], n_tokens: int) -> list[dict[str, list[Any]]]:
    """Greedy tokens and log-probabilities by the high-level `Llama` class, in a process of its own."""
    script = Path(__file__).with_name("reference.py")
    request = json.dumps({"path": str(path), "prompts": prompts, "n_tokens": n_tokens})
    done = subprocess.run([sys.executable, script], input=request, capture_output=True, text=True, check=True)
    answers: list[dict[str, list[Any]]] = json.loads(done.stdout)
    return answers


def test_greedy_tokens_and_logprobs_are_those_of_an_independent_loop(
    harness: Harness, smollm2_path: Path
) -> None:
    """Each prompt alone, in an empty cache, as the reference runs it."""
    n_tokens = 16
    answers = reference(smollm2_path, [harness.prompt(q) for q in QUESTIONS], n_tokens)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        events = harness.run(question, max_tokens=n_tokens, sampling=GREEDY, logprobs=0)
        expected = harness.engine.tokenizer.decode(answer["tokens"])
        assert "".join(e["token"] for e in events[:-1]) == expected, question
        logprobs = [e["logprob"] for e in events if "logprob" in e]
        assert logprobs == pytest.approx(answer["logprobs"], abs=1e-3), question


def answers_of(harness: Harness, questions: list[str]) -> list[list[dict[str, Any]]]:
    """Token events of all questions asked at once, with log-probabilities of 20 candidates."""
    for request_id, question in enumerate(questions):
        harness.submit(request_id, question, max_tokens=8, sampling=GREEDY, logprobs=20)
    gathered = harness.gather(len(questions))
    answers = [gathered[request_id] for request_id in range(len(questions))]
    return [[{**e, "id": 0} for e in events if "logprob" in e] for events in answers]


def largest_difference(together: list[dict[str, Any]], alone: list[dict[str, Any]]) -> float:
    """Of the log-probabilities that both name, as long as both took the same tokens."""
    largest = 0.0
    for a, b in zip(together, alone, strict=False):
        # A token that is only part of a character has no text of its own to be known by.
        named = [
            {e["token"]: e["logprob"] for e in x["top_logprobs"] if e["token"].isascii()} for x in (a, b)
        ]
        common = [(named[0][token], named[1][token]) for token in named[0].keys() & named[1].keys()]
        largest = max([largest, *(abs(x - y) for x, y in common)])
        if a["token"] != b["token"]:
            break
    return largest


@pytest.mark.parametrize(("flash_attn", "tolerance"), [("off", 1e-4), ("auto", 2.0)])
def test_log_probabilities_in_a_batch_of_16_are_those_of_each_prompt_alone(
    smollm2_path: Path, flash_attn: str, tolerance: float
) -> None:
    """Exact with `--flash-attn off`; with it on, low bits differ with the batch, by up to 0.6 measured."""
    questions = [f"{QUESTIONS[i % len(QUESTIONS)]} {'Please. ' * (3 * i)}" for i in range(16)]
    batched = Harness(smollm2_path, threads=2, flash_attn=flash_attn)
    together = answers_of(batched, questions)
    batched.engine.close()
    solo = Harness(smollm2_path, threads=2, flash_attn=flash_attn, parallel=1)
    alone = [answers_of(solo, [question])[0] for question in questions]
    solo.engine.close()
    difference = max(map(largest_difference, together, alone))
    print(f"flash attention {flash_attn}: log-probabilities differ by {difference:.6f} at most")
    assert difference <= tolerance
    if flash_attn == "off":
        assert together == alone


def test_the_same_seed_gives_the_same_text(harness: Harness) -> None:
    first, second = (
        [e for e in harness.run(QUESTIONS[0], max_tokens=12, seed=7) if not e["done"]] for _ in range(2)
    )
    other = [e for e in harness.run(QUESTIONS[0], max_tokens=12, seed=8) if not e["done"]]
    assert first == second != other


def test_cached_tokens_are_those_that_were_not_prefilled(harness: Harness) -> None:
    used = [harness.run(QUESTIONS[0], max_tokens=1, sampling=GREEDY)[-1]["usage"] for _ in range(2)]
    assert used[0]["cached_tokens"] == 0
    assert used[1]["cached_tokens"] == used[1]["prompt_tokens"] - 1


def test_many_requests_share_their_prefix_and_all_finish(harness: Harness) -> None:
    beginning = "You are a terse assistant. " * 40
    for request_id in range(6):
        harness.submit(request_id, f"{beginning}{QUESTIONS[request_id]}", max_tokens=4, sampling=GREEDY)
    done = [events[-1] for events in harness.gather(6).values()]
    assert [d["usage"]["completion_tokens"] <= 4 for d in done] == [True] * 6
    assert sum(d["usage"]["cached_tokens"] > 200 for d in done) == 5


def test_the_cache_grows_under_a_running_request_without_changing_its_answer(harness: Harness) -> None:
    question = "Count from one to two hundred in words."
    fields: dict[str, Any] = {"max_tokens": 40, "sampling": GREEDY}
    expected = harness.run(question, **fields)[-1]["full_text"]
    harness.engine.close()
    grown = Harness(harness.path, threads=2)
    grown.submit(0, question, **fields)
    grown.events.get(timeout=60)
    cells_before = grown.engine.status()["context"]
    grown.submit(1, "word " * 700, max_tokens=2, sampling=GREEDY)
    answer = grown.gather(2)[0][-1]["full_text"]
    assert grown.engine.status()["context"] > cells_before
    grown.engine.close()
    # Low bits change with the neighbour's prompt beside it, so that a late word may differ.
    assert answer[:60] == expected[:60]


def test_a_crowd_of_short_requests_is_answered_in_streams(harness: Harness) -> None:
    for request_id in range(40):
        question = QUESTIONS[request_id % len(QUESTIONS)]
        harness.submit(request_id, question, max_tokens=4, priority=1, stream=False)
    done = harness.gather(40)
    assert all(len(events) == 1 and events[0]["done"] for events in done.values())
    assert harness.engine.status()["layout"] == "Crowd"


def test_somebody_at_a_terminal_does_not_wait_for_a_crowd_and_it_loses_nothing(harness: Harness) -> None:
    for request_id in range(32):
        question = QUESTIONS[request_id % len(QUESTIONS)]
        harness.submit(request_id, question, max_tokens=24, ignore_eos=True, priority=1)
    first = harness.events.get(timeout=120)
    assert harness.engine.status()["layout"] == "Crowd"
    harness.submit(99, "Say hi.", max_tokens=300, ignore_eos=True)  # more than a crowd's slot holds
    order: list[int] = []
    seen: dict[int, list[dict[str, Any]]] = {}
    for event in first:
        seen.setdefault(event["id"], []).append(event)
    while len(order) < 33:
        for event in harness.events.get(timeout=120):
            seen.setdefault(event["id"], []).append(event)
            order += [event["id"]] if event["done"] else []
        if len(seen.get(99, [])) >= 3:
            harness.engine.cancel(99)
    assert order[0] == 99
    for *tokens, done in seen.values():
        assert "".join(event["token"] for event in tokens) == done["full_text"]
        assert done["usage"]["completion_tokens"] == 24 or done["id"] == 99


def test_a_stop_string_ends_the_answer_before_itself(harness: Harness) -> None:
    whole = harness.run(QUESTIONS[1], max_tokens=24, sampling=GREEDY)[-1]["full_text"]
    stop = whole[10:14]
    done = harness.run(QUESTIONS[1], max_tokens=24, sampling=GREEDY, stop=[stop])[-1]
    assert done["finish_reason"] == "stop"
    assert done["full_text"] == whole[: whole.index(stop)]


def test_a_cancelled_request_says_so_and_the_others_go_on(harness: Harness) -> None:
    harness.submit(0, QUESTIONS[4], max_tokens=2000)
    harness.submit(1, QUESTIONS[5], max_tokens=8)
    harness.engine.cancel(0)
    events = harness.gather(2)
    assert events[0][-1]["finish_reason"] == "cancelled"
    assert events[1][-1]["finish_reason"] in ("length", "stop")
    assert harness.engine.status()["busy"] == 0


def test_a_deadline_gives_what_there_is(harness: Harness) -> None:
    done = harness.run(QUESTIONS[6], max_tokens=5000, ignore_eos=True, deadline_ms=300)[-1]
    assert done["finish_reason"] == "deadline"
    assert done["usage"]["completion_tokens"] >= 1


def test_a_prompt_over_the_window_is_refused_with_both_numbers(harness: Harness) -> None:
    harness.submit(0, "word " * 9000, max_tokens=1)
    error = harness.gather(1)[0][-1]["error"]
    assert error["code"] == ContextOverflowError.code
    assert "9,0" in error["message"]
    assert "8,192" in error["message"]


def test_every_sampling_parameter_reaches_llama_cpp(harness: Harness) -> None:
    unusual = {
        "repeat_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "dry_multiplier": 0.8,
        "top_n_sigma": 2.0,
        "typical_p": 0.9,
        "xtc_probability": 0.5,
        "dynatemp_range": 0.3,
    }
    for sampling in (unusual, {"mirostat": 1}, {"mirostat": 2}, {"temperature": 0, "repeat_penalty": 1.5}):
        done = harness.run(QUESTIONS[2], max_tokens=6, seed=3, sampling=sampling)[-1]
        assert done["usage"]["completion_tokens"] >= 1, sampling


def test_a_banned_token_is_not_sampled_and_a_boosted_one_is(harness: Harness) -> None:
    first = harness.run(QUESTIONS[0], max_tokens=1, sampling=GREEDY)[-1]["full_text"]
    banned = harness.run(QUESTIONS[0], max_tokens=1, sampling=GREEDY, logit_bias={first: -1e9})[-1][
        "full_text"
    ]
    boosted = harness.run(QUESTIONS[0], max_tokens=1, sampling=GREEDY, logit_bias={" yes": 100.0})[-1][
        "full_text"
    ]
    assert banned != first
    assert boosted == " yes"


def test_ignore_eos_goes_on_to_the_limit(harness: Harness) -> None:
    done = harness.run("Say hi.", max_tokens=80, ignore_eos=True, sampling=GREEDY)[-1]
    assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("length", 80)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("not a model")
    with pytest.raises(BadDataError, match="cannot load"):
        Harness(path)


def test_a_failed_decode_is_tried_again_and_costs_nobody_an_answer(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = harness.run(QUESTIONS[0], max_tokens=6, sampling=GREEDY)[-1]["full_text"]
    decode, codes = Context.decode, iter([0, 0, -3])
    monkeypatch.setattr(Context, "decode", lambda context, batch: next(codes, 0) or decode(context, batch))
    assert harness.run(QUESTIONS[0], max_tokens=6, sampling=GREEDY)[-1]["full_text"] == expected


def test_who_finished_before_a_failure_in_the_same_step_is_left_alone(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With isolated sequences a step has several batches; a later one fails for good."""
    isolated = Harness(smollm2_path, threads=2, flash_attn="off")
    decode = Context.decode
    monkeypatch.setattr(Context, "decode", lambda c, b: -3 if b.struct.n_tokens >= 100 else decode(c, b))
    isolated.submit(0, QUESTIONS[0], max_tokens=1, sampling=GREEDY)
    isolated.submit(1, "word " * 200, max_tokens=1, sampling=GREEDY)
    answers = isolated.gather(2)
    assert answers[0][-1]["finish_reason"] == "length"
    assert answers[1][-1]["error"]["code"] == "internal"
    isolated.engine.close()


def test_a_bug_before_a_request_is_in_flight_is_told_and_the_engine_lives(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("myllm.engine.llama_runner.make_sampler", lambda *_: 1 / 0)
        assert harness.run(QUESTIONS[0], max_tokens=2)[-1]["error"]["code"] == "internal"
    assert harness.run(QUESTIONS[0], max_tokens=2)[-1]["finish_reason"] == "length"
