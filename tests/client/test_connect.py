"""A command's whole way with the fake engine: client, Runtime on a thread, worker process, and back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm.client import connect
from myllm.client.client import Client
from myllm.errors import UnavailableError
from myllm.settings import load

Event = dict[str, Any]
Generate = Callable[..., list[Event]]
FakeModel = Callable[..., Path]


def done_of(events: list[Event]) -> Event:
    *others, last = events
    assert last["done"] is True
    assert not any(event.get("done") for event in others)
    return last


def text_of(events: list[Event]) -> str:
    return "".join(event.get("token", "") for event in events)


# ── one request ─────────────────────────────────────────────────────────────────────────────


def test_streams_tokens_then_exactly_one_done_event(generate: Generate, fake_model: FakeModel) -> None:
    events = generate(fake_model(tokens=["Hello", " world"]), seed=7)
    done = done_of(events)
    assert [e for e in events if "token" in e] == [
        {"token": "Hello", "done": False},
        {"token": " world", "done": False},
    ]
    assert list(done)[:3] == ["done", "full_text", "model"]
    assert (done["full_text"], done["finish_reason"], done["seed"]) == ("Hello world", "stop", 7)
    assert done["usage"]["prompt_tokens"] == 3
    assert list(done["timings"]) == [
        "queue_ms",
        "load_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms",
        "tokens_per_second",
    ]


def test_load_time_is_counted_once_and_apart_from_the_rest(generate: Generate, fake_model: FakeModel) -> None:
    model = fake_model(load_ms=200)
    first, second = done_of(generate(model)), done_of(generate(model))
    assert first["timings"]["load_ms"] >= 200
    assert second["timings"]["load_ms"] < 50
    assert second["timings"]["ttft_ms"] < 150


def test_loading_is_told_before_the_first_token(generate: Generate, fake_model: FakeModel) -> None:
    events = generate(fake_model(load_ms=400))
    loading = [event["loading"] for event in events if "loading" in event]
    assert loading
    assert loading == sorted(loading)
    assert all(0 <= part <= 1 for part in loading)
    assert "loading" in events[0]


def test_messages_are_rendered_with_the_models_template(generate: Generate, fake_model: FakeModel) -> None:
    model = fake_model(template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")
    assert text_of(generate(model, "hi", system="be brief")) == "[system]be brief[user]hi"


def test_count_tells_tokens_and_window_and_generates_nothing(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(window=4))
    request = {"op": "count", "model": model, "prompt": "one two three four five six"}
    (event,) = map(orjson.loads, client.stream(request))
    assert event == {"done": True, "model": model, "usage": {"prompt_tokens": 6}, "window": 4}


def test_configured_options_stand_under_those_of_the_request(
    fake_model: FakeModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(fake_model())
    config = home / ".config" / "myllm" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'[model."{model}"]\ncontext = 7\nparallel = 2\n')
    with connect(load()) as client:
        request = {"op": "count", "model": model, "prompt": "a"}
        assert [orjson.loads(line)["window"] for line in client.stream(request)] == [7]
        request["options"] = {"context": 9}
        assert [orjson.loads(line)["window"] for line in client.stream(request)] == [9]


# ── many requests ───────────────────────────────────────────────────────────────────────────


def collect(client: Client, count: int) -> dict[int, list[Event]]:
    """Events by request id until `count` requests have ended."""
    found: dict[int, list[Event]] = {}
    for line in client.events():
        event = orjson.loads(line)
        found.setdefault(event["id"], []).append(event)
        count -= bool(event.get("done"))
        if not count:
            return found
    raise AssertionError("unreachable")


def test_every_request_in_flight_gets_its_own_events(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(ms_per_token=1))
    for number in range(client.max_in_flight):
        client.send({"op": "gen", "id": 1000 - number, "model": model, "prompt": f"echo number {number}"})
    found = collect(client, client.max_in_flight)
    for number in range(client.max_in_flight):
        events = found[1000 - number]
        assert text_of(events) == done_of(events)["full_text"] == f"echo number {number}"


def test_more_than_max_in_flight_are_answered_too(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model())
    for number in range(3 * client.max_in_flight):
        client.send({"op": "gen", "id": number, "model": model, "prompt": f"n {number}"})
    found = collect(client, 3 * client.max_in_flight)
    assert {number: done_of(events)["full_text"] for number, events in found.items()} == {
        number: f"n {number}" for number in range(3 * client.max_in_flight)
    }


def test_two_models_have_a_worker_each(
    client: Client, fake_model: FakeModel, nothing_left: list[int]
) -> None:
    for number, word in enumerate(("one", "two")):
        model = str(fake_model(word, tokens=[word]))
        client.send({"op": "gen", "id": number, "model": model, "prompt": "x"})
    found = collect(client, 2)
    assert [text_of(found[number]) for number in range(2)] == ["one", "two"]
    assert len(nothing_left) == 2


def test_a_bad_request_fails_alone_and_before_anything_is_loaded(
    client: Client, fake_model: FakeModel
) -> None:
    model = str(fake_model())
    client.send({"op": "gen", "id": 1, "model": model, "prompt": "x", "temperature": "hot"})
    client.send({"op": "gen", "id": 2, "model": model, "prompt": "fine"})
    client.send({"op": "fly", "id": 3})
    client.send({"op": "gen", "id": 4, "model": model, "prompt": "x", "options": {"warp": 9}})
    client.send({"op": "gen", "id": 5, "model": model, "prompt": "a " * 5000})
    client.send({"op": "gen", "id": 6, "model": 7, "prompt": "x"})
    found = collect(client, 6)
    codes = {number: done_of(events).get("error", {}).get("code") for number, events in found.items()}
    assert codes == {1: "usage", 2: None, 3: "usage", 4: "usage", 5: "context_overflow", 6: "usage"}


# ── ends ────────────────────────────────────────────────────────────────────────────────────


def test_cancel_ends_a_running_request_with_what_it_has(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(tokens=["x"], ms_per_token=5))
    client.send({"op": "gen", "id": 1, "model": model, "prompt": "a", "ignore_eos": True})
    lines = client.events()
    while b"token" not in next(lines):
        pass
    client.send({"op": "cancel", "id": 1})
    done = next(event for line in lines if (event := orjson.loads(line)).get("done"))
    assert done["finish_reason"] == "cancelled"
    assert done["full_text"] == "x" * done["usage"]["completion_tokens"]


def test_cancel_while_loading_ends_with_nothing(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(load_ms=5000))
    client.send({"op": "gen", "id": 1, "model": model, "prompt": "a"})
    client.send({"op": "cancel", "id": 1})
    done = collect(client, 1)[1][-1]
    assert (done["finish_reason"], done["full_text"]) == ("cancelled", "")


def test_a_model_is_loaded_anew_right_after_nobody_wanted_it(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(load_ms=500))
    client.send({"op": "gen", "id": 1, "model": model, "prompt": "a"})
    lines = client.events()
    assert b"loading" in next(lines)
    client.send({"op": "cancel", "id": 1})
    client.send({"op": "gen", "id": 2, "model": model, "prompt": "still here"})
    ends = (event for line in lines if (event := orjson.loads(line)).get("done"))
    ended = [next(ends), next(ends)]
    assert [event["full_text"] for event in ended] == ["", "still here"]


def test_deadline_while_loading_is_kept(generate: Generate, fake_model: FakeModel) -> None:
    started = time.monotonic()
    done = done_of(generate(fake_model(load_ms=10_000), deadline_ms=300))
    assert time.monotonic() - started < 2
    assert (done["finish_reason"], done["full_text"]) == ("deadline", "")
    assert done["timings"]["load_ms"] >= 300


def test_deadline_counts_from_arrival_also_over_a_load(generate: Generate, fake_model: FakeModel) -> None:
    model = fake_model(load_ms=300, tokens=["x"], ms_per_token=20)
    started = time.monotonic()
    done = done_of(generate(model, deadline_ms=900, ignore_eos=True))
    assert 0.85 < time.monotonic() - started < 1.5
    assert done["finish_reason"] == "deadline"
    assert done["full_text"]


def test_closing_in_mid_stream_is_quick(fake_model: FakeModel, nothing_left: list[int]) -> None:
    client = connect(load())
    model = str(fake_model(tokens=["x"], ms_per_token=5))
    stream = client.stream({"op": "gen", "model": model, "prompt": "a", "ignore_eos": True})
    while b"token" not in next(stream):
        pass
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 0.25


def test_closing_before_anything_was_asked_leaves_nothing(nothing_left: list[int]) -> None:
    connect(load()).close()
    assert len(nothing_left) == 1


def test_an_interrupt_gets_through_while_waiting_for_events(client: Client, fake_model: FakeModel) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupted)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(client.stream({"op": "gen", "model": str(fake_model(load_ms=5000)), "prompt": "a"}))
    finally:
        timer.join()
        signal.signal(signal.SIGINT, previous)


# ── faults ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "how"),
    [("kill", "SIGKILL"), ("segv", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "exit status 3")],
)
@pytest.mark.parametrize("at", ["token", "load"])
def test_a_worker_that_dies_fails_its_requests_with_its_last_words(
    generate: Generate, fake_model: FakeModel, kind: str, how: str, at: str
) -> None:
    fault = {"kind": kind, "at": at, "after_tokens": 2, "words": "chatter\n\x1b[31mGGML_ASSERT(x) failed"}
    model = fake_model(tokens=["x"] * 9, ms_per_token=1, fault=fault)
    events = generate(model)
    error = done_of(events)["error"]
    assert error["code"] == "worker_crashed"
    assert how in error["message"]
    assert "GGML_ASSERT(x) failed" in error["message"]
    assert "\x1b" not in error["message"]
    assert text_of(events) == ("xx" if at == "token" else "")


def test_after_a_crash_the_next_request_gets_a_new_worker(
    generate: Generate, fake_model: FakeModel, nothing_left: list[int]
) -> None:
    model = fake_model(fault={"kind": "segv", "request": 2})
    answers = [done_of(generate(model)) for _ in range(3)]
    assert [answer.get("full_text", answer.get("error", {}).get("code")) for answer in answers] == [
        "a b c",
        "worker_crashed",
        "a b c",
    ]
    assert len(nothing_left) == 2


def test_a_crash_fails_all_in_flight(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(tokens=["x"] * 9, ms_per_token=1, fault={"kind": "abort", "after_tokens": 5}))
    for number in range(8):
        client.send({"op": "gen", "id": number, "model": model, "prompt": "a"})
    found = collect(client, 8)
    assert {done_of(events)["error"]["code"] for events in found.values()} == {"worker_crashed"}


def test_an_exception_in_the_engine_fails_one_request_only(client: Client, fake_model: FakeModel) -> None:
    model = str(fake_model(ms_per_token=1, fault={"kind": "error", "request": 1}))
    for number in range(3):
        client.send({"op": "gen", "id": number, "model": model, "prompt": "a b"})
    found = collect(client, 3)
    assert sorted(done_of(events).get("error", {}).get("code", "ok") for events in found.values()) == [
        "internal",
        "ok",
        "ok",
    ]


def test_a_hanging_worker_is_gone_when_the_client_closes(
    fake_model: FakeModel, nothing_left: list[int]
) -> None:
    with connect(load()) as client:
        model = str(fake_model(fault={"kind": "hang", "after_tokens": 1}))
        stream = client.stream({"op": "gen", "model": model, "prompt": "a b"})
        while b"token" not in next(stream):
            pass
    assert nothing_left


def test_a_stopped_worker_is_killed_at_the_end(fake_model: FakeModel, nothing_left: list[int]) -> None:
    with connect(load()) as client:
        list(client.stream({"op": "gen", "model": str(fake_model()), "prompt": "a b"}))
        os.kill(nothing_left[0], signal.SIGSTOP)


def test_a_file_that_is_no_model_is_bad_data(generate: Generate, tmp_path: Path) -> None:
    for name in ("text.gguf", "text.fake.json"):
        path = tmp_path / name
        path.write_text("this is no model")
        error = done_of(generate(path))["error"]
        assert error["code"] == "bad_data"
        assert str(path) in error["message"]


def test_an_unknown_model_is_not_found_and_leaves_no_process(generate: Generate) -> None:
    error = done_of(generate("no-such-model"))["error"]
    assert error["code"] == "not_found"


def test_a_chatty_worker_neither_blocks_nor_floods(generate: Generate, fake_model: FakeModel) -> None:
    fault = {"kind": "abort", "after_tokens": 1, "words": "chatter " * 500_000 + "\nthe end"}
    error = done_of(generate(fake_model(fault=fault)))["error"]
    assert "the end" in error["message"]
    assert len(error["message"]) < 1000


PARENT = """
import os, sys
from myllm.client import connect
from myllm.settings import load
client = connect(load())
stream = client.stream({"op": "gen", "model": sys.argv[1], "prompt": "a", "ignore_eos": True})
while b"token" not in next(stream):
    pass
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
print(children[0], flush=True)
for _ in stream:
    pass
"""


@pytest.mark.parametrize("fault", [None, {"kind": "hang", "after_tokens": 3}])
def test_no_worker_outlives_a_parent_that_was_killed(fake_model: FakeModel, fault: Event | None) -> None:
    model = fake_model(tokens=["x"], ms_per_token=5, fault=fault)
    command = [sys.executable, "-c", PARENT, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.02)
    pytest.fail(f"worker {worker} lives")


def test_a_vanished_runtime_is_unavailable() -> None:
    import socket

    ours, theirs = socket.socketpair()
    client = Client(ours)
    theirs.close()
    with pytest.raises(UnavailableError):
        list(client.events())
    client.close()
