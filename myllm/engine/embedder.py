"""llama.cpp's side of embeddings: a context of its own, batches of whole windows in, vectors out.

Knows nothing of requests or texts. One thread owns an Embedder. What would abort inside llama.cpp is
refused here first, with ValueError: a bug of the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine import llama
from myllm.engine.context import Batch
from myllm.engine.llama import Model, lib
from myllm.engine.space import round_up
from myllm.errors import BadDataError, InternalError, UnavailableError

N_TOKENS: Final = 256
"""Tokens of a batch, or one window's where that is longer. Every token is compared with all of its batch,
other windows too: 512 were 2 to 15 % slower in six pairs of runs (MiniLM-L6, 37 tokens a text). Four more
pairs are not counted, as tests ran beside them; 128 were as fast as 256."""
N_SEQUENCES: Final = 16
LONGEST_WINDOW: Final = 2048
"""Tokens of a window at most: llama.cpp keeps logits for each of them, though nobody asks for any, 400 MB
for these in a vocabulary of 49,152."""


class Embedder:
    """A context for embeddings of at most `window` tokens each. Implements `embed_queue.Embedder`."""

    n_sequences = N_SEQUENCES

    def __init__(self, model: Model, window: int, n_threads: int) -> None:
        """Raises BadDataError for a model that ranks, UnavailableError where there is too little memory."""
        if model.pooling == lib.LLAMA_POOLING_TYPE_RANK:
            raise BadDataError("model: it ranks texts and makes no vectors; use an embedding model")
        # llama.cpp aborts where the mean is taken and this is no multiple of n_seq_max.
        self.n_tokens = round_up(max(N_TOKENS, window))
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_tokens
        params.n_seq_max = N_SEQUENCES
        params.n_threads = params.n_threads_batch = n_threads
        params.embeddings = True
        params.kv_unified = True
        params.no_perf = True
        params.pooling_type = (
            lib.LLAMA_POOLING_TYPE_UNSPECIFIED if model.pooling else lib.LLAMA_POOLING_TYPE_MEAN
        )
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise UnavailableError(f"embed: llama.cpp cannot make a context of {self.n_tokens:,} tokens")
        self._width: int = lib.llama_model_n_embd_out(model.pointer)
        self._memory = lib.llama_get_memory(self.pointer)
        self._batch = Batch(self.n_tokens)

    def embed(self, windows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """`(len(windows), dimensions)` vectors as the model makes them; blocks for the whole batch.

        Raises InternalError where llama.cpp fails.
        """
        if self._memory:
            lib.llama_memory_clear(self._memory, False)
        self._batch.clear()
        for slot, tokens in enumerate(windows):
            self._batch.add_whole(tokens, slot)
        if code := lib.llama_decode(self.pointer, self._batch.struct):
            llama.explain()
            sys.stderr.write(f"llama_decode: {code} with {len(windows)} windows to embed\n")
            raise InternalError(f"llama.cpp: embedding failed with {code}")
        vectors = np.empty((len(windows), self._width), np.float32)
        for slot in range(len(windows)):
            pointer = lib.llama_get_embeddings_seq(self.pointer, slot)
            if not pointer:
                raise InternalError("llama.cpp: no vector for a window")
            vectors[slot] = np.ctypeslib.as_array(pointer, (self._width,))
        return vectors

    def close(self) -> None:
        if self.pointer:
            lib.llama_free(self.pointer)
            self.pointer = None
