"""A BERT-family sentence-transformers checkpoint → an F16 GGUF that llama.cpp runs.

Owns what of a checkpoint is understood; whatever is not is refused by name, never guessed. Needs
gguf, safetensors and numpy, imported late, and no torch. Follows BertModel of llama.cpp's
convert_hf_to_gguf.py. Must not know where a checkpoint comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from myllm.errors import BadDataError
from myllm.models.store import create_private, read_errors, write_errors

WEIGHTS: Final = "model.safetensors"
FILES: Final = (
    WEIGHTS,
    "config.json",
    "modules.json",
    "tokenizer.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
"""The files of a checkpoint that are read; the last two may be missing."""
OPTIONAL: Final = FILES[-2:]
MAX_JSON: Final = 64 * 1024 * 1024
"""Bytes; the largest are tokenizers of big vocabularies."""
POOLINGS: Final = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2}
"""sentence-transformers' name → `enum llama_pooling_type`."""
MODULES: Final = (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
SPECIAL: Final = {
    "[PAD]": "padding_token_id",
    "[UNK]": "unknown_token_id",
    "[CLS]": "bos_token_id",
    "[SEP]": "seperator_token_id",
    "[MASK]": "mask_token_id",
}
"""The tokens a vocabulary must have → their key below `tokenizer.ggml.` (spelt as llama.cpp does)."""
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


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that a checkpoint's config.json names."""

    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_ctx: int
    n_types: int
    eps: float


def convert(checkpoint: Path, target: Path) -> None:
    """Writes the GGUF of the checkpoint in folder `checkpoint` to `target`, which must not exist; blocks.

    Raises BadDataError naming what is missing, broken or not known, IOFailureError.
    """
    config = _json(checkpoint, "config.json")
    shape = _shape(config)
    tokens = _tokens(checkpoint, shape)
    pooling, normalises = _pooling(checkpoint, shape)
    window = _json(checkpoint, "sentence_bert_config.json", missing={}).get("max_seq_length", shape.n_ctx)
    if type(window) is not int or not 2 < window <= shape.n_ctx:
        raise BadDataError(f"checkpoint: max_seq_length is {window!r:.40}, of at most {shape.n_ctx}")
    prompts = _json(checkpoint, "config_sentence_transformers.json", missing={}).get("prompts") or {}
    if not isinstance(prompts, dict):
        raise BadDataError("checkpoint: prompts is not a JSON object")
    import gguf

    with write_errors("model file"):
        create_file(target)
        writer = gguf.GGUFWriter(str(target), "bert")
        writer.add_name(_name(config))
        writer.add_context_length(shape.n_ctx)
        writer.add_embedding_length(shape.n_embd)
        writer.add_feed_forward_length(shape.n_ff)
        writer.add_block_count(shape.n_layer)
        writer.add_head_count(shape.n_head)
        writer.add_layer_norm_eps(shape.eps)
        writer.add_causal_attention(False)
        writer.add_uint32("bert.pooling_type", pooling)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_uint32("myllm.embedding.window", window)
        writer.add_bool("myllm.embedding.normalize", normalises)
        for purpose, prompt in (("query", prompts.get("query")), ("document", prompts.get("document"))):
            if isinstance(prompt, str) and prompt:
                writer.add_string(f"myllm.embedding.prefix.{purpose}", prompt)
        _add_tokenizer(writer, tokens, shape)
        for name, values in _tensors(checkpoint / WEIGHTS, shape):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def create_file(path: Path) -> None:
    """An empty file that only its owner may read."""
    import os

    os.close(create_private(path))


# ── what the checkpoint says of itself ──────────────────────────────────────────────────────


def _json(checkpoint: Path, name: str, kind: type = dict, missing: Any = None) -> Any:
    """What a file holds, of the JSON type `kind`; `missing` where it may be missing and is."""
    file = checkpoint / name
    if missing is not None and not file.exists():
        return missing
    if not file.is_file():
        raise BadDataError(f"checkpoint: {name} is missing")
    with read_errors(name):
        data = file.read_bytes() if file.stat().st_size <= MAX_JSON else b""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"checkpoint: {name} is not JSON that can be used") from error
    if not isinstance(value, kind):
        raise BadDataError(f"checkpoint: {name} holds {type(value).__name__}, expected {kind.__name__}")
    return value


def _shape(config: Mapping[str, Any]) -> Shape:
    if config.get("model_type") != "bert":
        raise BadDataError(f"checkpoint: model_type {config.get('model_type')!r:.80} is not known; bert is")
    for key, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, known) != known:
            raise BadDataError(f"checkpoint: {key} {config[key]!r:.80} is not known; {known} is")
    sizes = {
        name: config.get(key)
        for name, key in {
            "n_vocab": "vocab_size",
            "n_embd": "hidden_size",
            "n_ff": "intermediate_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_ctx": "max_position_embeddings",
            "n_types": "type_vocab_size",
        }.items()
    }
    if wrong := [n for n, v in sizes.items() if type(v) is not int or not 0 < v < 2**20]:
        raise BadDataError(f"checkpoint: config.json has no sound size for {', '.join(wrong)}")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise BadDataError(f"checkpoint: layer_norm_eps is {eps!r:.40}")
    shape = Shape(**sizes, eps=eps)  # type: ignore[arg-type]
    if shape.n_embd % shape.n_head:
        raise BadDataError(f"checkpoint: {shape.n_head} attention heads do not divide {shape.n_embd} numbers")
    return shape


def _name(config: Mapping[str, Any]) -> str:
    return str(config.get("_name_or_path") or "bert").rstrip("/").rpartition("/")[2][:100]


def _pooling(checkpoint: Path, shape: Shape) -> tuple[int, bool]:
    """llama.cpp's number of how tokens become one vector, and whether its norm is 1."""
    modules = _json(checkpoint, "modules.json", list)
    kinds = tuple(str(m.get("type")).rpartition(".")[2] if isinstance(m, dict) else "?" for m in modules)
    if kinds not in MODULES:
        raise BadDataError(f"checkpoint: modules {', '.join(kinds)!r:.200} are not known")
    pooling = _json(checkpoint, "1_Pooling/config.json")
    modes = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise BadDataError(f"checkpoint: pooling {', '.join(modes) or 'none'!r:.200} is not known")
    if pooling.get("word_embedding_dimension") != shape.n_embd:
        raise BadDataError("checkpoint: its pooling is for vectors of another length than the model's")
    return POOLINGS[modes[0]], kinds[-1] == "Normalize"


def _tokens(checkpoint: Path, shape: Shape) -> list[str]:
    """The vocabulary in order of ids."""
    tokenizer = _json(checkpoint, "tokenizer.json")
    try:
        model, normalizer = tokenizer["model"], tokenizer["normalizer"] or {}
        vocab = model["vocab"]
        kind = model.get("type", "WordPiece"), normalizer["type"], normalizer["lowercase"]
        prefix = model.get("continuing_subword_prefix", "##")
        ordered = sorted(vocab, key=vocab.__getitem__)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadDataError("checkpoint: tokenizer.json is not one of BERT's") from error
    # llama.cpp's WordPiece lowers letters and strips accents, always.
    if kind != ("WordPiece", "BertNormalizer", True) or prefix != "##":
        raise BadDataError(f"checkpoint: tokenizer {kind!r:.120} is not known; lower-case WordPiece is")
    if [vocab[token] for token in ordered] != list(range(shape.n_vocab)):
        raise BadDataError(f"checkpoint: its vocabulary is not the {shape.n_vocab:,} tokens of config.json")
    if missing := [token for token in SPECIAL if token not in vocab]:
        raise BadDataError(f"checkpoint: its vocabulary lacks {', '.join(missing)}")
    return ordered


def _add_tokenizer(writer: Any, tokens: list[str], shape: Shape) -> None:
    import gguf

    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("bert")
    writer.add_token_list([_phantom_space(token) for token in tokens])
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_type_count(shape.n_types)
    for token, key in SPECIAL.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", tokens.index(token))


def _phantom_space(token: str) -> str:
    """A token as llama.cpp's WordPiece wants it: what begins a word has a mark, what goes on has none."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


# ── weights ─────────────────────────────────────────────────────────────────────────────────


def _expected(shape: Shape) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Each tensor's name in the checkpoint → its name in the GGUF, its shape, whether it stays float32."""
    n, wide = shape.n_embd, shape.n_ff
    found: dict[str, tuple[str, tuple[int, ...], bool]] = {
        "embeddings.word_embeddings.weight": ("token_embd.weight", (shape.n_vocab, n), False),
        "embeddings.position_embeddings.weight": ("position_embd.weight", (shape.n_ctx, n), True),
        "embeddings.token_type_embeddings.weight": ("token_types.weight", (shape.n_types, n), True),
        "embeddings.LayerNorm.weight": ("token_embd_norm.weight", (n,), True),
        "embeddings.LayerNorm.bias": ("token_embd_norm.bias", (n,), True),
    }
    sizes = {"ffn_up": (wide, n), "ffn_down": (n, wide)}
    for layer in range(shape.n_layer):
        for theirs, ours in LAYER.items():
            rows, columns = sizes.get(ours, (n, n))
            norm = ours.endswith("norm")
            source, name = f"encoder.layer.{layer}.{theirs}", f"blk.{layer}.{ours}"
            found[f"{source}.weight"] = (f"{name}.weight", (rows,) if norm else (rows, columns), norm)
            found[f"{source}.bias"] = (f"{name}.bias", (rows,), True)
    return found


def _tensors(weights: Path, shape: Shape) -> Iterator[tuple[str, Any]]:
    """The GGUF's tensors in order, as numpy arrays, one at a time."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    expected = _expected(shape)
    try:
        with safe_open(weights, "np") as file:
            names = {name.removeprefix("bert."): name for name in file.keys()}  # noqa: SIM118 — no mapping
            if len(names) < len(list(file.keys())):
                raise BadDataError("checkpoint: a tensor is there twice, with and without 'bert.' before it")
            if missing := sorted(set(expected) - set(names)):
                raise BadDataError(f"checkpoint: {len(missing)} tensors are missing, {missing[0]} first")
            if extra := sorted(set(names) - set(expected) - set(UNUSED)):
                raise BadDataError(f"checkpoint: {len(extra)} tensors are not known, {extra[0]!r:.120} first")
            for theirs, (ours, size, is_wide) in expected.items():
                values = file.get_tensor(names[theirs])
                if values.shape != size or values.dtype not in (np.float32, np.float16):
                    raise BadDataError(
                        f"checkpoint: {theirs} is {values.dtype} of {values.shape}, expected {size}"
                    )
                yield ours, values.astype(np.float32 if is_wide else np.float16)
    except (SafetensorError, OSError, TypeError) as error:
        raise BadDataError(f"checkpoint: {WEIGHTS} is broken: {error}") from error
