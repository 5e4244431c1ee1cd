"""llama.cpp's context and batch: the KV cache and what is decoded into it, with numpy views on the buffers.

Knows nothing of requests or scheduling. What would abort inside llama.cpp (a batch over its limit)
is refused here first, with ValueError: a bug of the caller. One thread owns a Context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine.kv_cache import Copy, Remove
from myllm.engine.llama import Model, lib
from myllm.errors import UnavailableError

GGML_TYPES: Final = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "bf16": 30,
}
"""KV cache element types by name: `enum ggml_type`."""


class Context:
    """A KV cache of `n_ctx` cells and the buffers to decode into it."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_seq_max: int,
        n_batch: int,
        n_threads: int,
        kv_type: str = "f16",
        flash_attn: bool = True,
        unified: bool = True,
    ) -> None:
        """`unified`: one pool of cells for all sequences, else `n_ctx / n_seq_max` for each.

        Raises UnavailableError where the memory can't be had."""
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, n_seq_max
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = max(n_seq_max, 1)
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = -1 if flash_attn else 0
        params.type_k = params.type_v = GGML_TYPES[kv_type]
        params.kv_unified = unified
        params.no_perf = True
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise UnavailableError(
                f"context: llama.cpp cannot make one of {n_ctx:,} tokens; try a smaller --context"
            )
        self.n_ctx: int = lib.llama_n_ctx(self.pointer)
        self.n_batch: int = lib.llama_n_batch(self.pointer)
        self._n_vocab = model.tokenizer.n_vocab
        self._memory = lib.llama_get_memory(self.pointer)

    def decode(self, batch: Batch) -> int:
        """llama_decode: 0 is success, 1 no cells, below 0 an error. Blocks for the whole step."""
        return int(lib.llama_decode(self.pointer, batch.struct))

    def logits(self, n_rows: int) -> NDArray[np.float32]:
        """`(n_rows, n_vocab)` logits of the batch's flagged tokens in order; valid until the next decode."""
        address = ctypes.cast(lib.llama_get_logits(self.pointer), ctypes.c_void_p).value
        if address is None:
            raise ValueError("no logits: nothing was decoded")
        flat = (ctypes.c_float * (n_rows * self._n_vocab)).from_address(address)
        return np.frombuffer(memoryview(flat), np.float32).reshape(n_rows, self._n_vocab)

    def apply(self, operation: Remove | Copy) -> None:
        """Brings the KV cache in line with the scheduler's books."""
        if isinstance(operation, Remove):
            lib.llama_memory_seq_rm(self._memory, operation.slot, operation.start, -1)
        else:
            self.copy(operation.source, operation.target, 0, operation.length)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Has `target` share what `source` holds at the positions `start` to `end`."""
        lib.llama_memory_seq_cp(self._memory, source, target, start, end)

    def holds(self, slot: int, start: int, end: int) -> bool:
        """Whether a sequence's first and last positions are so that it has all from `start` to `end`."""
        first = lib.llama_memory_seq_pos_min(self._memory, slot)
        return bool(first <= start and end - 1 <= lib.llama_memory_seq_pos_max(self._memory, slot))

    def read_state(self, slot: int) -> NDArray[np.uint8]:
        """The keys and values of one sequence, as bytes that `write_state` understands."""
        size = lib.llama_state_seq_get_size_ext(self.pointer, slot, 0)
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = lib.llama_state_seq_get_data_ext(self.pointer, pointer, size, slot, 0)
        return state[:written]

    def write_state(self, slot: int, state: NDArray[np.uint8]) -> bool:
        """Puts a sequence's keys and values back; False where llama.cpp does not take them."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(lib.llama_state_seq_set_data_ext(self.pointer, pointer, len(state), slot, 0))

    def close(self) -> None:
        if self.pointer:
            lib.llama_free(self.pointer)
            self.pointer = None


class Batch:
    """The tokens of one step, in buffers that are filled by slices and never copied in Python."""

    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._token = np.zeros(n_max, np.int32)
        self._pos = np.zeros(n_max, np.int32)
        self._slot = np.zeros(n_max, np.int32)
        self._n_slots = np.ones(n_max, np.int32)
        self._output = np.zeros(n_max, np.int8)
        rows = self._slot.ctypes.data + self._slot.itemsize * np.arange(n_max + 1, dtype=np.uint64)
        self._slot_rows = rows.astype(np.uint64)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.struct = lib.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int32),
            embd=None,
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._n_slots.ctypes.data_as(int32),
            seq_id=self._slot_rows.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        self.struct.n_tokens = 0

    def add_whole(self, tokens: Sequence[int], slot: int) -> None:
        """Appends a whole sequence, every token with its output, as embeddings want it."""
        first: int = self.struct.n_tokens
        self.add(tokens, 0, slot, output=True)
        self._output[first : self.struct.n_tokens] = True

    def add(self, tokens: Sequence[int], start: int, slot: int, *, output: bool) -> int:
        """Appends `tokens` at positions `start…` of `slot`; `output` asks for the last one's logits.

        Returns that last token's index in the batch.
        """
        first: int = self.struct.n_tokens
        end = first + len(tokens)
        if end > self._n_max:
            raise ValueError(f"a batch holds {self._n_max} tokens, not {end}")
        self._token[first:end] = tokens
        self._pos[first:end] = np.arange(start, start + len(tokens))
        self._slot[first:end] = slot
        self._output[first:end] = False
        self._output[end - 1] = output
        self.struct.n_tokens = end
        return end - 1
