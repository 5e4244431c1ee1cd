"""What a prompt computed is on disk afterwards, and read back by whoever begins with its tokens."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from myllm.engine import Engine, Kept, open_engine
from myllm.engine.engine import BatchingEngine
from myllm.engine.fake import FakeRunner
from myllm.engine.fake_script import Script
from myllm.engine.snapshot import Archive
from myllm.requests import Arrival, GenRequest, LoadOptions
from tests.faults.rig import times

Event = dict[str, Any]
Open = Callable[..., "Asked"]
WORDS = [f"word{number}" for number in range(700)]
GREEDY = {"temperature": 0.0}


class Asked:
    """An engine that is asked one thing at a time."""

    def __init__(self, open_it: Callable[[Callable[[list[Event]], None]], Engine]) -> None:
        self._emitted: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.engine = open_it(self._emitted.put)
        self._id = 0

    def ask(self, prompt: str, **fields: Any) -> Event:
        self._id += 1
        tokens = self.engine.tokenizer.encode(prompt, special=True)
        arrival = Arrival(self._id, time.monotonic())
        self.engine.submit(GenRequest(prompt=prompt, **{"max_tokens": 3, **fields}), tokens, arrival)
        while True:
            for event in self._emitted.get(timeout=120):
                if event["done"]:
                    self.engine.settle(10)
                    return event


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def opened(folder: Path, fake_model: Callable[..., Path]) -> Iterator[Open]:
    """Opens engines on one folder, each as in a process of its own."""
    with ExitStack() as stack:

        def start(runner: type[FakeRunner] = FakeRunner, **script: Any) -> Asked:
            scripted = Script.read(fake_model(**{"window": 4096, **script}))
            archive = Archive(folder, "a model", 2**30)
            asked = Asked(lambda emit: BatchingEngine(runner(scripted, LoadOptions()), emit, archive=archive))
            stack.callback(asked.engine.close)
            return asked

        yield start


def cached(event: Event) -> int:
    return int(event["usage"]["cached_tokens"])


def n_prompt(event: Event) -> int:
    return int(event["usage"]["prompt_tokens"])


def prompt(length: int) -> str:
    return " ".join(WORDS[:length])


def test_another_process_reads_back_what_one_computed(opened: Open) -> None:
    first = opened().ask(prompt(300))
    again = opened().ask(prompt(300))
    longer = opened().ask(prompt(310))
    assert (cached(first), cached(again), cached(longer)) == (0, 299, 300)
    assert again["full_text"] == first["full_text"]
    assert longer["usage"]["prompt_tokens"] == 310


def test_what_is_in_memory_is_not_read_from_disk(opened: Open, folder: Path) -> None:
    engine = opened()
    engine.ask(prompt(300))
    for file in folder.iterdir():
        file.write_bytes(b"")
    assert cached(engine.ask(prompt(320))) == 300


def test_a_prompt_that_needs_a_larger_cache_first_is_read_back_all_the_same(opened: Open) -> None:
    opened().ask(prompt(700))
    assert cached(opened().ask(prompt(700), max_tokens=900, ignore_eos=True)) == 699


@pytest.mark.parametrize("damage", ["empty", "a bit", "gone"])
def test_what_is_damaged_is_computed_again(opened: Open, folder: Path, damage: str) -> None:
    expected = opened().ask(prompt(600))
    engine = opened()
    find = engine.engine._archive.find  # type: ignore[attr-defined]

    def found_and_damaged(tokens: list[int]) -> Any:
        found = find(tokens)
        path = found.blocks[1].path
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink() if damage == "gone" else path.write_bytes(b"" if damage == "empty" else data)
        return found

    engine.engine._archive.find = found_and_damaged  # type: ignore[attr-defined]
    event = engine.ask(prompt(600))
    assert event["full_text"] == expected["full_text"]
    assert cached(event) == 0


class Forgetful(FakeRunner):
    """Takes no keys and values back."""

    def write(self, *_: Any) -> bool:
        return False


def test_what_the_runner_does_not_take_is_computed_again(opened: Open) -> None:
    expected = opened().ask(prompt(400))
    event = opened(Forgetful).ask(prompt(400))
    assert (event["full_text"], cached(event)) == (expected["full_text"], 0)


def test_a_batch_keeps_nothing_but_uses_what_is_kept(opened: Open, folder: Path) -> None:
    opened().ask(prompt(300), priority=1)
    assert not folder.exists()
    opened().ask(prompt(300))
    assert cached(opened().ask(prompt(300), priority=1)) == 299


def test_a_small_prompt_leaves_nothing(opened: Open, folder: Path) -> None:
    opened().ask("a few words")
    assert not folder.exists()


def test_a_conversation_that_grows_keeps_each_token_once(opened: Open, folder: Path) -> None:
    for turn in range(1, 8):
        opened().ask(prompt(100 * turn))
    n_tokens = sum(int(file.name.split("-")[1]) for file in folder.iterdir())
    assert 700 <= n_tokens <= 700 + 7 * 2  # and the answers


def test_many_at_once_with_one_beginning_are_all_answered_from_it(opened: Open) -> None:
    opened().ask(prompt(300))
    engine = opened(ms_per_token=1)
    events: queue.SimpleQueue[list[Event]] = engine._emitted
    for number in range(8):
        tokens = engine.engine.tokenizer.encode(f"{prompt(300)} {number} more", special=True)
        engine.engine.submit(GenRequest(prompt="", max_tokens=2), tokens, Arrival(number, time.monotonic()))
    done: list[Event] = []
    while len(done) < 8:
        done += [event for event in events.get(timeout=30) if event["done"]]
    assert {cached(event) for event in done} == {300}


# ── on a real model ─────────────────────────────────────────────────────────────────────────


TEXT = "The sea was calm that morning, and the boats went out one after the other. " * 12


@pytest.fixture
def opened_anew(folder: Path) -> Iterator[Open]:
    """Opens a model anew, as a process of its own would; one at a time."""
    last: list[Engine] = []

    def start(model: Path, options: LoadOptions | None = None, name: str = "a model") -> Asked:
        while last:
            last.pop().close()
        kept, chosen = Kept(folder, 2**30, name), options or LoadOptions()
        asked = Asked(lambda emit: open_engine(model, chosen, emit, lambda _: None, kept=kept))
        last.append(asked.engine)
        return asked

    yield start
    while last:
        last.pop().close()


@pytest.fixture
def real(opened_anew: Open, smollm2_path: Path) -> Open:
    return partial(opened_anew, smollm2_path)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_answers_past_a_sliding_window_are_restored_as_they_were(
    opened_anew: Open, gemma3_path: Path
) -> None:
    for number in range(20):
        text = f"<bos>Story {number}. {TEXT * 5}"  # 850 tokens, of which the window holds 512
        expected = opened_anew(gemma3_path).ask(text, max_tokens=16, sampling=GREEDY)
        event = opened_anew(gemma3_path).ask(text, max_tokens=16, sampling=GREEDY)
        assert n_prompt(event) > 600
        assert (event["full_text"], cached(event)) == (expected["full_text"], n_prompt(event) - 1)


@pytest.mark.model
@times(20, 200)
def test_restored_answers_are_the_fresh_ones(real: Open, count: int) -> None:
    """Each in an engine of its own: what else is in a cache changes low bits."""
    for number in range(count):
        text = f"Story {number}. {TEXT[: 300 + number]}"
        expected = real().ask(text, max_tokens=16, sampling=GREEDY)
        event = real().ask(text, max_tokens=16, sampling=GREEDY)
        assert (event["full_text"], cached(event)) == (expected["full_text"], n_prompt(event) - 1)


@pytest.mark.model
def test_nothing_is_read_back_for_another_model_or_another_type_of_cache(real: Open) -> None:
    real().ask(TEXT)
    assert cached(real(name="another").ask(TEXT)) == 0
    assert cached(real(LoadOptions(kv_type="q8_0")).ask(TEXT)) == 0


@pytest.mark.model
def test_where_sequences_share_no_cells_nothing_is_kept(real: Open, folder: Path) -> None:
    real(LoadOptions(flash_attn="off")).ask(TEXT)
    assert not folder.exists()
