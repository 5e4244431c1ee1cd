"""Makes sentence-transformers checkpoints of a few KB: hidden size 8, one layer, twelve tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from myllm.models.bert_checkpoint import read_shape
from myllm.models.bert_vocabulary import SPECIAL
from myllm.models.convert import expected_tensors

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "_name_or_path": "maker/tiny",
}
POOLING = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
MODULES = [
    {"type": f"sentence_transformers.models.{kind}", "path": path}
    for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
]
VOCAB = {token: index for index, token in enumerate([*SPECIAL, "a", "##b", "c", "d", "e", "f", "g"])}
NORMALIZER = {"type": "BertNormalizer", "lowercase": True, "strip_accents": None}
WORDPIECE = {"type": "WordPiece", "vocab": VOCAB, "continuing_subword_prefix": "##", "unk_token": "[UNK]"}
FRAME = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ],
}
TOKENIZER = {
    "normalizer": NORMALIZER,
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": FRAME,
    "added_tokens": [{"id": index, "content": token} for index, token in enumerate(SPECIAL)],
    "model": WORDPIECE,
}
SMALL_FILES: dict[str, Any] = {
    "config.json": CONFIG,
    "modules.json": MODULES,
    "1_Pooling/config.json": POOLING,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {"model_max_length": 20, "do_lower_case": True},
    "sentence_bert_config.json": {"max_seq_length": 16},
    "config_sentence_transformers.json": {"prompts": {"query": "q"}, "default_prompt_name": None},
}


def make_checkpoint(folder: Path) -> Path:
    """A sound checkpoint with its required files and a window of 16 tokens, in the new folder `folder`."""
    (folder / "1_Pooling").mkdir(parents=True)
    for name, value in SMALL_FILES.items():
        if name not in ("tokenizer_config.json", "config_sentence_transformers.json"):
            (folder / name).write_text(json.dumps(value))
    save_file(make_tensors(), folder / "model.safetensors")
    return folder


def make_tensors() -> dict[str, Any]:
    """The same weights each time."""
    source = np.random.default_rng(1)
    return {
        name: source.normal(size=tensor.shape).astype(np.float32)
        for name, tensor in expected_tensors(read_shape(CONFIG)).items()
    }
