"""How a model is laid out in memory: its window, how many sequences run at once, and in which kind of cache.

Chosen once, at load time, from the loading options, the model and the memory that is free.
"""

from __future__ import annotations

from typing import NamedTuple

from myllm import hardware
from myllm.engine.llama import Model
from myllm.engine.pace import TILE_ROWS
from myllm.engine.space import POOL, Pool, Space, Streams, round_up
from myllm.requests import LoadOptions

SLOTS = 128
"""Sequence ids: the running ones and as many idle prefixes to reuse. Free of cost in a pool."""
STREAMS = 16
"""Sequences at once where each has cells of its own, and pays memory for them."""
MEMORY_SHARE = 0.8
"""How much of the memory that is free at load time the KV cache may come to."""
LEAST_WINDOW = 512


class Layout(NamedTuple):
    """`window` is the most tokens of one sequence; `space` the kind of cache to begin with."""

    window: int
    n_threads: int
    space: Space


def choose_layout(options: LoadOptions, model: Model) -> Layout:
    """The layout for `model`; a window that was asked for is kept, one that was not fits the memory."""
    isolates = model.is_recurrent or options.flash_attn == "off"
    rows = min(options.parallel or TILE_ROWS - 1, STREAMS if isolates else TILE_ROWS - 1)
    # Two bytes a number: the default type of the cache. A narrower one only leaves more free.
    bytes_per_cell = max(2 * model.kv_values_per_token, 1)
    affordable = max(int(hardware.available_memory() * MEMORY_SHARE / bytes_per_cell), LEAST_WINDOW)
    window = min(options.context or affordable // (rows if isolates else 1), model.n_ctx_train)
    n_threads = options.threads or hardware.physical_cores()
    if isolates:
        return Layout(window, n_threads, Streams(rows, window))
    return Layout(window, n_threads, Pool(round_up(max(window, min(POOL, affordable))), rows, SLOTS))
