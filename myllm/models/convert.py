"""A BERT-family sentence-transformers checkpoint → a GGUF of 16-bit weights that llama.cpp runs.

Owns the weights: which tensors there must be, their types in the GGUF, and writing it; the same
checkpoint gives the same bytes of a type. Needs gguf, safetensors and numpy, imported late, and no torch.
Follows BertModel of llama.cpp's convert_hf_to_gguf.py. Must not know where a checkpoint comes from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from myllm import hardware
from myllm.errors import BadDataError
from myllm.models.bert_checkpoint import WEIGHTS, Checkpoint, Shape, read_checkpoint
from myllm.models.bert_vocabulary import SPECIAL, phantom_space
from myllm.models.store import create_private, write_errors

UNUSED: Final = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Tensors that an embedding has no use for."""
LAYER: Final = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
Half = Literal["F16", "BF16"]
DTYPES: Final = ("F32", "F16")
"""safetensors' names of what is read."""


class Tensor(NamedTuple):
    """A tensor's name in the GGUF, its shape, and whether it stays float32 there."""

    name: str
    shape: tuple[int, ...]
    is_wide: bool


def convert(folder: Path, target: Path, half: Half | None = None) -> None:
    """Writes the GGUF of the checkpoint in `folder` to `target`, which must not exist; blocks.

    `half` is the type of its matrices, by default what this processor is faster with: one that multiplies
    BF16 does so in two thirds of the time. Both are near enough to float32 for vectors (MiniLM-L6 against
    sentence-transformers, 200 texts: cosines from 0.999996 with F16, from 0.99993 with BF16).

    Holds one tensor at a time in memory. On an error `target` may be there, unfinished. Raises
    BadDataError naming what is missing, broken or not known, IOFailureError, CannotCreateError.
    """
    half = half or ("BF16" if hardware.multiplies_bf16() else "F16")
    checkpoint = read_checkpoint(folder)
    with _weights(folder / WEIGHTS) as file:
        sources = _check(file, checkpoint.shape)
        with write_errors("model file"):
            os.close(create_private(target))
        _write(checkpoint, target, half, file, sources)


def _write(checkpoint: Checkpoint, target: Path, half: Half, file: Any, sources: dict[str, Tensor]) -> None:
    """Metadata, then the tensors in the order of `sources` (names in the checkpoint → what they become)."""
    import gguf
    import numpy as np

    types = gguf.GGMLQuantizationType
    with write_errors("model file"), closing(gguf.GGUFWriter(str(target), "bert")) as writer:
        _add_metadata(writer, checkpoint)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{half}"])
        for tensor in sources.values():
            kind = types.F32 if tensor.is_wide else types[half]
            size = int(np.prod(tensor.shape)) * (4 if tensor.is_wide else 2)
            # float32 stands for whatever it is: with a type given, only its shape and size are used.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in sources.items():
            writer.write_tensor_data(_values(file, name, "F32" if tensor.is_wide else half))


def _add_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    shape = checkpoint.shape
    writer.add_name(checkpoint.name)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(shape.eps)
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", checkpoint.pooling)
    writer.add_uint32("myllm.embedding.window", checkpoint.window)
    writer.add_bool("myllm.embedding.normalize", checkpoint.normalizes)
    for purpose, prefix in checkpoint.prefixes.items():
        writer.add_string(f"myllm.embedding.prefix.{purpose}", prefix)
    writer.add_tokenizer_model("bert")
    writer.add_token_list([phantom_space(token) for token in checkpoint.tokens])
    writer.add_token_types([_token_type(token) for token in checkpoint.tokens])
    writer.add_token_type_count(shape.n_types)
    for token, key in SPECIAL.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", checkpoint.tokens.index(token))


def _token_type(token: str) -> int:
    import gguf

    return int(gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL)


# ── weights ─────────────────────────────────────────────────────────────────────────────────


def expected_tensors(shape: Shape) -> dict[str, Tensor]:
    """Each tensor's name in the checkpoint → what it becomes, in the GGUF's order."""
    n, wide = shape.n_embd, shape.n_ff
    found = {
        "embeddings.word_embeddings.weight": Tensor("token_embd.weight", (shape.n_vocab, n), False),
        "embeddings.position_embeddings.weight": Tensor("position_embd.weight", (shape.n_ctx, n), True),
        "embeddings.token_type_embeddings.weight": Tensor("token_types.weight", (shape.n_types, n), True),
        "embeddings.LayerNorm.weight": Tensor("token_embd_norm.weight", (n,), True),
        "embeddings.LayerNorm.bias": Tensor("token_embd_norm.bias", (n,), True),
    }
    sizes = {"ffn_up": (wide, n), "ffn_down": (n, wide)}
    for layer in range(shape.n_layer):
        for theirs, ours in LAYER.items():
            rows, columns = sizes.get(ours, (n, n))
            norm = ours.endswith("norm")
            source, name = f"encoder.layer.{layer}.{theirs}", f"blk.{layer}.{ours}"
            found[f"{source}.weight"] = Tensor(f"{name}.weight", (rows,) if norm else (rows, columns), norm)
            found[f"{source}.bias"] = Tensor(f"{name}.bias", (rows,), True)
    return found


@contextmanager
def _weights(path: Path) -> Iterator[Any]:
    """The open safetensors file; what the library says while it is in use becomes a BadDataError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadDataError(f"checkpoint: {WEIGHTS} is broken: {error!s:.200}") from error


def _check(file: Any, shape: Shape) -> dict[str, Tensor]:
    """The tensors' full names in the file → what they become. Nothing of the data is read yet."""
    expected = expected_tensors(shape)
    keys = list(file.keys())
    names = {key.removeprefix("bert."): key for key in keys}
    if len(names) < len(keys):
        raise BadDataError(
            "checkpoint: the same tensors are there with and without 'bert.' before their names"
        )
    if missing := [name for name in expected if name not in names]:
        raise BadDataError(f"checkpoint: {len(missing)} tensors are missing, {missing[0]!r} first")
    if extra := sorted(set(names) - set(expected) - set(UNUSED)):
        raise BadDataError(f"checkpoint: {len(extra)} tensors are not known, {extra[0]!r:.120} first")
    for name, tensor in expected.items():
        piece = file.get_slice(names[name])
        if (size := tuple(piece.get_shape())) != tensor.shape or piece.get_dtype() not in DTYPES:
            raise BadDataError(
                f"checkpoint: {name} is {piece.get_dtype()} of {size}, expected {tensor.shape} "
                f"of {' or '.join(DTYPES)}"
            )
    return {names[name]: tensor for name, tensor in expected.items()}


def _values(file: Any, name: str, kind: str) -> Any:
    """A tensor's numbers as they are stored in the GGUF, little-endian as both formats are."""
    import gguf
    import numpy as np

    values = stored = file.get_tensor(name).astype(np.float32)
    if kind == "F16":
        with np.errstate(over="ignore"):
            values = stored = values.astype(np.float16)
    elif kind == "BF16":
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.BF16)
    if not np.isfinite(values).all():
        raise BadDataError(f"checkpoint: {name} has numbers that are not finite, or too large for {kind}")
    return stored
