"""How large a model is loaded: its window, how many sequences run at once, and how its cache is laid out.

Chosen once, at load time, from the loading options, the model and the device. Must not know llama.cpp.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from myllm import hardware
from myllm.engine.device import Device
from myllm.engine.kv_layout import POOL, Layout, Pool, Streams, round_up
from myllm.requests import LoadOptions

SLOTS: Final = 128
"""Sequence ids: the running ones and as many idle prefixes to reuse. Free of cost in a pool."""
STREAMS: Final = 16
"""Sequences at once where each has cells of its own, and pays memory for them."""
MEMORY_SHARE: Final = 0.8
"""How much of the memory that is free at load time the KV cache may come to."""
LEAST_WINDOW: Final = 512


class Weighed(Protocol):
    """What of a model decides its size."""

    n_ctx_train: int
    kv_values_per_token: int
    is_recurrent: bool


class Sizing(NamedTuple):
    """`window` is the most tokens of one sequence."""

    window: int
    n_threads: int
    layout: Layout


def choose_sizing(options: LoadOptions, model: Weighed, device: Device) -> Sizing:
    """The sizing for `model`; a window that was asked for is kept, one that was not fits the memory."""
    isolates = model.is_recurrent or options.flash_attn == "off"
    rows = min(options.parallel or device.max_rows, STREAMS if isolates else device.max_rows)
    # Two bytes a number: the default type of the cache. A narrower one only leaves more free.
    bytes_per_cell = max(2 * model.kv_values_per_token, 1)
    affordable = max(int(device.memory_bytes * MEMORY_SHARE / bytes_per_cell), LEAST_WINDOW)
    window = min(options.context or affordable // (rows if isolates else 1), model.n_ctx_train)
    n_threads = options.threads or hardware.physical_cores()
    if isolates:
        return Sizing(window, n_threads, Streams(rows, window))
    max_cells = round_up(max(window, min(POOL, affordable)))
    return Sizing(window, n_threads, Pool(max_cells, rows, SLOTS, device))
