"""llama.cpp behind the `Runner` interface: a model, its context, a batch, and a sampler for each request.

Must not know the lives of requests, scheduling, events or clocks. How llama.cpp's memory is handled is
in context.py, its samplers in samplers.py, its vectors in llama_embedder.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine import llama
from myllm.engine.context import Batch, Context
from myllm.engine.device import cpu
from myllm.engine.kv_cache import Copy, Remove
from myllm.engine.kv_layout import Layout
from myllm.engine.llama import Model, Tokenizer
from myllm.engine.llama_embedder import LONGEST_WINDOW, LlamaEmbedder
from myllm.engine.logprobs import log_probabilities
from myllm.engine.runner import Sampled
from myllm.engine.samplers import Greedy, Sampler, make_sampler
from myllm.engine.sequence import Chunk
from myllm.engine.sizing import choose_sizing
from myllm.errors import BadDataError
from myllm.protocol import Message
from myllm.requests import GenRequest, LoadOptions

DEFAULT_KV_TYPE: Final = "f16"


class LlamaRunner:
    """Implements Runner on a loaded model, which is its own from now on."""

    def __init__(self, model: Model, options: LoadOptions, recommended: Mapping[str, float]) -> None:
        """`recommended` are the sampling parameters that the model's file asks for.

        Raises BadDataError for a model that translates (T5).
        """
        if model.has_encoder or not model.has_decoder:
            raise BadDataError("model: it has an encoder apart, which is not supported; use another model")
        self._model, self._options, self._recommended = model, options, recommended
        self.device = cpu()
        self.window, self._n_threads, self.layout = choose_sizing(options, model, self.device)
        self.embed_window = min(model.n_ctx_train, LONGEST_WINDOW)
        self.writes, self.normalizes = not model.is_encoder, model.normalizes
        self._batch = Batch(self.device.step_tokens)
        self._context: Context | None = None
        self._samplers: dict[int, Sampler | Greedy] = {}
        self._logits = np.empty((0, 0), np.float32)
        self._due: list[tuple[int, int]] = []
        """Of each row to sample, its request and the index of its last token in the batch."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def facts(self) -> Message:
        has_gpu = bool(llama.lib.llama_supports_gpu_offload())
        asked = -1 if self._options.gpu_layers is None else self._options.gpu_layers
        return {
            "threads": self._n_threads,
            "device": "gpu" if has_gpu else "cpu",
            "gpu_layers": asked if has_gpu else 0,
        }

    # ── a request's sampler ─────────────────────────────────────────────────────────────────

    def begin(self, request_id: int, request: GenRequest, prompt: list[int], seed: int) -> None:
        self._samplers[request_id] = make_sampler(request, prompt, seed, self._recommended, self._model)

    def end(self, request_id: int) -> None:
        if sampler := self._samplers.pop(request_id, None):
            sampler.close()

    # ── the KV cache ────────────────────────────────────────────────────────────────────────

    def grow(self, layout: Layout, n_cells: int, kept: Sequence[int]) -> list[int]:
        states = [(slot, self._context.read_state(slot)) for slot in kept] if self._context else []
        self.drop()
        self._context = context = Context(
            self._model,
            n_ctx=n_cells,
            n_seq_max=layout.n_slots + (not layout.isolates),  # one to read and write through
            n_batch=self.device.step_tokens,
            unified=not layout.isolates,
            n_threads=self._n_threads,
            kv_type=self._options.kv_type or DEFAULT_KV_TYPE,
            flash_attn=self._options.flash_attn != "off",
        )
        return [slot for slot, state in states if not context.write_state(slot, state)]

    def drop(self) -> None:
        if self._context:
            self._context.close()
            self._context = None

    def apply(self, operation: Remove | Copy) -> None:
        if self._context:  # else there is nothing that could be removed or copied
            self._context.apply(operation)

    @property
    def kv_format(self) -> str | None:
        """A stream's cells cannot be shared in part, and a recurrent model's state cannot be cut."""
        if self.layout.isolates:
            return None
        return f"{llama.build()} {self._options.kv_type or DEFAULT_KV_TYPE}"

    def read(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        context, spare = self._opened(), self.layout.n_slots
        context.copy(slot, spare, start, end)
        state = context.read_state(spare)
        context.apply(Remove(spare, 0))
        return state

    def write(self, slot: int, start: int, end: int, state: NDArray[np.uint8]) -> bool:
        context, spare = self._opened(), self.layout.n_slots
        taken = context.write_state(spare, state) and context.holds(spare, start, end)
        if taken:
            context.copy(spare, slot, start, end)
        context.apply(Remove(spare, 0))
        return taken

    # ── a batch ─────────────────────────────────────────────────────────────────────────────

    def fill(self, chunks: Sequence[Chunk]) -> None:
        self._batch.clear()
        self._due = []
        for sequence, start, end, sample in chunks:
            if sequence.slot is None:
                raise ValueError("a planned sequence has a slot")
            last = self._batch.add(sequence.tokens[start:end], start, sequence.slot.id, output=sample)
            if sample:
                self._due.append((sequence.id, last))

    def decode(self) -> int:
        context = self._opened()
        if code := context.decode(self._batch):
            llama.explain()
            n_tokens = self._batch.struct.n_tokens
            sys.stderr.write(f"llama_decode: {code} with {n_tokens} tokens, {len(self._due)} to sample\n")
        elif self._due:
            self._logits = context.logits(len(self._due))
        return code

    def sample(self, row: int, top: int | None) -> Sampled:
        request_id, index = self._due[row]
        logits = self._logits[row]
        token = self._samplers[request_id].sample(self._opened(), index, logits)
        return Sampled(token) if top is None else Sampled(token, *log_probabilities(logits, token, top))

    def open_embedder(self, window: int) -> LlamaEmbedder:
        return LlamaEmbedder(self._model, window, self._n_threads)

    def close(self) -> None:
        self.drop()
        self._model.close()

    def _opened(self) -> Context:
        if self._context is None:
            raise ValueError("a batch needs a KV cache")
        return self._context
