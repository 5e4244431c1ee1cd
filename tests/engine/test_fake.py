"""The fake engine does what its script says, as exactly as tests need it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.engine import Engine, open_engine
from myllm.engine.fake import SPECIAL, WordTokenizer
from myllm.engine.fake_script import Script
from myllm.errors import BadDataError, NotFoundError
from myllm.requests import Arrival, GenRequest, LoadOptions

Event = dict[str, Any]


class Rig:
    """An open engine and the steps it emitted."""

    def __init__(self, path: Path, options: LoadOptions | None = None) -> None:
        self.steps: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.progress: list[float] = []
        self.engine: Engine = open_engine(
            path, options or LoadOptions(), self.steps.put, self.progress.append
        )

    def submit(self, request_id: int, prompt: str, **parameters: Any) -> None:
        tokens = self.engine.tokenizer.encode(prompt, special=True)
        arrival = Arrival(request_id, time.monotonic())
        self.engine.submit(GenRequest(prompt=prompt, **parameters), tokens, arrival)

    def collect(self, count: int) -> dict[int, list[Event]]:
        """Events by id until `count` requests have ended."""
        found: dict[int, list[Event]] = {}
        while count:
            for event in self.steps.get(timeout=5):
                found.setdefault(event["id"], []).append(event)
                count -= event["done"]
        return found

    def run(self, prompt: str = "a b c", **parameters: Any) -> list[Event]:
        self.submit(1, prompt, **parameters)
        return self.collect(1)[1]


@pytest.fixture
def rig(fake_model: Callable[..., Path]) -> Iterator[Callable[..., Rig]]:
    """Opens an engine on a script: `rig(tokens=["x"])`."""
    rigs: list[Rig] = []

    def make(options: LoadOptions | None = None, **script: Any) -> Rig:
        rigs.append(Rig(fake_model(**script), options))
        return rigs[-1]

    yield make
    for opened in rigs:
        opened.engine.close()


Make = Callable[..., Rig]


def test_scripted_tokens_come_one_an_event_and_then_it_stops(rig: Make) -> None:
    *tokens, done = rig(tokens=["Hel", "lo"]).run()
    assert tokens == [{"id": 1, "token": "Hel", "done": False}, {"id": 1, "token": "lo", "done": False}]
    assert (done["full_text"], done["finish_reason"]) == ("Hello", "stop")
    assert done["usage"] == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 2,
        "dropped_messages": 0,
    }


def test_without_tokens_the_prompt_is_echoed_but_its_control_tokens(rig: Make) -> None:
    assert rig().run("<s>one  two\n three</s>")[-1]["full_text"] == "one  two\n three"


def test_max_tokens_and_window_end_it_by_length(rig: Make) -> None:
    for parameters, n in (({"max_tokens": 2}, 2), ({}, 5), ({"ignore_eos": True}, 5), ({"max_tokens": 0}, 0)):
        done = rig(tokens=["x"] * 9, window=8).run("a b c", **parameters)[-1]
        assert (done["finish_reason"], done["full_text"]) == ("length", "x" * n)


def test_a_stop_string_ends_it_and_never_shows(rig: Make) -> None:
    *tokens, done = rig(tokens=["one ", "EN", "D two"]).run(stop=["END"])
    assert done["full_text"] == "one " == "".join(event["token"] for event in tokens)
    assert done["finish_reason"] == "stop"


def test_running_requests_advance_together_one_token_a_step(rig: Make) -> None:
    opened = rig(tokens=["x"] * 5, ms_per_token=5)
    for number in range(1, 5):
        opened.submit(number, "a")
    steps = []
    while not steps or not steps[-1][-1]["done"]:
        steps.append(opened.steps.get(timeout=5))
    assert [event["id"] for event in steps[-1]] == [1, 2, 3, 4]


def test_no_more_than_parallel_run_at_once(rig: Make) -> None:
    opened = rig(LoadOptions(parallel=1), tokens=["x", "y"])
    for number in range(1, 4):
        opened.submit(number, "a")
    order = [event["id"] for _ in range(9) for event in opened.steps.get(timeout=5)]
    assert order == sorted(order)


def test_pace_and_load_time_are_kept(rig: Make) -> None:
    started = time.monotonic()
    opened = rig(tokens=["x"] * 10, ms_per_token=10, prompt_ms_per_token=20, load_ms=100)
    assert time.monotonic() - started >= 0.1
    assert opened.progress[0] == 0
    assert opened.progress[-1] == 1
    timings = opened.run("a b c")[-1]["timings"]
    assert timings["prefill_ms"] >= 60
    assert timings["decode_ms"] >= 90


def test_cancelled_and_late_requests_end_also_while_they_wait(rig: Make) -> None:
    opened = rig(LoadOptions(parallel=1), tokens=["x"], ms_per_token=2)
    opened.submit(1, "a", ignore_eos=True)
    opened.submit(2, "a")
    opened.submit(3, "a", deadline_ms=20)
    opened.engine.cancel(2)
    opened.engine.cancel(99)
    ended = opened.collect(2)
    assert ended[2][-1]["finish_reason"] == "cancelled"
    assert ended[3][-1]["finish_reason"] == "deadline"
    opened.engine.cancel(1)
    assert opened.collect(1)[1][-1]["finish_reason"] == "cancelled"


def test_log_probabilities_are_given_where_asked_for(rig: Make) -> None:
    token, _ = rig(tokens=["x"]).run(logprobs=1)
    assert (token["logprob"], token["top_logprobs"]) == (0.0, [{"token": "x", "logprob": 0.0}])


def test_an_error_fault_fails_the_request_it_names(rig: Make) -> None:
    opened = rig(tokens=["x"], fault={"kind": "error", "request": 2})
    for number in (1, 2, 3):
        opened.submit(number, "a")
    codes = {i: events[-1].get("error", {}).get("code") for i, events in opened.collect(3).items()}
    assert codes == {1: None, 2: "internal", 3: None}


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", '{"warp":1}', '{"fault":{"kind":"kill","x":1}}', '{"fault":5}']
)
def test_what_is_no_script_is_bad_data(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.fake.json"
    path.write_text(text)
    with pytest.raises(BadDataError):
        Script.read(path)


def test_a_script_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Script.read(tmp_path / "none.fake.json")


@given(
    st.text() | st.lists(st.sampled_from([*SPECIAL, "<", "<s", " ", "word", "\n"])).map("".join),
    st.booleans(),
)
def test_tokenising_loses_nothing_and_respects_its_bound(text: str, special: bool) -> None:
    tokenizer = WordTokenizer()
    tokens = tokenizer.encode(text, special=special)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) * tokenizer.max_piece_bytes >= len(text.encode("utf-8", "replace"))
    if not special:
        assert all(token >= len(SPECIAL) for token in tokens)
