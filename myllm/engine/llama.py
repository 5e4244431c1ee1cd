"""llama.cpp's model and tokenizer as small Python objects over the low-level bindings.

The only importer of llama_cpp; context.py and samplers.py go on from here, apart, so that a model can
load while what they need (numpy) is still being imported. Knows nothing of requests, scheduling, text
streams or processes. Foreign failures become MyllmError here.

`Tokenizer` may be used from any thread.
"""

from __future__ import annotations

import ctypes
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from myllm.errors import BadDataError


def _import_bindings() -> Any:
    """`llama_cpp.llama_cpp` without the package's `__init__`, which imports the high-level class and all
    that this needs (jinja2, diskcache, …): 0.04 s instead of 0.2 s, in every cold command.

    The stand-in for the package is gone afterwards, so that others may still import the real one.
    """
    spec = find_spec("llama_cpp")
    if "llama_cpp" in sys.modules or spec is None:
        return import_module("llama_cpp.llama_cpp")
    sys.modules["llama_cpp"] = ModuleType("llama_cpp")
    sys.modules["llama_cpp"].__path__ = list(spec.submodule_search_locations or [])
    try:
        return import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]


lib: Final = _import_bindings()

WARN: Final = 3
"""`GGML_LOG_LEVEL_WARN`; lower levels are chatter."""
CONTINUED: Final = 5
"""`GGML_LOG_LEVEL_CONT`: goes on with the line before."""
SPECIAL_ATTRS: Final = 1 << 3 | 1 << 0
"""`LLAMA_TOKEN_ATTR_CONTROL` and `_UNKNOWN`: what llama_tokenize reads only with `parse_special`."""
REASON: Final = "error loading model: "
"""What comes before llama.cpp's reason in a line of its log (llama_model_load)."""
SLOW_TO_LOAD: Final = 1 << 30
"""Bytes of a file from which its loading is worth reports: each waits for the GIL."""


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _data: Any) -> None:
    # Called from inside llama.cpp, also in the middle of a decode: never raises, writes only what matters.
    if WARN <= level < CONTINUED:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()


_SILENT = ctypes.cast(ctypes.CDLL(None).abs, lib.llama_log_callback)
"""A C function that does nothing with a log line. llama.cpp logs thousands while it loads, and a Python
callback for each would wait for the GIL, which is busy with imports just then."""


def start() -> None:
    """Readies llama.cpp for this process. It is silent until `explain`; an abort still speaks on stderr."""
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()


def build() -> str:
    """Which llama.cpp this is: it changes whenever the library is installed or compiled anew."""
    status = Path(lib._lib._name).stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def explain() -> None:
    """From now on llama.cpp's warnings and errors go to stderr: something failed and is tried again."""
    lib.llama_log_set(_log, None)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Has llama.cpp's warnings and errors in a list, too, while in the block; from then on as `explain`."""
    words: list[str] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(level: int, text: bytes, data: Any) -> None:
        if WARN <= level < CONTINUED:
            words.append(text.decode("utf-8", "replace"))
        _log(level, text, data)

    lib.llama_log_set(hear, None)
    try:
        yield words
    finally:
        explain()


def _why(words: list[str]) -> str:
    """What llama.cpp says of a file that it does not load, where it says so."""
    found = [word.strip().rpartition(REASON)[2] for word in words if REASON in word]
    return f": {found[-1]}" if found else ""


class Tokenizer:
    """A model's vocabulary: text ⇄ token ids. Thread-safe."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self._pieces: dict[int, bytes] = {}
        self.n_vocab: int = lib.llama_vocab_n_tokens(vocab)
        self.add_bos = bool(lib.llama_vocab_get_add_bos(vocab))
        self._is_wordpiece = lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_WPM
        self.bos = self._optional(lib.llama_vocab_bos(vocab))
        self.eos = self._optional(lib.llama_vocab_eos(vocab))

    @cached_property
    def closing(self) -> int | None:
        """The token that a text to embed ends with, where the vocabulary asks for one."""
        if lib.llama_vocab_get_add_sep(self._vocab):
            return self._optional(lib.llama_vocab_sep(self._vocab))
        return self.eos if lib.llama_vocab_get_add_eos(self._vocab) else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`; with `special`, the texts of control tokens become these tokens.

        Source: llama_tokenize. Neither BOS nor EOS is added.
        """
        if self._is_wordpiece:
            # llama.cpp takes accents off by a table, in which Korean syllables, composed by rule, are not.
            text = unicodedata.normalize("NFD", text)
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
        if path.stat().st_size > SLOW_TO_LOAD:
            params.progress_callback = report
        self.pointer = lib.llama_model_load_from_file(bytes(path), params)
        if not self.pointer:
            with heard() as words:
                self.pointer = lib.llama_model_load_from_file(bytes(path), params)
        if not self.pointer:
            raise BadDataError(
                f"{path}: llama.cpp cannot load it{_why(words)}; check it with `myllm models verify`"
            )
        self.tokenizer = Tokenizer(lib.llama_model_get_vocab(self.pointer))
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self.pointer)
        self.is_encoder = self._said("attention.causal") == "false"
        """Whether every token sees all others (BERT): such a model makes vectors and no text."""
        self.pooling: int | None = int(said) if (said := self._said("pooling_type")).isdigit() else None
        """llama.cpp's number of how it pools (`enum llama_pooling_type`), where its file says so."""
        self.normalizes = self._value("myllm.embedding.normalize") != "false"
        """Whether its vectors are to have norm 1: our own key, written where a checkpoint was converted."""
        self.has_encoder = bool(lib.llama_model_has_encoder(self.pointer))
        self.has_decoder = bool(lib.llama_model_has_decoder(self.pointer))
        self.kv_values_per_token = 2 * self._kv_width() * lib.llama_model_n_layer(self.pointer)
        """Numbers (keys and values, all layers) that a token keeps in the cache, to estimate memory."""
        self.is_recurrent = bool(
            lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer)
        )

    def _said(self, key: str) -> str:
        """A value of the file's metadata below its architecture's name; empty where there is none."""
        return self._value(f"{self._value('general.architecture')}.{key}")

    def _value(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        found = lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer)) >= 0
        return buffer.value.decode("utf-8", "replace") if found else ""

    def _kv_width(self) -> int:
        heads = max(lib.llama_model_n_head(self.pointer), 1)
        return int(lib.llama_model_n_embd(self.pointer) // heads * lib.llama_model_n_head_kv(self.pointer))

    def close(self) -> None:
        """Frees the weights; every Context of the model must be closed before."""
        if self.pointer:
            lib.llama_model_free(self.pointer)
            self.pointer = None
