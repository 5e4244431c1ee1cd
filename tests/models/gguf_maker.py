"""Writes GGUF files of a few KB, well-formed or broken in any one place, for tests of anything.

`make_gguf(path)` gives a tiny but complete llama; each argument replaces one part of it. `Raw` and
`Tensor` say exactly which bytes to write where that part is to be wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
STRING, ARRAY = 8, 9
F32, Q4_0 = 0, 2

VOCABULARY = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz "]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

METADATA: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 2,
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.scores": [0.0] * len(VOCABULARY),
    "tokenizer.ggml.token_type": [1] * len(VOCABULARY),
    "tokenizer.chat_template": TEMPLATE,
}


@dataclass(frozen=True)
class Typed:
    """A number of a type that Python's own does not name: `Typed("uint64", 5)`."""

    kind: str
    value: float | Sequence[float]


@dataclass(frozen=True)
class Raw:
    """A value's type number and bytes as they are to stand in the file."""

    kind: int
    data: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor's record; `offset` None puts it after the one before, as it should be."""

    name: str | bytes = "weight"
    shape: tuple[int, ...] = (32, 4)
    kind: int = F32
    offset: int | None = None
    size: int = 512
    n_dims: int | None = None


TENSORS = (
    Tensor("token_embd.weight", (64, 4), F32, size=1024),
    Tensor("output.weight", (64, 4), Q4_0, size=144),
)


def make_gguf(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    pairs: Sequence[tuple[str | bytes, Any]] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
    data: bytes | None = None,
) -> Path:
    """Writes the file and returns `path`.

    `metadata` is laid over `METADATA` (None removes a key); `pairs` replaces all of it, duplicates
    and all. `n_tensors`, `n_pairs` are what the header claims; `data` replaces the tensors' bytes.
    """
    if pairs is None:
        pairs = [(k, v) for k, v in {**METADATA, **(metadata or {})}.items() if v is not None]
    records, weights = _tensors(tensors, alignment)
    claimed = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    header = magic + struct.pack("<IQQ", version, *claimed)
    header += b"".join(_string(key) + _value(value) for key, value in pairs) + records
    header += bytes(-len(header) % alignment)
    path.write_bytes(header + (weights if data is None else data))
    return path


def make_parts(folder: Path, count: int = 3) -> list[Path]:
    """Writes a split model and returns its files in order."""
    return [
        make_gguf(
            folder / f"big-{n + 1:05}-of-{count:05}.gguf",
            {"split.no": Typed("uint16", n), "split.count": Typed("uint16", count)},
            [Tensor(f"blk.{n}.weight", (32, 4), size=512)],
        )
        for n in range(count)
    ]


def header_size(path: Path, data_size: int = 1024 + 144) -> int:
    """Where the tensors' bytes start in a file that `make_gguf` wrote with its own tensors."""
    return path.stat().st_size - data_size


def _tensors(tensors: Sequence[Tensor], alignment: int) -> tuple[bytes, bytes]:
    records, weights = [], bytearray()
    for tensor in tensors:
        weights += bytes(-len(weights) % alignment)
        n_dims = len(tensor.shape) if tensor.n_dims is None else tensor.n_dims
        offset = len(weights) if tensor.offset is None else tensor.offset
        dimensions = struct.pack(f"<{len(tensor.shape)}q", *tensor.shape)
        records.append(_string(tensor.name) + struct.pack("<I", n_dims) + dimensions)
        records.append(struct.pack("<IQ", tensor.kind, offset))
        weights += bytes(tensor.size)
    return b"".join(records), bytes(weights)


def _string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    match value:
        case Raw(kind, data):
            return struct.pack("<I", kind) + data
        case Typed(kind, [*values]):
            number, code = KINDS[kind]
            return struct.pack(f"<IIQ{len(values)}{code}", ARRAY, number, len(values), *values)
        case Typed(kind, number):
            return struct.pack(f"<I{KINDS[kind][1]}", KINDS[kind][0], number)
        case bool():
            return _value(Typed("bool", value))
        case int():
            return _value(Typed("uint32", value))
        case float():
            return _value(Typed("float32", value))
        case str() | bytes():
            return struct.pack("<I", STRING) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
        case [bool(), *_]:
            return _value(Typed("bool", value))
        case [float(), *_]:
            return _value(Typed("float32", value))
        case _:
            return _value(Typed("int32", value))
