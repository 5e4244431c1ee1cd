"""Embed requests through client, Runtime, cache and a worker with the fake engine."""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm.client import connect
from myllm.client.client import Client
from myllm.settings import load

Event = dict[str, Any]
FakeModel = Callable[..., Path]
TEXTS = ["one two", "three", "one two", ""]


def embed(client: Client, model: Path, texts: list[str], **fields: Any) -> list[Event]:
    request = {"op": "embed", "model": str(model), "texts": texts, **fields}
    return [orjson.loads(line) for line in client.stream(request)]


def until_done(events: Iterator[bytes]) -> list[Event]:
    """The events up to the next done event, that one included."""
    found: list[Event] = []
    while not (found and found[-1].get("done")):
        found.append(orjson.loads(next(events)))
    return found


def items(events: list[Event]) -> list[tuple[int, int, int, int, int]]:
    keys = ("item", "chunk", "start", "end", "tokens")
    return [tuple(event[key] for key in keys) for event in events if "embedding" in event]  # type: ignore[misc]


def vectors(events: list[Event]) -> dict[tuple[int, int], bytes]:
    return {(e["item"], e["chunk"]): b64decode(e["embedding"]) for e in events if "embedding" in e}


def test_every_text_gets_its_vector_and_equal_ones_the_same(client: Client, fake_model: FakeModel) -> None:
    *events, done = embed(client, fake_model(dimensions=4), TEXTS[:3])
    found = vectors(events)
    assert sorted(found) == [(0, 0), (1, 0), (2, 0)]
    assert found[0, 0] == found[2, 0] != found[1, 0]
    assert all(len(vector) == 16 for vector in found.values())
    assert (done["dimensions"], done["usage"]) == (4, {"prompt_tokens": 3, "cached_texts": 0})
    assert set(done["timings"]) == {"queue_ms", "load_ms", "embed_ms"}


def test_what_was_embedded_once_starts_no_worker(fake_model: FakeModel, nothing_left: list[int]) -> None:
    model = fake_model()
    with connect(load()) as client:
        first = vectors(embed(client, model, TEXTS[:3]))
    started = len(nothing_left)
    with connect(load(), spare=False) as client:
        *events, done = embed(client, model, TEXTS[:3])
        assert vectors(events) == first
        assert all(event["cached"] for event in events)
        assert done["usage"]["cached_texts"] == 3
        assert len(nothing_left) == started
        *_, done = embed(client, model, [*TEXTS[:3], "new"])
        assert done["usage"]["cached_texts"] == 3
    assert len(nothing_left) == started + 1


@pytest.mark.parametrize("change", [{"window": 3}, {"overlap": 1}, {"pool": "mean"}, {"cache": False}])
def test_other_settings_are_not_answered_from_the_cache(
    client: Client, fake_model: FakeModel, change: Event
) -> None:
    model = fake_model()
    embed(client, model, ["a b c d e"])
    *events, _ = embed(client, model, ["a b c d e"], **change)
    assert not any(event["cached"] for event in events)


def test_a_changed_model_file_is_another_model(client: Client, fake_model: FakeModel) -> None:
    embed(client, fake_model(dimensions=4), ["a"])
    *events, done = embed(client, fake_model(dimensions=4, tokens=["x"]), ["a"])
    assert (events[0]["cached"], done["usage"]["cached_texts"]) == (False, 0)


def test_a_long_text_is_cut_into_windows_that_tile_it(client: Client, fake_model: FakeModel) -> None:
    *events, _ = embed(client, fake_model(), ["a b c. d e f. g"], window=4)
    assert items(events)[0][2] == 0
    assert [item[1] for item in items(events)] == list(range(len(items(events))))
    assert items(events)[-1][3] == 15
    *events, _ = embed(client, fake_model(), ["a b c. d e f. g"], window=4, pool="mean")
    assert [item[:4] for item in items(events)] == [(0, 0, 0, 15)]


def test_a_text_over_the_window_or_empty_fails_alone(client: Client, fake_model: FakeModel) -> None:
    *events, done = embed(client, fake_model(), ["a b c d e", "a", ""], window=4, on_overflow="error")
    errors = {event["item"]: event["error"]["code"] for event in events if "error" in event}
    assert errors == {0: "context_overflow", 2: "bad_data"}
    assert [item[0] for item in items(events)] == [1]
    assert "error" not in done


@pytest.mark.parametrize(
    "fields", [{"window": 5000}, {"texts": []}, {"texts": [1]}, {"texts": ["a"] * 257}, {"pool": "max"}]
)
def test_what_makes_no_sense_is_refused(client: Client, fake_model: FakeModel, fields: Event) -> None:
    (done,) = embed(client, fake_model(), **{"texts": ["a"], **fields})
    assert done["error"]["code"] == "usage"


def test_a_worker_that_dies_fails_the_request_and_keeps_nothing(
    client: Client, fake_model: FakeModel
) -> None:
    model = fake_model(fault={"kind": "kill", "at": "vector", "after_tokens": 20, "words": "oh no"})
    texts = [f"text {number}" for number in range(40)]
    *events, done = embed(client, model, texts)
    assert len(vectors(events)) == 16  # the first batch
    assert done["error"]["code"] == "worker_crashed"
    assert "oh no" in done["error"]["message"]
    *events, done = embed(client, model, texts[:4])
    assert not any(event["cached"] for event in events)
    assert "error" not in done


def test_an_exception_while_embedding_fails_its_request_only(client: Client, fake_model: FakeModel) -> None:
    model = fake_model(fault={"kind": "error", "at": "vector"})
    (done,) = embed(client, model, ["a"])
    assert done["error"]["code"] == "internal"
    *events, done = embed(client, model, ["a"])
    assert (len(events), done.get("error")) == (1, None)


def test_cancelling_ends_an_embedding_and_keeps_nothing(client: Client, fake_model: FakeModel) -> None:
    model = fake_model(prompt_ms_per_token=5)
    texts = [f"text {number}" for number in range(200)]
    client.send({"op": "embed", "id": 1, "model": str(model), "texts": texts})
    events = client.events()
    first = orjson.loads(next(events))
    client.send({"op": "cancel", "id": 1})
    *found, done = [first, *until_done(events)]
    assert (done["id"], done["finish_reason"]) == (1, "cancelled")
    assert 0 < len(vectors(found)) < 200
    assert done["usage"]["cached_texts"] == 0
    client.send({"op": "embed", "id": 2, "model": str(model), "texts": texts[:1]})
    again, done = until_done(events)
    assert (again["cached"], done["id"]) == (False, 2)


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_request_that_ends_before_a_worker_has_it_says_the_same_as_others(
    client: Client, fake_model: FakeModel, reason: str
) -> None:
    whole = embed(client, fake_model("other"), ["a"])[-1]
    request = {"op": "embed", "id": 1, "model": str(fake_model(load_ms=5000)), "texts": ["a"]}
    client.send(request | ({"deadline_ms": 200} if reason == "deadline" else {}))
    events = client.events()
    if reason == "cancelled":
        next(events)  # it loads
        client.send({"op": "cancel", "id": 1})
    *_, early = until_done(events)
    assert early.keys() - {"id", "finish_reason"} == whole.keys()
    assert early["finish_reason"] == reason
    assert (early["dimensions"], early["usage"]) == (0, {"prompt_tokens": 0, "cached_texts": 0})
    assert early["timings"].keys() == whole["timings"].keys()
    assert early["timings"]["load_ms"] > 0


def test_cancelling_while_the_model_loads_ends_it(client: Client, fake_model: FakeModel) -> None:
    client.send({"op": "embed", "id": 1, "model": str(fake_model(load_ms=5000)), "texts": ["a"]})
    events = client.events()
    next(events)  # it loads
    client.send({"op": "cancel", "id": 1})
    started = time.monotonic()
    *_, done = until_done(events)
    assert done["finish_reason"] == "cancelled"
    assert time.monotonic() - started < 2


def test_a_deadline_counts_from_arrival_also_over_a_load(client: Client, fake_model: FakeModel) -> None:
    model = fake_model(load_ms=600, prompt_ms_per_token=5)
    texts = [f"text {number}" for number in range(250)]
    *events, done = embed(client, model, texts, deadline_ms=1000)
    assert done["finish_reason"] == "deadline"
    assert done["timings"]["load_ms"] >= 600
    n_tokens = sum(event["tokens"] for event in events if "embedding" in event)
    assert n_tokens * 5 <= 1000 - 600, "what there was time for after the load"


def test_a_generation_streams_on_while_500_texts_are_embedded(client: Client, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 20, ms_per_token=2, prompt_ms_per_token=0.2)
    for number in range(2):
        texts = [f"text {number} {item}" for item in range(250)]
        client.send({"op": "embed", "id": number, "model": str(model), "texts": texts})
    client.send({"op": "gen", "id": 2, "model": str(model), "prompt": "a", "raw": True})
    kinds: list[str] = []
    lines = client.events()
    while kinds.count("done") < 3:
        event = orjson.loads(next(lines))
        kinds.append("vector" if "embedding" in event else "token" if "token" in event else "done")
    assert (kinds.count("vector"), kinds.count("token")) == (500, 20)
    tokens = [place for place, kind in enumerate(kinds) if kind == "token"]
    between = [later - earlier - 1 for earlier, later in pairwise(tokens)]
    assert 0 < max(between) <= 16
    assert tokens[-1] < kinds.index("done") + 1 < len(kinds) - 16


def test_a_client_that_goes_away_leaves_no_worker(fake_model: FakeModel, nothing_left: list[int]) -> None:
    model = fake_model(prompt_ms_per_token=5)
    with connect(load()) as client:
        client.send({"op": "embed", "model": str(model), "texts": ["a b c"] * 50})
        client.max_in_flight  # noqa: B018 — waits for the other side to be there
        time.sleep(0.1)
    assert nothing_left  # there was one, and the fixture sees that it ends
