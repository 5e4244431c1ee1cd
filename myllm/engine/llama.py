"""llama.cpp's model, context, batch and samplers as small Python objects over the low-level bindings.

The only importer of llama_cpp. Knows nothing of requests, scheduling, text streams or processes.
Foreign failures become MyllmError here. What would abort inside llama.cpp (engine-notes §4: bad ids,
batches over the limit) is refused here first, with ValueError: a bug of the caller.

Threads: one thread owns a Context and its samplers. `Tokenizer` may be used from any thread.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine.kv_cache import Copy, Remove
from myllm.engine.sampling import Step
from myllm.errors import BadDataError, UnavailableError


def _import_bindings() -> Any:
    """`llama_cpp.llama_cpp` without the package's `__init__`, which imports the high-level class and all
    that this needs (jinja2, diskcache, …): 0.04 s instead of 0.2 s, in every cold command.
    """
    if "llama_cpp" not in sys.modules and (spec := find_spec("llama_cpp")) is not None:
        package = ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as bindings

    return bindings


lib: Final = _import_bindings()

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
WARN: Final = 3
"""`GGML_LOG_LEVEL_WARN`; lower levels are chatter."""
CONTINUED: Final = 5
"""`GGML_LOG_LEVEL_CONT`: goes on with the line before."""
SPECIAL_ATTRS: Final = 1 << 3 | 1 << 0
"""`LLAMA_TOKEN_ATTR_CONTROL` and `_UNKNOWN`: read by llama_tokenize only where special tokens are asked for."""
DRY_BREAKERS: Final = (b"\n", b":", b'"', b"*")
"""Where DRY's repeated runs end: llama.cpp's default sequence breakers."""


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _data: Any) -> None:
    # Called from inside llama.cpp, also in the middle of a decode: never raises, writes only what matters.
    if WARN <= level < CONTINUED:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()


def start() -> None:
    """Readies llama.cpp for this process: its log goes to stderr from warnings on."""
    lib.llama_log_set(_log, None)
    lib.llama_backend_init()


class Tokenizer:
    """A model's vocabulary: text ⇄ token ids. Thread-safe."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self._pieces: dict[int, bytes] = {}
        self.n_vocab: int = lib.llama_vocab_n_tokens(vocab)
        self.add_bos = bool(lib.llama_vocab_get_add_bos(vocab))
        self.bos = self._optional(lib.llama_vocab_bos(vocab))
        self.eos = self._optional(lib.llama_vocab_eos(vocab))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`; with `special`, the texts of control tokens become these tokens.

        Source: llama_tokenize. Neither BOS nor EOS is added.
        """
        data = text.encode("utf-8", "replace")
        capacity = len(data) // 2 + 16
        for _ in range(2):
            tokens = (ctypes.c_int32 * capacity)()
            count = lib.llama_tokenize(self._vocab, data, len(data), tokens, capacity, False, special)
            if count >= 0:
                return tokens[:count]
            capacity = -count
        raise BadDataError("prompt: llama.cpp could not tokenise it")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """The bytes of one token, perhaps part of a character; empty for control tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token, special=False)
        return piece

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation: EOS, EOT or whatever else the vocabulary marks as such."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def end_tokens(self) -> list[int]:
        """Every token for which `is_end` holds."""
        return [token for token in range(self.n_vocab) if self.is_end(token)]

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts of all tokens that only `encode(…, special=True)` makes."""
        attributes = map(lib.llama_vocab_get_attr, repeat(self._vocab), range(self.n_vocab))
        control = (token for token, attribute in enumerate(attributes) if attribute & SPECIAL_ATTRS)
        texts = (self._read_piece(token, special=True).decode("utf-8", "replace") for token in control)
        return [text for text in texts if text]

    @cached_property
    def max_piece_bytes(self) -> int:
        """Bytes of the longest token: a text has at least its bytes divided by this many tokens."""
        texts = map(lib.llama_vocab_get_text, repeat(self._vocab), range(self.n_vocab))
        return max(len(text or b"") for text in texts)

    @property
    def bos_text(self) -> str:
        return self._text(self.bos)

    @property
    def eos_text(self) -> str:
        return self._text(self.eos)

    @cached_property
    def suppressed(self) -> list[int]:
        """Tokens the model file asks never to sample."""
        count = ctypes.c_int32(0)
        tokens = lib.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return list(tokens[: count.value]) if count.value else []

    def _text(self, token: int | None) -> str:
        return "" if token is None else self._read_piece(token, special=True).decode("utf-8", "replace")

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"no token {token}")
        size = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            length = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length
        return b""

    @staticmethod
    def _optional(token: int) -> int | None:
        return token if token >= 0 else None


class Model:
    """Weights and vocabulary of one GGUF, mapped into memory."""

    def __init__(self, path: Path, *, gpu_layers: int, progress: Callable[[float], None]) -> None:
        """Blocks while loading; `progress` gets 0 to 1. Raises BadDataError if llama.cpp refuses the file."""

        @lib.llama_progress_callback  # type: ignore[untyped-decorator]
        def report(fraction: float, _data: Any) -> bool:
            progress(fraction)
            return True

        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.progress_callback = report
        self._model = lib.llama_model_load_from_file(bytes(path), params)
        if not self._model:
            raise BadDataError(f"{path}: llama.cpp cannot load it; check it with `myllm models verify`")
        self.tokenizer = Tokenizer(lib.llama_model_get_vocab(self._model))
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)
        self.has_encoder = bool(lib.llama_model_has_encoder(self._model))
        self.has_decoder = bool(lib.llama_model_has_decoder(self._model))
        self.kv_values_per_token = 2 * self._kv_width() * lib.llama_model_n_layer(self._model)
        """Numbers (keys and values, all layers) that a token keeps in the cache, to estimate memory."""
        self.is_recurrent = bool(
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )

    def _kv_width(self) -> int:
        heads = max(lib.llama_model_n_head(self._model), 1)
        return int(lib.llama_model_n_embd(self._model) // heads * lib.llama_model_n_head_kv(self._model))

    def close(self) -> None:
        """Frees the weights; every Context of the model must be closed before."""
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


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
        self._context = lib.llama_init_from_model(model._model, params)
        if not self._context:
            raise UnavailableError(
                f"context: llama.cpp cannot make one of {n_ctx:,} tokens; try a smaller --context"
            )
        self.n_ctx: int = lib.llama_n_ctx(self._context)
        self.n_batch: int = lib.llama_n_batch(self._context)
        self._n_vocab = model.tokenizer.n_vocab
        self._memory = lib.llama_get_memory(self._context)

    def decode(self, batch: Batch) -> int:
        """llama_decode: 0 is success, 1 no cells, below 0 an error. Blocks for the whole step."""
        return int(lib.llama_decode(self._context, batch.struct))

    def logits(self, n_rows: int) -> NDArray[np.float32]:
        """`(n_rows, n_vocab)` logits of the batch's flagged tokens in order; valid until the next decode."""
        pointer = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self._n_vocab))

    def apply(self, operation: Remove | Copy) -> None:
        """Brings the KV cache in line with the scheduler's books."""
        if isinstance(operation, Remove):
            lib.llama_memory_seq_rm(self._memory, operation.slot, operation.start, -1)
        else:
            lib.llama_memory_seq_cp(self._memory, operation.source, operation.target, 0, operation.length)

    def read_state(self, slot: int) -> NDArray[np.uint8]:
        """The keys and values of one sequence, as bytes that `write_state` understands."""
        size = lib.llama_state_seq_get_size_ext(self._context, slot, 0)
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = lib.llama_state_seq_get_data_ext(self._context, pointer, size, slot, 0)
        return state[:written]

    def write_state(self, slot: int, state: NDArray[np.uint8]) -> bool:
        """Puts a sequence's keys and values back; False where llama.cpp does not take them."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(lib.llama_state_seq_set_data_ext(self._context, pointer, len(state), slot, 0))

    def close(self) -> None:
        if self._context:
            lib.llama_free(self._context)
            self._context = None


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


class Sampler:
    """A chain of llama.cpp samplers with its own state (seed, penalties)."""

    def __init__(self, steps: Sequence[Step], model: Model) -> None:
        params = lib.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = lib.llama_sampler_chain_init(params)
        for step in steps:
            sampler = self._make(step, model)
            if not sampler:
                raise BadDataError(f"sampling: llama.cpp does not take {step.name} {step.arguments}")
            lib.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, index: int) -> int:
        """The next token by the logits of batch index `index`; the chain remembers it."""
        return int(lib.llama_sampler_sample(self._chain, context._context, index))

    def accept(self, tokens: Sequence[int]) -> None:
        """Tells the penalties about tokens that were not sampled here (the prompt's end)."""
        for token in tokens:
            lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None

    @staticmethod
    def _make(step: Step, model: Model) -> Any:
        make = getattr(lib, f"llama_sampler_init_{step.name}")
        if step.name == "logit_bias":
            n_vocab, biases = step.arguments
            array = (lib.llama_logit_bias * len(biases))(*biases.items())
            return make(n_vocab, len(biases), array)
        if step.name == "dry":
            breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
            return make(model.tokenizer._vocab, *step.arguments, breakers, len(DRY_BREAKERS))
        return make(*step.arguments)
