"""From pieces to events: what a client sees of one request, and how its times are told."""

from __future__ import annotations

from typing import Any

from myllm.engine.generation import Generation, Times
from myllm.engine.sequence import Sequence
from myllm.engine.text import TextStream
from myllm.requests import GenRequest


def generation(stop: list[str] | None = None, **times: float) -> Generation:
    sequence = Sequence(4, [1, 2, 3], 100)
    return Generation(
        GenRequest(prompt="x"),
        sequence,
        Times(**{"arrived": 10.0, **times}),
        n_prompt=3,
        text=TextStream(stop or []),
    )


def feed(g: Generation, *pieces: bytes) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for piece in pieces:
        g.sequence.tokens.append(0)
        events += g.token_events(piece, {})
    return events


def test_token_texts_joined_are_the_full_text_and_bytes_wait_for_their_character() -> None:
    g = generation()
    events = feed(g, b"a", "é".encode()[:1], "é".encode()[1:])
    done = g.closing_events("stop", 11.0)
    assert events == [{"id": 4, "token": "a", "done": False}, {"id": 4, "token": "é", "done": False}]
    assert done[-1]["full_text"] == "aé"
    assert done[-1]["usage"] == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 3,
        "dropped_messages": 0,
    }


def test_held_text_comes_before_the_done_event() -> None:
    g = generation(stop=["END"])
    assert feed(g, b"xE") == [{"id": 4, "token": "x", "done": False}]
    assert g.closing_events("length", 11.0)[0] == {"id": 4, "token": "E", "done": False}


def test_with_logprobs_every_token_has_an_event_even_one_without_text() -> None:
    g = generation()
    event = g.token_events("é".encode()[:1], {"logprob": -1.0})
    assert event == [{"id": 4, "token": "", "done": False, "logprob": -1.0}]


def test_reasoning_is_marked_and_not_part_of_the_answer() -> None:
    g = generation()
    events = feed(g, b"<think>", b"hm", b"</think>", b"Yes")
    assert [(e["token"], e.get("reasoning", False)) for e in events] == [("hm", True), ("Yes", False)]
    done = g.closing_events("stop", 11.0)[-1]
    assert (done["full_text"], done["reasoning_text"]) == ("Yes", "hm")


def test_times_do_not_overlap_and_add_up() -> None:
    g = generation(admitted=10.5, first_token=11.0, last_token=12.0)
    feed(g, b"a", b"b", b"c")
    assert g.closing_events("stop", 12.5)[-1]["timings"] == {
        "queue_ms": 500.0,
        "prefill_ms": 500.0,
        "ttft_ms": 1000.0,
        "decode_ms": 1000.0,
        "tokens_per_second": 2.0,
    }


def test_a_request_that_ended_while_it_waited_has_only_queued() -> None:
    timings = generation().closing_events("deadline", 12.0)[-1]["timings"]
    assert timings["queue_ms"] == 2000.0
    assert timings["prefill_ms"] == timings["decode_ms"] == timings["tokens_per_second"] == 0.0


def test_without_streaming_there_is_only_the_done_event_and_nothing_is_lost() -> None:
    g = generation(stop=["END"])
    g.request.stream = False
    assert g.token_events(b"a", {"logprob": -1.0}) == []
    assert g.token_events(b"E", {"logprob": -2.0}) == []
    [done] = g.closing_events("length", 11.0)
    assert done["full_text"] == "aE"
    assert [entry["logprob"] for entry in done["logprobs"]] == [-1.0, -2.0]
