"""What a model's metadata means: the header that `models show`, loading and sizing use.

Owns the meaning of keys (llama.cpp's src/llama-arch.cpp, gguf-py's constants.py) and the arithmetic
of memory. Does no I/O: `gguf.py` reads files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from myllm.errors import BadDataError, UsageError
from myllm.models.gguf_file import MAX_TEXT, GgufFile, Skipped, Value
from myllm.models.gguf_format import FILE_TYPES, TENSOR_TYPES
from myllm.protocol import KV_TYPES, PURPOSES, SAMPLING

POOLING_TYPES: Final = ("none", "mean", "cls", "last", "rank")
"""`{arch}.pooling_type` → name: enum llama_pooling_type in llama.h."""

SAMPLING_KEYS: Final = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
"""`general.sampling.*` → the wire's names (`protocol.SAMPLING`)."""

TEMPLATE: Final = "tokenizer.chat_template"
MAX_COUNT: Final = 2**31 - 1
MAX_LAYERS: Final = 4096
"""llama.cpp's own limit is 512 (LLAMA_MAX_LAYERS)."""
MAX_PARTS: Final = 1024

CONTEXT_STEP: Final = 256
"""llama.cpp pads the context window to this many tokens (llama-context.cpp)."""
PROCESS_BYTES: Final = 64 * 2**20
"""Allowance for a worker without its model: Python, llama.cpp, tokenizer, batch buffers (measured: 50)."""
UBATCH: Final = 512
"""Tokens computed at once, for which llama.cpp reserves its compute buffer."""
LOGIT_ROWS: Final = 64
"""Rows of logits kept."""
BLOCKS: Final = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}
"""ggml type name → elements and bytes of a block."""


@dataclass(frozen=True, slots=True)
class Header:
    """What one file, or all parts of a model together, say; what they don't say is None.

    Sizes in bytes, lengths in tokens or elements, `parameters` in weights. `paths` are the files, the
    first first. `metadata` holds every scalar and every short numeric array of the first file.
    `templates` are the named ones beside `template`; `sampling` has the wire's names. `kv_widths`
    are the elements of key and value that a token has in each layer's cache.
    """

    paths: tuple[Path, ...]
    size_bytes: int
    metadata: Mapping[str, Value]
    n_tensors: int
    parameters: int
    quantization: str
    architecture: str
    name: str | None
    kind: str
    context_length: int | None
    embedding_length: int | None
    feed_forward_length: int | None
    vocab_size: int | None
    pooling_type: str | None
    causal: bool
    template: str | None
    templates: Mapping[str, str]
    sampling: Mapping[str, float]
    split_no: int
    split_count: int
    kv_widths: tuple[tuple[int, int], ...]

    @property
    def path(self) -> Path:
        """The file to load: the only one, or the first part."""
        return self.paths[0]

    @property
    def is_language_model(self) -> bool:
        """Whether it can be loaded by itself: not an adapter, an image projector or a bare vocabulary."""
        return self.kind == "model" and self.architecture != "clip" and self.n_tensors > 0

    @property
    def is_embedding_model(self) -> bool:
        """Whether it was made to embed and not to write."""
        return not self.causal or self.pooling_type not in (None, "none")

    @property
    def embedding_window(self) -> int | None:
        """Tokens of a text that the model's maker says one vector should stand for; our own key."""
        window = self.metadata.get("myllm.embedding.window")
        return window if type(window) is int and window > 0 else None

    @property
    def embedding_prefixes(self) -> dict[str, str]:
        """What the model wants in front of a `query` or a `document`, where it says so; our own keys."""
        prefixes = {name: self.metadata.get(f"myllm.embedding.prefix.{name}") for name in PURPOSES}
        return {name: prefix for name, prefix in prefixes.items() if isinstance(prefix, str)}

    def kv_bytes_per_token(self, kv_type: str = "f16") -> int:
        """Bytes of KV cache that one token takes: the sum over layers of keys and values.

        An upper bound where some layers are recurrent or keep a sliding window only. 0 for an
        encoder, which has no cache.
        """
        return sum(_row_bytes(keys, kv_type) + _row_bytes(values, kv_type) for keys, values in self.kv_widths)

    def memory_estimate(self, context: int, kv_type: str = "f16") -> int:
        """Bytes that a load with a window of `context` tokens takes: weights, KV cache, and an allowance.

        The allowance is for the process and, with flash attention, for what one micro-batch needs:
        four activations of the wider of feed-forward layer and embedding (float32), the attention mask
        (float16), and logits. SmolLM2 Q4_1 with 1,024 and 8,192 tokens: 205 and 370 MiB; measured 183, 341.
        """
        cells = -(-context // CONTEXT_STEP) * CONTEXT_STEP
        widest = max(self.feed_forward_length or 0, self.embedding_length or 0)
        compute = UBATCH * (4 * 4 * widest + 2 * cells) + LOGIT_ROWS * 4 * (self.vocab_size or 0)
        return self.size_bytes + cells * self.kv_bytes_per_token(kv_type) + compute + PROCESS_BYTES


# ── from metadata to the header ─────────────────────────────────────────────────────────────


def understand(files: Sequence[GgufFile]) -> Header:
    """The header of a model from its files, the first first. Raises BadDataError for what cannot be."""
    first = files[0]
    architecture = _text(first, "general.architecture")
    if not architecture:
        raise bad_model(first, "general.architecture is missing")
    elements: dict[str, int] = {}
    for type_name, count in (pair for file in files for pair in file.elements.items()):
        elements[type_name] = elements.get(type_name, 0) + count
    templates = [key for key in first.metadata if key.startswith(f"{TEMPLATE}.")]
    split_count = max(1, count_at(first, "split.count") or 1)
    if split_count > MAX_PARTS:
        raise bad_model(first, f"it says that it has {split_count:,} parts")
    return Header(
        paths=tuple(file.path for file in files),
        size_bytes=sum(file.size_bytes for file in files),
        metadata=first.metadata,
        n_tensors=sum(file.n_tensors for file in files),
        parameters=sum(elements.values()),
        quantization=_quantization(first, elements),
        architecture=architecture,
        name=_text(first, "general.name"),
        kind=_text(first, "general.type") or "model",
        context_length=count_at(first, f"{architecture}.context_length"),
        embedding_length=count_at(first, f"{architecture}.embedding_length"),
        feed_forward_length=max(_per_layer(first, f"{architecture}.feed_forward_length"), default=None),
        vocab_size=_vocab_size(first, architecture),
        pooling_type=_pooling_type(first, architecture),
        causal=_is_causal(first, architecture),
        template=_text(first, TEMPLATE),
        templates={key.removeprefix(f"{TEMPLATE}."): _text(first, key) or "" for key in templates},
        sampling=_sampling(first),
        split_no=count_at(first, "split.no") or 0,
        split_count=split_count,
        kv_widths=_kv_widths(first, architecture),
    )


def bad_model(file: GgufFile, why: str) -> BadDataError:
    """The error about a file that is GGUF and still no usable model."""
    return BadDataError(f"{file.path}: not a usable model: {why}; get it again from its source")


def _text(file: GgufFile, key: str) -> str | None:
    value = file.metadata.get(key)
    if value is None or isinstance(value, str):
        return value
    raise bad_model(file, f"{key} is not a text of at most {MAX_TEXT:,} bytes")


def count_at(file: GgufFile, key: str) -> int | None:
    """A key's value where it is a count. Raises BadDataError where it is anything else."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise bad_model(file, f"{key} is not a count: {value!r:.80}")
    return value


def _per_layer(file: GgufFile, key: str) -> tuple[int, ...]:
    """A count, or one for each layer, which llama.cpp takes in either form (get_key_or_arr); () if absent."""
    value = file.metadata.get(key)
    if not isinstance(value, tuple):
        same = count_at(file, key)
        return () if same is None else (same,)
    if not all(isinstance(each, int) and 0 <= each <= MAX_COUNT for each in value):
        raise bad_model(file, f"{key} is not a list of counts")
    return tuple(int(each) for each in value)


def _quantization(file: GgufFile, elements: Mapping[str, int]) -> str:
    """The file's own word, else the type of most weights; "unknown" without either."""
    number = count_at(file, "general.file_type")
    if number is not None and number in FILE_TYPES:
        return FILE_TYPES[number]
    return max(elements, key=lambda name: elements[name], default="unknown")


def _vocab_size(file: GgufFile, architecture: str) -> int | None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Skipped):
        return tokens.length
    return count_at(file, f"{architecture}.vocab_size")


def _pooling_type(file: GgufFile, architecture: str) -> str | None:
    number = count_at(file, f"{architecture}.pooling_type")
    return POOLING_TYPES[number] if number is not None and number < len(POOLING_TYPES) else None


def _is_causal(file: GgufFile, architecture: str) -> bool:
    return file.metadata.get(f"{architecture}.attention.causal", True) is not False


def _sampling(file: GgufFile) -> dict[str, float]:
    """The file's recommendations that a request could carry too; one out of range is left out."""
    found: dict[str, float] = {}
    for key, name in SAMPLING_KEYS.items():
        value, parameter = file.metadata.get(f"general.sampling.{key}"), SAMPLING[name]
        if isinstance(value, int | float) and parameter.low <= value <= parameter.high:
            found[name] = parameter.kind(value)
    return found


def _kv_widths(file: GgufFile, architecture: str) -> tuple[tuple[int, int], ...]:
    """Elements of key and value that a token has in each layer's cache (llama.cpp: n_embd_k_gqa, …).

    Layers without heads (recurrent ones) and the last `shared_kv_layers`, which use others' caches,
    have none; an encoder has no cache; latent attention (MLA) keeps keys only.
    """
    attention = f"{architecture}.attention"
    layers = count_at(file, f"{architecture}.block_count") or 0
    if layers > MAX_LAYERS:
        raise bad_model(file, f"it has {layers:,} layers")
    heads = _per_layer(file, f"{attention}.head_count") or (0,)
    kv_heads = _per_layer(file, f"{attention}.head_count_kv") or heads
    natural = (count_at(file, f"{architecture}.embedding_length") or 0) // max(1, heads[0])
    key = count_at(file, f"{attention}.key_length") or natural
    value = count_at(file, f"{attention}.value_length") or natural
    if count_at(file, f"{attention}.key_length_mla"):
        value = 0
    if not _is_causal(file, architecture):
        return ()
    owners = max(0, layers - (count_at(file, f"{attention}.shared_kv_layers") or 0))
    widths = tuple(
        (n * key, n * value) for n in (kv_heads if len(kv_heads) > 1 else kv_heads * layers)[:owners]
    )
    if sum(keys + values for keys, values in widths) > MAX_COUNT:
        raise bad_model(file, "its attention heads are impossibly many or large")
    return widths


def _row_bytes(elements: int, kv_type: str) -> int:
    """Bytes of a row in ggml's type, whole blocks. Raises UsageError for an unknown type."""
    if kv_type not in KV_TYPES:
        raise UsageError(f"kv_type: expected one of {', '.join(KV_TYPES)}, not {kv_type!r:.80}")
    block_elements, block_bytes = BLOCKS[kv_type.upper()]
    return -(-elements // block_elements) * block_bytes
