"""What a BERT-family sentence-transformers checkpoint says of itself, read from its small files.

Owns what of a checkpoint is understood: sizes, pooling, window, prompts, vocabulary. Whatever is not
is refused by name, never guessed. Its files come from strangers: each value's type is looked at
before it is used. Must not know weights, GGUF, or where a checkpoint comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from myllm.errors import BadDataError
from myllm.models.bert_vocabulary import vocabulary
from myllm.models.store import read_errors

WEIGHTS: Final = "model.safetensors"
REQUIRED: Final = (WEIGHTS, "config.json", "modules.json", "1_Pooling/config.json")
TOKENIZERS: Final = ("tokenizer.json", "vocab.txt")
"""One of them must be there; the first says more and comes first."""
OPTIONAL: Final = ("tokenizer_config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
FILES: Final = (*REQUIRED, *TOKENIZERS, *OPTIONAL)
"""The files of a checkpoint that are read, no others."""
MAX_JSON: Final = 64 * 1024 * 1024
"""Bytes; the largest are tokenizers of big vocabularies."""
MAX_LAYERS: Final = 512
"""LLAMA_MAX_LAYERS."""
POOLINGS: Final = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2}
"""sentence-transformers' name → `enum llama_pooling_type`."""
MODULES: Final = (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
PROMPTS: Final = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Purpose → the prompts that stand for it, the first there is (encode_query, encode_document)."""


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All but the weights. `tokens` in order of ids; `pooling` is llama.cpp's number; `window` in tokens."""

    folder: Path
    name: str
    shape: Shape
    tokens: tuple[str, ...]
    pooling: int
    normalizes: bool
    window: int
    prefixes: Mapping[str, str]


def missing_file(names: Mapping[str, object]) -> str | None:
    """The first file that a checkpoint with the files `names` lacks."""
    for name in REQUIRED:
        if name not in names:
            return name
    return None if any(name in names for name in TOKENIZERS) else TOKENIZERS[0]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads what the checkpoint in `folder` says. Raises BadDataError naming what is missing or not known."""
    if missing := missing_file({name: True for name in FILES if (folder / name).is_file()}):
        raise BadDataError(
            f"checkpoint: {missing} is missing; {folder.name!r:.120} is no model that is known"
        )
    config = _object(folder, "config.json")
    shape = read_shape(config)
    tokenizer_config = _object(folder, "tokenizer_config.json", optional=True)
    return Checkpoint(
        folder=folder,
        name=_name(config),
        shape=shape,
        tokens=vocabulary(*_tokenizer(folder, tokenizer_config), shape.n_vocab),
        pooling=_pooling(folder, shape),
        normalizes=_modules(folder)[-1] == "Normalize",
        window=_window(folder, shape, tokenizer_config),
        prefixes=_prefixes(folder),
    )


# ── files ───────────────────────────────────────────────────────────────────────────────────


def _read(folder: Path, name: str) -> bytes:
    with read_errors(f"checkpoint: {name}"):
        if (size := (folder / name).stat().st_size) > MAX_JSON:
            raise BadDataError(f"checkpoint: {name} has {size:,} bytes; at most {MAX_JSON:,} are read")
        return (folder / name).read_bytes()


def _json(folder: Path, name: str) -> Any:
    try:
        value = json.loads(_read(folder, name))
        json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"checkpoint: {name} is not JSON that can be used") from error
    return value


def _object(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    if optional and not (folder / name).is_file():
        return {}
    value = _json(folder, name)
    if not isinstance(value, dict):
        raise BadDataError(f"checkpoint: {name} is not a JSON object")
    return value


def _tokenizer(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[str] | None]:
    """The tokenizer.json; or the tokenizer_config.json with the lines of vocab.txt."""
    if (folder / "tokenizer.json").is_file():
        return _object(folder, "tokenizer.json"), None
    if not (folder / "tokenizer_config.json").is_file():
        raise BadDataError("checkpoint: vocab.txt needs a tokenizer_config.json that says how it is used")
    try:
        lines = _read(folder, "vocab.txt").decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise BadDataError("checkpoint: vocab.txt is not UTF-8") from error
    return config, [line.removesuffix("\r") for line in lines]


# ── what they say ───────────────────────────────────────────────────────────────────────────


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The sizes in a config.json. Raises BadDataError for an architecture that is not BERT's."""
    if (kind := config.get("model_type")) != "bert":
        raise BadDataError(f"checkpoint: model_type {kind!r:.80} is not known; bert is")
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
    if shape.n_layer > MAX_LAYERS or shape.n_embd % shape.n_head:
        raise BadDataError(
            f"checkpoint: {shape.n_layer} layers (at most {MAX_LAYERS}) with {shape.n_head} heads "
            f"in {shape.n_embd} cannot be computed"
        )
    return shape


def _name(config: Mapping[str, Any]) -> str:
    path = config.get("_name_or_path")
    return (path if isinstance(path, str) else "").rstrip("/").rpartition("/")[2][:100] or "bert"


def _modules(folder: Path) -> tuple[str, ...]:
    modules = _json(folder, "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise BadDataError("checkpoint: modules.json is not a list of modules")
    kinds = tuple(str(module.get("type")).rpartition(".")[2] for module in modules)
    if kinds not in MODULES:
        raise BadDataError(f"checkpoint: modules {', '.join(kinds)!r:.200} are not known")
    places = [module.get("path") for module in modules[:2]]
    if places != ["", "1_Pooling"]:
        raise BadDataError(f"checkpoint: modules in {places!r:.120} are not known; '' and '1_Pooling' are")
    return kinds


def _pooling(folder: Path, shape: Shape) -> int:
    """llama.cpp's number of how tokens become one vector."""
    pooling = _object(folder, "1_Pooling/config.json")
    modes = [key for key, value in pooling.items() if key.startswith("pooling_mode") and value]
    if len(modes) != 1 or modes[0] not in POOLINGS or pooling[modes[0]] is not True:
        raise BadDataError(f"checkpoint: pooling {', '.join(modes) or 'none'!r:.200} is not known")
    if pooling.get("include_prompt", True) is not True:
        raise BadDataError("checkpoint: a pooling that leaves out the prompt is not known")
    if pooling.get("word_embedding_dimension") != shape.n_embd:
        raise BadDataError("checkpoint: its pooling is for vectors of another length than the model's")
    return POOLINGS[modes[0]]


def _window(folder: Path, shape: Shape, tokenizer_config: Mapping[str, Any]) -> int:
    """Tokens, as sentence-transformers finds them where no max_seq_length is set."""
    window = _object(folder, "sentence_bert_config.json", optional=True).get("max_seq_length")
    if window is None:
        longest = tokenizer_config.get("model_max_length")
        window = min(shape.n_ctx, longest) if type(longest) is int else shape.n_ctx
    if type(window) is not int or not 2 < window <= shape.n_ctx:
        raise BadDataError(f"checkpoint: max_seq_length is {window!r:.40}, of at most {shape.n_ctx}")
    return window


def _prefixes(folder: Path) -> dict[str, str]:
    config = _object(folder, "config_sentence_transformers.json", optional=True)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise BadDataError("checkpoint: the prompts of config_sentence_transformers.json are not texts")
    if default := config.get("default_prompt_name"):
        raise BadDataError(f"checkpoint: a prompt for every text ({default!r:.80}) is not known")
    found = {
        purpose: next((prompts[name] for name in names if name in prompts), "")
        for purpose, names in PROMPTS.items()
    }
    return {purpose: prompt for purpose, prompt in found.items() if prompt}
