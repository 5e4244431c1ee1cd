"""llama.cpp's side of embeddings: contexts of their own, batches of whole windows in, vectors out.

Knows nothing of requests or texts. One thread owns a LlamaEmbedder, and each of its lanes has its own. What
would abort inside llama.cpp is refused here first, with ValueError: a bug of the caller.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine import llama
from myllm.engine.context import Batch
from myllm.engine.kv_layout import round_up
from myllm.engine.llama import Model, lib
from myllm.errors import BadDataError, InternalError, MyllmError, UnavailableError

Job = tuple[int, Sequence[Sequence[int]], int]
"""A batch's number, its windows, and the threads to compute it with."""
Result = tuple[int, NDArray[np.float32] | MyllmError]

N_TOKENS: Final = 128
"""Tokens of a batch, or one window's where that is longer. Every token is compared with all of its batch,
other windows too; below 64 llama.cpp's attention takes its slow way. MiniLM-L6, 37 tokens a text, two lanes:
224 texts a second with 128 and 160, 221 with 192, 209 with 256, 127 with 64 (BF16, medians of three)."""
N_SEQUENCES: Final = 16
MOST_LANES: Final = 8
"""Contexts at most, each a few megabytes."""
LONGEST_WINDOW: Final = 2048
"""Tokens of a window at most: llama.cpp keeps logits for each of them, though nobody asks for any, 400 MB
for these in a vocabulary of 49,152."""


class LlamaEmbedder:
    """Makes vectors of windows of at most `window` tokens each. Implements Embedder.

    An encoder's batches are computed side by side, a lane for each, instead of all threads on one: 1.22
    times the texts a second on two cores (MiniLM-L6), as nothing waits for the other thread after each of
    a batch's hundreds of small steps. One more batch lies ready, so that no lane waits for the engine.
    """

    n_sequences = N_SEQUENCES

    def __init__(self, model: Model, window: int, n_threads: int) -> None:
        """Raises BadDataError for a model that ranks, UnavailableError where there is too little memory."""
        if model.pooling == lib.LLAMA_POOLING_TYPE_RANK:
            raise BadDataError("model: it ranks texts and makes no vectors; use an embedding model")
        # llama.cpp aborts where the mean is taken and this is no multiple of n_seq_max.
        self.n_tokens = round_up(max(N_TOKENS, window))
        # A model with a vocabulary's logits to keep has one lane: these are its memory.
        self._most_lanes = min(n_threads, MOST_LANES) if model.is_encoder else 1
        self.n_ahead = self._most_lanes + 1 if self._most_lanes > 1 else 1
        self._model, self._n_threads = model, n_threads
        self._lanes = [_Lane(model, self.n_tokens)]
        self._workers: list[threading.Thread] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._results: SimpleQueue[Result] = SimpleQueue()
        self._pending = 0

    def start(self, batches: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Begins to compute batches of windows, by numbers of the caller's.

        Raises UnavailableError, and begins none, where memory for a lane is missing.
        """
        n_lanes = min(self._pending + len(batches), self._most_lanes)
        while len(self._lanes) < n_lanes:
            self._lanes.append(_Lane(self._model, self.n_tokens))
        for lane in self._lanes[len(self._workers) :]:
            worker = threading.Thread(target=self._work, args=(lane,), name="embed", daemon=True)
            worker.start()
            self._workers.append(worker)
        self._pending += len(batches)
        for number, windows in batches.items():
            self._jobs.put((number, windows, self._n_threads // n_lanes))

    def result(self) -> Result:
        """A batch's number and its `(len(windows), dimensions)` vectors as the model makes them, or the
        InternalError that llama.cpp's failure is; blocks until one is done. To be called once a batch.
        """
        result = self._results.get()
        self._pending -= 1
        return result

    def close(self) -> None:
        """Blocks until what was begun is done."""
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        for lane in self._lanes:
            lane.close()

    def _work(self, lane: _Lane) -> None:
        """One lane's thread, which alone uses its context from now on."""
        while job := self._jobs.get():
            number, windows, n_threads = job
            try:
                self._results.put((number, lane.embed(windows, n_threads)))
            except Exception as error:  # noqa: BLE001 — the engine waits for a result
                self._results.put((number, _foreseen(error)))


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

    def embed(self, windows: Sequence[Sequence[int]], n_threads: int) -> NDArray[np.float32]:
        """`(len(windows), dimensions)` vectors; blocks for the whole batch. Raises InternalError."""
        lib.llama_set_n_threads(self._pointer, n_threads, n_threads)
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


def _foreseen(error: Exception) -> MyllmError:
    return (
        error if isinstance(error, MyllmError) else InternalError(f"embed: {type(error).__name__}: {error}")
    )
