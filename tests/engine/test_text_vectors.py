"""Windows into batches, vectors into events; no llama.cpp."""

from __future__ import annotations

from base64 import b64decode
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.engine import TextWindow
from myllm.engine.text_vectors import TextVectors, normalised
from myllm.engine.window_packer import WindowPacker
from myllm.protocol import Message
from myllm.requests import Arrival, EmbedRequest


def embedding(*lengths: int, request_id: int = 1, client: int = 0, **fields: Any) -> TextVectors:
    """One text whose windows have these many tokens."""
    windows = [TextWindow(index * 10, index * 10 + 10, [7] * n) for index, n in enumerate(lengths)]
    return TextVectors(EmbedRequest(texts=["x"], **fields), [windows], Arrival(request_id, 0.0, client))


def vector(event: Message) -> list[float]:
    return [float(x) for x in np.frombuffer(b64decode(event["embedding"]), "<f4")]


@given(st.lists(st.integers(1, 600), min_size=1, max_size=200), st.integers(1, 16))
def test_batches_hold_every_window_once_within_their_limits(lengths: list[int], n_sequences: int) -> None:
    packer = WindowPacker(512, n_sequences)
    packer.add(embedding(*lengths).windows())
    seen = []
    while packer:
        batch = packer.next_batch()
        assert 0 < len(batch) <= n_sequences
        assert len(batch) == 1 or sum(len(w.tokens) for w in batch) <= 512
        seen += [window.chunk for window in batch]
    assert sorted(seen) == list(range(len(lengths)))


def test_the_oldest_window_always_goes_and_short_ones_fill_the_batch_up() -> None:
    packer = WindowPacker(512, 16)
    packer.add(embedding(300, 300, 100, 200, 12).windows())
    assert [window.chunk for window in packer.next_batch()] == [0, 2, 4]
    assert [window.chunk for window in packer.next_batch()] == [1, 3]


def test_beside_running_sequences_a_batch_is_smaller() -> None:
    packer = WindowPacker(512, 16)
    packer.add(embedding(*[30] * 16).windows())
    assert len(packer.next_batch(128)) == 4


def test_an_interactive_request_s_windows_go_before_a_batch_s() -> None:
    packer = WindowPacker(512, 16)
    batch, urgent = embedding(500, 500, priority=1), embedding(500, request_id=2)
    packer.add(batch.windows())
    packer.add(urgent.windows())
    order = [packer.next_batch()[0].owner for _ in range(3)]
    assert order == [urgent, batch, batch]


def test_one_client_s_text_does_not_wait_behind_another_s_thousand() -> None:
    packer = WindowPacker(512, 16)
    packer.add(embedding(*[250] * 1000, client=1).windows())
    for _ in range(3):
        packer.next_batch()
    late = embedding(250, 250, request_id=2, client=2)
    packer.add(late.windows())
    owners = [window.owner for _ in range(2) for window in packer.next_batch()]
    assert owners.count(late) == 2


def tokens_by_client(packer: WindowPacker, n_batches: int) -> Counter[int]:
    tokens: Counter[int] = Counter()
    for window in (window for _ in range(n_batches) for window in packer.next_batch()):
        tokens[window.owner.arrival.client] += len(window.tokens)
    return tokens


def test_clients_share_by_tokens_and_none_saves_up_while_it_is_away_or_pays_for_what_it_cancelled() -> None:
    packer = WindowPacker(100, 16)
    many, large = embedding(*[10] * 200, client=1), embedding(*[50] * 20, request_id=2, client=2)
    packer.add([*many.windows(), *large.windows()])
    assert tokens_by_client(packer, 6) == {1: 300, 2: 300}
    packer.drop(large)
    assert tokens_by_client(packer, 4) == {1: 400}
    packer.add(embedding(*[50] * 20, request_id=3, client=2).windows())
    shares = tokens_by_client(packer, 8)
    assert abs(shares[1] - shares[2]) <= 100


def test_what_a_request_still_wanted_goes_with_it() -> None:
    packer, ended, other = WindowPacker(512, 16), embedding(5, 5), embedding(5, request_id=2)
    packer.add([*ended.windows(), *other.windows()])
    packer.drop(ended)
    assert [window.owner for window in packer.next_batch()] == [other]


def test_a_text_s_windows_come_in_order_whatever_was_computed_first() -> None:
    text = embedding(3, 4)
    assert text.take(0, 1, np.ones(4, np.float32)) == []
    events = text.take(0, 0, np.array([3, 4, 0, 0], np.float32))
    assert [(e["chunk"], e["start"], e["end"], e["tokens"]) for e in events] == [
        (0, 0, 10, 3),
        (1, 10, 20, 4),
    ]
    assert vector(events[0]) == pytest.approx([0.6, 0.8, 0, 0])
    assert text.finished
    assert text.closing(None, 2.0)["usage"] == {"prompt_tokens": 7}


def test_pooled_windows_are_one_vector_weighted_by_their_tokens() -> None:
    text = embedding(3, 1, pool="mean")
    assert text.take(0, 0, np.array([2, 0], np.float32)) == []
    (event,) = text.take(0, 1, np.array([0, 5], np.float32))
    assert (event["chunk"], event["start"], event["end"], event["tokens"]) == (0, 0, 20, 4)
    assert vector(event) == pytest.approx([3 / 10**0.5, 1 / 10**0.5])


def test_vectors_that_are_to_stay_raw_do_and_pooled_ones_are_their_mean() -> None:
    windows = [TextWindow(0, 10, [7] * 3), TextWindow(10, 20, [7])]
    text = TextVectors(EmbedRequest(texts=["x"]), [windows], Arrival(1, 0.0), normalizes=False)
    (event,) = text.take(0, 0, np.array([3, 4], np.float32))
    assert vector(event) == [3, 4]
    pooled = TextVectors(EmbedRequest(texts=["x"], pool="mean"), [windows], Arrival(1, 0.0), normalizes=False)
    assert pooled.take(0, 0, np.array([2, 0], np.float32)) == []
    (event,) = pooled.take(0, 1, np.array([0, 4], np.float32))
    assert vector(event) == [1.5, 1]


def test_a_vector_of_zeros_stays_what_it_is() -> None:
    assert list(normalised(np.zeros(3, np.float32))) == [0, 0, 0]
