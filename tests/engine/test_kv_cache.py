"""The books of the KV cache: sharing, eviction and the longest prefix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.engine.kv_cache import Copy, KvCache, Remove, common_prefix

tokens = st.lists(st.integers(0, 2), max_size=40)


@given(tokens, tokens)
def test_common_prefix_is_what_counting_one_by_one_gives(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected


def test_shared_cells_are_counted_once_and_freed_by_the_last_slot() -> None:
    cache = KvCache(10, 3)
    first, second, _ = cache.slots
    cache.append(first, [1, 2, 3, 4])
    cache.share(first, second, 3)
    assert cache.n_free == 6
    cache.truncate(first, 0)
    assert (second.tokens, cache.n_free) == ([1, 2, 3], 7)
    cache.truncate(second, 1)
    assert cache.n_free == 9
    assert cache.take_operations() == [Copy(0, 1, 3), Remove(0, 0), Remove(1, 1)]
    assert cache.take_operations() == []


def test_room_is_made_from_the_least_recently_used_idle_slot_and_never_from_a_busy_one() -> None:
    cache = KvCache(9, 3)
    for slot in cache.slots:
        slot.busy = True
        cache.append(slot, [slot.id] * 3)
    cache.release(cache.slots[1])
    cache.release(cache.slots[0])
    assert cache.n_idle == 6
    assert cache.make_room(2)
    assert [len(slot.tokens) for slot in cache.slots] == [3, 0, 3]
    assert not cache.make_room(7)
    assert cache.slots[2].tokens == [2, 2, 2]


def test_an_idle_slot_is_preferred_to_a_busy_one_with_the_same_prefix() -> None:
    cache = KvCache(10, 2)
    for slot in cache.slots:
        cache.append(slot, [5, 6])
    cache.slots[0].busy = True
    assert cache.longest_prefix([5, 6, 7]) == (cache.slots[1], 2)
    assert cache.longest_prefix([9]) == (None, 0)


@pytest.mark.parametrize("n_cells", [6, 20])
def test_a_resized_cache_holds_the_busy_slots_without_sharing(n_cells: int) -> None:
    cache = KvCache(8, 3)
    first, second, third = cache.slots
    first.busy = second.busy = True
    cache.append(first, [1, 2, 3])
    cache.share(first, second, 3)
    cache.append(third, [9])
    cache.resize(n_cells)
    assert (first.tokens, second.tokens, third.tokens) == ([1, 2, 3], [1, 2, 3], [])
    assert cache.n_free == n_cells - 6
    assert cache.take_operations() == []
