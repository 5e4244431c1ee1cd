"""What every engine must do, run on the fake one and on a real model: the seam's own test suite."""

from __future__ import annotations

import queue
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from myllm.engine import Engine, TextWindow, open_engine
from myllm.requests import Arrival, EmbedRequest, GenRequest, LoadOptions

Event = dict[str, Any]
PROMPT = "One, two, three, four, five, six, seven,"


def now(request_id: int) -> Arrival:
    return Arrival(request_id, time.monotonic())


class Opened:
    """An engine and what it emitted."""

    def __init__(self, path: Path) -> None:
        self.emitted: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.progress: list[float] = []
        options = LoadOptions(context=512)
        self.engine: Engine = open_engine(path, options, self.emitted.put, self.progress.append)

    def submit(self, request_id: int, prompt: str = PROMPT, **parameters: Any) -> None:
        tokens = self.engine.tokenizer.encode(prompt, special=True)
        self.engine.submit(GenRequest(prompt=prompt, **parameters), tokens, now(request_id))

    def collect(self, count: int) -> dict[int, list[Event]]:
        """Events by id until `count` requests have ended."""
        found: dict[int, list[Event]] = {}
        while count:
            for event in self.emitted.get(timeout=60):
                found.setdefault(event["id"], []).append(event)
                count -= event["done"]
        return found

    def collect_done(self, count: int) -> dict[int, Event]:
        """The done events of `count` requests, by id."""
        done: dict[int, Event] = {}
        while len(done) < count:
            done |= {event["id"]: event for event in self.emitted.get(timeout=60) if event.get("done")}
        return done

    def first_token(self) -> Event:
        return self.emitted.get(timeout=60)[0]


@pytest.fixture(scope="module")
def fake_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "contract.fake.json"
    path.write_text('{"ms_per_token": 2, "tokens": ["a", " b", " c", " d"]}')
    return path


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.model)])
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    fixture = {"fake": "fake_path", "real": "smollm2_path"}[request.param]
    opened = Opened(request.getfixturevalue(fixture))
    yield opened
    opened.engine.close()


def test_loading_tells_its_progress_and_keeps_to_the_context_asked_for(opened: Opened) -> None:
    assert opened.progress == sorted(opened.progress)
    assert opened.engine.window == 512


def test_tokens_come_as_events_and_join_to_the_full_text(opened: Opened) -> None:
    opened.submit(1, max_tokens=4, ignore_eos=True, seed=7)
    *tokens, done = opened.collect(1)[1]
    assert tokens
    assert all(event["done"] is False and event["id"] == 1 for event in tokens)
    assert "".join(event["token"] for event in tokens) == done["full_text"] != ""
    assert (done["finish_reason"], done["seed"]) == ("length", 7)
    assert done["usage"]["completion_tokens"] == 4
    assert done["usage"]["prompt_tokens"] == len(opened.engine.tokenizer.encode(PROMPT, special=True))
    assert set(done["timings"]) == {
        "queue_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms",
        "tokens_per_second",
    }
    assert all(value >= 0 for value in done["timings"].values())


def test_token_lines_begin_with_id_and_token(opened: Opened) -> None:
    """The Runtime passes token lines on unparsed and relies on their beginning (runtime/lines.py)."""
    opened.submit(1, max_tokens=2, ignore_eos=True)
    *tokens, done = opened.collect(1)[1]
    assert {tuple(event)[:2] for event in tokens} == {("id", "token")}
    assert tuple(done)[:2] == ("id", "done")


def test_many_requests_end_once_each(opened: Opened) -> None:
    for request_id in range(1, 9):
        opened.submit(request_id, max_tokens=request_id, ignore_eos=True)
    found = opened.collect(8)
    for request_id, events in found.items():
        assert [event["done"] for event in events].count(True) == 1
        assert events[-1]["usage"]["completion_tokens"] == request_id


def test_a_stop_string_is_never_shown(opened: Opened) -> None:
    opened.submit(1, max_tokens=3, ignore_eos=True, sampling={"temperature": 0.0})
    text = opened.collect(1)[1][-1]["full_text"]
    opened.submit(2, max_tokens=3, ignore_eos=True, sampling={"temperature": 0.0}, stop=[text[-1:]])
    done = opened.collect(1)[2][-1]
    assert done["finish_reason"] == "stop"
    assert text[-1:] not in done["full_text"]


def test_cancelling_ends_with_what_there_is_and_an_unknown_id_is_ignored(opened: Opened) -> None:
    opened.engine.cancel(77)
    opened.submit(1, ignore_eos=True)
    assert opened.first_token()["done"] is False
    opened.engine.cancel(1)
    done = opened.collect(1)[1][-1]
    assert done["finish_reason"] == "cancelled"
    assert done["full_text"]
    opened.engine.cancel(1)


def seen(opened: Opened, seconds: float) -> list[Event]:
    """All events that come within a time."""
    events: list[Event] = []
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            events += opened.emitted.get(timeout=left)
        except queue.Empty:
            break
    return events


def pause(opened: Opened, *request_ids: int) -> list[Event]:
    """Pauses requests; what they said before that took effect."""
    for request_id in request_ids:
        opened.engine.pause(request_id, True)
    while opened.engine.status()["paused"] < len(request_ids):
        time.sleep(0.01)
    return seen(opened, 0.1)


GREEDY: dict[str, Any] = {"ignore_eos": True, "sampling": {"temperature": 0.0}}


def test_a_paused_request_says_nothing_and_goes_on_from_where_it_was(opened: Opened) -> None:
    opened.submit(1, max_tokens=40, **GREEDY)
    expected = opened.collect(1)[1][-1]["full_text"]
    opened.submit(1, max_tokens=40, **GREEDY)
    before = opened.emitted.get(timeout=60)
    before += pause(opened, 1)
    for request_id in (1, 77):
        opened.engine.pause(request_id, True)
    assert seen(opened, 0.3) == []
    status = opened.engine.status()
    assert (status["busy"], status["waiting"], status["paused"]) == (0, 0, 1)
    opened.submit(2, "Another one", max_tokens=2, ignore_eos=True)
    assert set(opened.collect(1)) == {2}
    opened.engine.pause(1, False)
    *after, done = opened.collect(1)[1]
    assert after
    assert "".join(event["token"] for event in before + after) == done["full_text"] == expected
    assert opened.engine.status()["paused"] == 0


def test_a_paused_request_costs_no_time_and_can_be_cancelled(opened: Opened) -> None:
    opened.submit(1, **GREEDY)
    opened.first_token()
    pause(opened, 1)
    before, steps = time.process_time(), opened.engine.status()["steps"]
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    assert opened.engine.status()["steps"] == steps
    opened.engine.cancel(1)
    assert opened.collect(1)[1][-1]["finish_reason"] == "cancelled"


def submit_paused(opened: Opened, **fields: Any) -> None:
    """Request 1 generates, request 2 embeds."""
    tokens = opened.engine.tokenizer.encode(PROMPT, special=True)
    request = GenRequest(prompt=PROMPT, max_tokens=2, **fields)
    opened.engine.submit(request, tokens, now(1)._replace(paused=True))
    texts = EmbedRequest(texts=["a"], **fields)
    opened.engine.embed(texts, windows_of(opened, "a"), now(2)._replace(paused=True))


def test_requests_may_begin_paused(opened: Opened) -> None:
    submit_paused(opened)
    assert seen(opened, 0.3) == []
    assert opened.engine.status()["paused"] == 2
    for request_id in (1, 2):
        opened.engine.pause(request_id, False)
    ended = opened.collect_done(2)
    assert ended[1]["usage"]["completion_tokens"] >= 1
    assert ended[2]["dimensions"] > 0


def test_paused_requests_keep_their_deadlines(opened: Opened) -> None:
    started = time.monotonic()
    submit_paused(opened, deadline_ms=400)
    ended = opened.collect_done(2)
    assert time.monotonic() - started > 0.39
    assert [ended[request_id]["finish_reason"] for request_id in (1, 2)] == ["deadline"] * 2


def test_a_paused_embedding_says_nothing_and_comes_whole_in_the_end(opened: Opened) -> None:
    embed(opened, 1, *["some words to embed"] * 400)
    first = opened.emitted.get(timeout=60)
    first += pause(opened, 1)
    assert 0 < len(first) < 400
    assert seen(opened, 0.3) == []
    embed(opened, 2, "another")
    assert len(answered(opened, 2)) == 2
    opened.engine.pause(1, False)
    *rest, _ = answered(opened, 1)
    assert sorted(event["item"] for event in first + rest) == list(range(400))


def test_a_deadline_counts_from_the_arrival_it_is_told(opened: Opened) -> None:
    tokens = opened.engine.tokenizer.encode(PROMPT, special=True)
    late = GenRequest(prompt=PROMPT, deadline_ms=1000)
    opened.engine.submit(late, tokens, Arrival(1, time.monotonic() - 2))
    done = opened.collect(1)[1][-1]
    assert (done["finish_reason"], done["full_text"]) == ("deadline", "")
    assert done["timings"]["queue_ms"] >= 2000


def test_requests_may_come_from_any_thread(opened: Opened) -> None:
    threads = [
        threading.Thread(target=opened.submit, args=(n,), kwargs={"max_tokens": 2, "ignore_eos": True})
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    assert len(opened.collect(8)) == 8
    for thread in threads:
        thread.join()


def test_log_probabilities_come_with_their_alternatives(opened: Opened) -> None:
    opened.submit(1, max_tokens=2, ignore_eos=True, logprobs=1)
    *tokens, _ = opened.collect(1)[1]
    given = [event for event in tokens if "logprob" in event]
    assert given
    for event in given:
        assert event["logprob"] <= 0
        (top,) = event["top_logprobs"]
        assert set(top) == {"token", "logprob"}
        assert top["logprob"] >= event["logprob"]


def test_status_says_what_runs_and_how_fast(opened: Opened) -> None:
    opened.submit(1, ignore_eos=True)
    opened.first_token()
    status = opened.engine.status()
    assert (status["busy"], status["waiting"]) == (1, 0)
    opened.engine.cancel(1)
    opened.collect(1)
    status = orjson.loads(orjson.dumps(opened.engine.status()))
    assert (status["busy"], status["waiting"], status["window"]) == (0, 0, 512)
    assert status["tokens_per_second"] > 0
    assert 0 <= status["kv_hit_rate"] <= 1
    assert status["generated_tokens"] > 0
    assert {"cached", "context", "threads", "gpu_layers"} <= set(status)


def test_the_tokenizer_keeps_its_promises(opened: Opened) -> None:
    tokenizer = opened.engine.tokenizer
    for text in ("plain words", "ünïcödé ✓", "a\n\n  b"):
        tokens = tokenizer.encode(text, special=False)
        assert tokenizer.decode(tokens) == text
        assert len(tokens) * tokenizer.max_piece_bytes >= len(text.encode())
    assert tokenizer.special_tokens
    for control in tokenizer.special_tokens:
        (token,) = tokenizer.encode(control, special=True)
        assert token not in tokenizer.encode(control, special=False)


def test_closing_ends_the_thread_in_mid_stream(fake_path: Path) -> None:
    before = threading.active_count()
    opened = Opened(fake_path)
    opened.submit(1, ignore_eos=True)
    opened.first_token()
    opened.engine.close()
    assert threading.active_count() == before


def windows_of(opened: Opened, *texts: str) -> list[list[TextWindow]]:
    encode = opened.engine.tokenizer.encode
    return [[TextWindow(0, len(text), encode(text, special=False))] for text in texts]


def embed(opened: Opened, request_id: int, *texts: str) -> None:
    opened.engine.embed(EmbedRequest(texts=list(texts)), windows_of(opened, *texts), now(request_id))


def answered(opened: Opened, request_id: int) -> list[Event]:
    """All events of the only embed request, to its done event."""
    events: list[Event] = []
    while not (events and events[-1].get("done")):
        events += opened.emitted.get(timeout=60)
    assert {event["id"] for event in events} == {request_id}
    return events


def test_texts_become_vectors_of_norm_one_and_equal_ones_the_same(opened: Opened) -> None:
    texts = ("a cat", "a cat sat on the mat", "a cat")
    embed(opened, 30, *texts)
    *found, done = answered(opened, 30)
    vectors = {e["item"]: np.frombuffer(b64decode(e["embedding"]), "<f4") for e in found}
    assert sorted(vectors) == [0, 1, 2]
    assert all(abs(float(v @ v) - 1) < 1e-5 for v in vectors.values())
    assert float(vectors[0] @ vectors[2]) == pytest.approx(1, abs=1e-5)
    assert float(vectors[0] @ vectors[1]) < 0.999
    assert done["dimensions"] == len(vectors[0])
    assert done["usage"]["prompt_tokens"] == sum(len(p.tokens) for (p,) in windows_of(opened, *texts))


def test_a_generation_streams_on_while_many_texts_are_embedded(opened: Opened) -> None:
    embed(opened, 41, *(f"text {number}" for number in range(200)))
    opened.submit(40, max_tokens=8, ignore_eos=True)
    kinds: list[str] = []
    while kinds.count("done") < 2:
        for event in opened.emitted.get(timeout=120):
            kinds.append("vector" if "embedding" in event else "token" if "token" in event else "done")
    assert kinds.count("vector") == 200
    while_it_ran = kinds[kinds.index("token") : kinds.index("done")]
    assert while_it_ran.count("vector") >= 8
    assert kinds[kinds.index("done") :].count("vector") > 0


def test_an_embedding_can_be_cancelled_and_says_no_more(opened: Opened) -> None:
    embed(opened, 50, *["some words to embed"] * 500)
    opened.engine.cancel(50)
    *found, done = answered(opened, 50)
    assert done["finish_reason"] == "cancelled"
    assert len(found) < 500
    embed(opened, 51, "another")
    assert len(answered(opened, 51)) == 2


def test_an_embedding_has_a_deadline_from_the_arrival_it_is_told(opened: Opened) -> None:
    late = EmbedRequest(texts=["late"], deadline_ms=1000)
    opened.engine.embed(late, windows_of(opened, "late"), Arrival(60, time.monotonic() - 2))
    (done,) = answered(opened, 60)
    assert done["finish_reason"] == "deadline"


def test_windows_of_one_text_come_in_order_and_pooled_as_one(opened: Opened) -> None:
    encode = opened.engine.tokenizer.encode
    ends = (20, 23, 40)
    text = "one two three four five six seven eight nine ten"
    windows = [
        TextWindow(start, end, encode(text[start:end], special=False))
        for start, end in zip((0, *ends), (*ends, len(text)), strict=True)
    ]
    opened.engine.embed(EmbedRequest(texts=[text]), [windows], now(70))
    *found, _ = answered(opened, 70)
    assert [(e["item"], e["chunk"], e["start"], e["end"]) for e in found] == [
        (0, chunk, window.start, window.end) for chunk, window in enumerate(windows)
    ]
    opened.engine.embed(EmbedRequest(texts=[text], pool="mean"), [windows], now(71))
    pooled, _ = answered(opened, 71)
    mean = sum(e["tokens"] * np.frombuffer(b64decode(e["embedding"]), "<f4") for e in found)
    vector = np.frombuffer(b64decode(pooled["embedding"]), "<f4")
    assert (pooled["chunk"], pooled["start"], pooled["end"]) == (0, 0, len(text))
    assert float(vector @ mean) / float(np.linalg.norm(mean)) == pytest.approx(1, abs=1e-5)


def test_a_window_the_model_cannot_take_fails_its_request_alone(opened: Opened) -> None:
    too_long = [[TextWindow(0, 1, [5] * (opened.engine.embed_window + 1))], *windows_of(opened, "short")]
    opened.engine.embed(EmbedRequest(texts=["x", "short"]), too_long, now(80))
    (done,) = answered(opened, 80)
    assert done["error"]["code"] == "context_overflow"
    embed(opened, 81, "short")
    assert len(answered(opened, 81)) == 2
