"""llama.cpp's side of embeddings: contexts of their own, batches of whole windows in, vectors out.

Knows nothing of requests or texts. One thread owns an Embedder. What would abort inside llama.cpp is
refused here first, with ValueError: a bug of the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine import llama
from myllm.engine.context import Batch
from myllm.engine.llama import Model, lib
from myllm.engine.space import round_up
from myllm.errors import BadDataError, InternalError, UnavailableError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

N_TOKENS: Final = 256
"""Tokens of a batch, or one window's where that is longer. Every token is compared with all of its batch,
other windows too: 512 were 2 to 15 % slower in six pairs of runs (MiniLM-L6, 37 tokens a text). Four more
pairs are not counted, as tests ran beside them; 128 were as fast as 256."""
N_SEQUENCES: Final = 16
MOST_LANES: Final = 8
"""Contexts at most, each a few megabytes."""
LONGEST_WINDOW: Final = 2048
"""Tokens of a window at most: llama.cpp keeps logits for each of them, though nobody asks for any, 400 MB
for these in a vocabulary of 49,152."""


class Embedder:
    """Makes vectors of windows of at most `window` tokens each. Implements `embed_queue.Embedder`.

    An encoder's batches are computed side by side, a lane of its own for each, instead of all threads on
    one: 1.22 times the texts a second on two cores (MiniLM-L6), as nothing waits for the other thread
    after each of a batch's hundreds of small steps.
    """

    n_sequences = N_SEQUENCES

    def __init__(self, model: Model, window: int, n_threads: int) -> None:
        """Raises BadDataError for a model that ranks, UnavailableError where there is too little memory."""
        if model.pooling == lib.LLAMA_POOLING_TYPE_RANK:
            raise BadDataError("model: it ranks texts and makes no vectors; use an embedding model")
        # llama.cpp aborts where the mean is taken and this is no multiple of n_seq_max.
        self.n_tokens = round_up(max(N_TOKENS, window))
        # A model with a vocabulary's logits to keep has one lane: these are its memory.
        self.n_batches = min(n_threads, MOST_LANES) if model.is_encoder else 1
        self._model, self._n_threads = model, n_threads
        self._lanes = [_Lane(model, self.n_tokens)]
        self._executor: ThreadPoolExecutor | None = None

    def embed(self, batches: Sequence[Sequence[Sequence[int]]]) -> list[NDArray[np.float32]]:
        """For each batch of windows, `(len(windows), dimensions)` vectors as the model makes them; blocks
        for all of them.

        Raises InternalError where llama.cpp fails, UnavailableError where memory for a lane is missing.
        """
        while len(self._lanes) < len(batches):
            self._lanes.append(_Lane(self._model, self.n_tokens))
        for lane in self._lanes:
            lane.use_threads(self._n_threads // len(batches))
        if len(batches) == 1:
            return [self._lanes[0].embed(batches[0])]
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor  # 14 ms, which few texts need not wait for

            self._executor = ThreadPoolExecutor(self.n_batches, "embed")
        return list(self._executor.map(_Lane.embed, self._lanes, batches))

    def close(self) -> None:
        if self._executor:
            self._executor.shutdown()
        for lane in self._lanes:
            lane.close()


class _Lane:
    """One context, for one batch at a time."""

    def __init__(self, model: Model, n_tokens: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
        params.n_seq_max = N_SEQUENCES
        params.embeddings = True
        params.kv_unified = True
        params.no_perf = True
        params.pooling_type = (
            lib.LLAMA_POOLING_TYPE_UNSPECIFIED if model.pooling else lib.LLAMA_POOLING_TYPE_MEAN
        )
        self._pointer = lib.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise UnavailableError(f"embed: llama.cpp cannot make a context of {n_tokens:,} tokens")
        self._width: int = lib.llama_model_n_embd_out(model.pointer)
        self._memory = lib.llama_get_memory(self._pointer)
        self._batch = Batch(n_tokens)

    def use_threads(self, n_threads: int) -> None:
        lib.llama_set_n_threads(self._pointer, n_threads, n_threads)

    def embed(self, windows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """`(len(windows), dimensions)` vectors; blocks for the whole batch."""
        if self._memory:
            lib.llama_memory_clear(self._memory, False)
        self._batch.clear()
        for slot, tokens in enumerate(windows):
            self._batch.add_whole(tokens, slot)
        if code := lib.llama_decode(self._pointer, self._batch.struct):
            llama.explain()
            sys.stderr.write(f"llama_decode: {code} with {len(windows)} windows to embed\n")
            raise InternalError(f"llama.cpp: embedding failed with {code}")
        vectors = np.empty((len(windows), self._width), np.float32)
        for slot in range(len(windows)):
            pointer = lib.llama_get_embeddings_seq(self._pointer, slot)
            if not pointer:
                raise InternalError("llama.cpp: no vector for a window")
            vectors[slot] = np.ctypeslib.as_array(pointer, (self._width,))
        return vectors

    def close(self) -> None:
        lib.llama_free(self._pointer)
