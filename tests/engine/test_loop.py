"""The engine's loop on scripted runners: what fails, grows and is preempted, without weights."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from myllm.engine.engine import BatchingEngine
from myllm.engine.fake import FakeRunner
from myllm.engine.fake_script import Script
from myllm.engine.kv_layout import Layout, Pool, Streams
from myllm.engine.runner import Sampled
from myllm.engine.sequence import Chunk
from myllm.errors import InternalError, UnavailableError
from myllm.requests import Arrival, GenRequest, LoadOptions

Event = dict[str, Any]
WORDS = [f" {number}" for number in range(20)]
SAID = "".join(WORDS)


class Runner(FakeRunner):
    """A fake runner whose steps fail as told, and a note of what was asked of it."""

    def __init__(self, layout: Layout | None = None, **script: Any) -> None:
        super().__init__(Script(**{"tokens": WORDS, **script}), LoadOptions())
        self.layout = layout or self.layout
        self.codes: dict[int, int] = {}
        """What a decode returns, by its number; 0 where it is not named."""
        self.bugs: set[int] = set()
        """The decodes that raise."""
        self.batches: list[list[Chunk]] = []
        self.cells: list[int] = []
        self.unmovable = False
        self.refusals = 0
        """How many more times there is no memory for a cache."""

    def fill(self, chunks: Sequence[Chunk]) -> None:
        super().fill(chunks)
        self.batches.append(list(chunks))

    def decode(self) -> int:
        number = len(self.batches)
        if number in self.bugs:
            raise ZeroDivisionError("a bug")
        return self.codes.get(number, 0) or super().decode()

    def grow(self, layout: Layout, n_cells: int, kept: Sequence[int]) -> list[int]:
        if self.refusals:
            self.refusals -= 1
            raise UnavailableError("context: no memory")
        self.cells.append(n_cells)
        lost = list(kept) if self.unmovable else []
        return super().grow(layout, n_cells, [slot for slot in kept if slot not in lost]) + lost


class Opened:
    """An engine on such a runner, and what it emitted."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.emitted: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.said: dict[int, str] = {}
        self.engine = BatchingEngine(runner, self.emitted.put)

    def submit(self, *request_ids: int, n_prompt: int = 3, **fields: Any) -> None:
        """Requests whose prompts have no beginning in common."""
        for request_id in request_ids:
            prompt = self.engine.tokenizer.encode(
                f"prompt{request_id} " + "word " * (n_prompt - 1), special=False
            )
            arrival = Arrival(request_id, time.monotonic())
            self.engine.submit(GenRequest(prompt="", **fields), prompt[:n_prompt], arrival)

    def hear(self) -> list[Event]:
        """The events of one step; what they say is noted."""
        events = self.emitted.get(timeout=10)
        for event in events:
            self.said[event["id"]] = self.said.get(event["id"], "") + event.get("token", "")
        return events

    def ends(self, count: int) -> dict[int, Any]:
        """Of `count` requests, by id, the text, which is also what their events said, or the error's code."""
        ended: dict[int, Any] = {}
        while len(ended) < count:
            for event in self.hear():
                assert event["id"] not in ended
                if "error" in event:
                    ended[event["id"]] = event["error"]["code"]
                elif event["done"]:
                    assert event["full_text"] == self.said[event["id"]]
                    ended[event["id"]] = event["full_text"]
        return ended


Open = Callable[..., Opened]


@pytest.fixture
def opening() -> Iterator[Open]:
    made: list[Opened] = []

    def make(runner: Runner) -> Opened:
        made.append(Opened(runner))
        return made[-1]

    yield make
    for opened in made:
        opened.engine.close()


# ── a step that fails ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", [1, 2, -1, -3])
def test_a_decode_that_fails_once_costs_nobody_a_word(opening: Open, code: int) -> None:
    runner = Runner()
    runner.codes = {3: code}
    opened = opening(runner)
    opened.submit(1, 2)
    assert opened.ends(2) == {1: SAID, 2: SAID}
    after = runner.batches[3]
    assert [chunk.start for chunk in after] == [0] * len(after), "nothing of the step is trusted"


@pytest.mark.parametrize("code", [1, 2, -1, -3])
def test_a_decode_that_fails_again_ends_whom_it_held_and_nobody_else(opening: Open, code: int) -> None:
    runner = Runner()
    runner.codes = {2: code, 4: code}
    opened = opening(runner)
    opened.submit(1)
    assert opened.ends(1) == {1: "internal"}
    opened.submit(2)
    assert opened.ends(1) == {2: SAID}


def test_who_ended_in_an_earlier_batch_of_a_step_is_no_part_of_its_failure(opening: Open) -> None:
    """Where sequences are isolated a step has several batches; the longer prompt's fails for good."""
    runner = Runner(Streams(4, 512), ms_per_token=20)
    decode = runner.decode
    fails = lambda: any(chunk.size > 9 for chunk in runner.batches[-1])  # noqa: E731 - it is that short
    runner.decode = lambda: -3 if fails() else decode()  # type: ignore[method-assign]
    opened = opening(runner)
    opened.submit(0, max_tokens=2)
    opened.hear()  # so that the two come while a step runs, and into the next one together
    opened.submit(1, max_tokens=1)
    opened.submit(2, n_prompt=12, max_tokens=20)
    assert opened.ends(3) == {0: SAID[:4], 1: WORDS[0], 2: "internal"}


def test_a_bug_in_a_step_fails_what_is_in_flight_and_the_engine_begins_anew(
    opening: Open, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = Runner()
    runner.bugs = {3}
    opened = opening(runner)
    opened.submit(1, 2)
    opened.engine.submit(GenRequest(prompt=""), [9], Arrival(3, time.monotonic(), paused=True))
    assert opened.ends(3) == dict.fromkeys((1, 2, 3), "internal")
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err
    assert opened.engine.status()["context"] == 0
    opened.submit(4)
    assert opened.ends(1) == {4: SAID}


def test_a_row_that_cannot_be_sampled_fails_alone(opening: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    sample = runner.sample

    def refuse(row: int, top: int | None) -> Sampled:
        if runner.batches[-1][row].sequence.id == 2:
            raise InternalError("no token")
        return sample(row, top)

    monkeypatch.setattr(runner, "sample", refuse)
    opened = opening(runner)
    opened.submit(1, 2, 3)
    assert opened.ends(3) == {1: SAID, 2: "internal", 3: SAID}


# ── the cache ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("unmovable", [False, True])
def test_the_cache_grows_under_a_running_request_which_loses_nothing(opening: Open, unmovable: bool) -> None:
    runner = Runner(ms_per_token=2)
    runner.unmovable = unmovable
    opened = opening(runner)
    opened.submit(1, ignore_eos=True, max_tokens=200)
    opened.hear()
    n_before = len(runner.batches)
    opened.submit(2, n_prompt=1500, max_tokens=1)
    assert opened.ends(2)[2] == WORDS[0]
    assert runner.cells == sorted(runner.cells)
    assert len(runner.cells) > 1
    begun_anew = [
        c for batch in runner.batches[n_before:] for c in batch if (c.sequence.id, c.start) == (1, 0)
    ]
    assert bool(begun_anew) == unmovable


def test_without_memory_for_a_cache_its_request_fails_and_the_next_asks_again(opening: Open) -> None:
    runner = Runner()
    runner.refusals = 2  # at the start, and for the first request
    opened = opening(runner)
    opened.submit(1)
    assert opened.ends(1) == {1: "unavailable"}
    opened.submit(2)
    assert opened.ends(1) == {2: SAID}


def test_where_cells_run_out_one_is_preempted_and_all_come_to_their_end(opening: Open) -> None:
    """Two answers of 700 tokens in 1,280 cells: the younger yields its cells and starts again."""
    runner = Runner()
    runner.layout = Pool(1280, 8, 16, runner.device)
    opened = opening(runner)
    opened.submit(1, 2, ignore_eos=True, max_tokens=700)
    assert opened.ends(2) == dict.fromkeys((1, 2), SAID * 35)
    assert max(runner.cells) == 1280
    begun = [c.sequence.id for batch in runner.batches for c in batch if c.start == 0]
    assert sorted(begun) == [1, 2, 2]
