"""Which files make a model, and its header: what it says and what it costs."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from gguf_maker import ARRAY, STRING, TEMPLATE, VOCABULARY, Raw, Typed, make_gguf, make_parts
from hypothesis import given
from hypothesis import strategies as st

from myllm.errors import BadDataError, NotFoundError, PermissionDeniedError, UsageError
from myllm.models.gguf import read_header, read_model
from myllm.models.gguf_file import Skipped, read_gguf
from myllm.models.gguf_format import FILE_TYPES, TENSOR_TYPES
from myllm.models.header import SAMPLING_KEYS
from myllm.protocol import SAMPLING

MIB = 2**20


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "tiny.gguf")


def test_a_header_says_what_the_model_is(tiny: Path) -> None:
    header = read_header(tiny)
    assert header.path == tiny
    assert (header.architecture, header.name, header.kind) == ("llama", "Tiny", "model")
    assert (header.quantization, header.parameters, header.n_tensors) == ("Q4_0", 512, 2)
    assert (header.context_length, header.embedding_length) == (256, 64)
    assert header.vocab_size == len(VOCABULARY)
    assert header.template == TEMPLATE
    assert header.size_bytes == tiny.stat().st_size
    assert header.is_language_model
    assert not header.is_embedding_model


def test_what_the_file_does_not_say_is_none(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "bare.gguf", pairs=[("general.architecture", "llama")])
    header = read_header(path)
    assert header.name is header.context_length is header.template is header.vocab_size is None
    assert header.quantization == "F32", "the type of most weights"
    assert header.kv_bytes_per_token() == 0


def test_named_templates_stand_beside_the_main_one(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", {"tokenizer.chat_template.tool_use": "{{ tools }}"})
    assert read_header(path).templates == {"tool_use": "{{ tools }}"}
    assert read_header(path).template == TEMPLATE


def test_a_recommended_sampling_has_the_wires_names(tmp_path: Path) -> None:
    path = make_gguf(
        tmp_path / "m.gguf",
        {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.5},
    )
    assert read_header(path).sampling == {"temperature": 0.5, "top_k": 20, "repeat_penalty": 1.5}
    assert set(SAMPLING_KEYS.values()) <= set(SAMPLING)


def test_a_recommendation_that_no_request_could_carry_is_left_out(tmp_path: Path) -> None:
    path = make_gguf(
        tmp_path / "m.gguf",
        {"general.sampling.temp": float("nan"), "general.sampling.top_p": 7.0, "general.sampling.top_k": "x"},
    )
    assert read_header(path).sampling == {}


@pytest.mark.parametrize(
    ("metadata", "is_embedding", "pooling"),
    [
        ({"llama.pooling_type": 1}, True, "mean"),
        ({"llama.pooling_type": 0}, False, "none"),
        ({"llama.attention.causal": False}, True, None),
        ({"llama.pooling_type": 99}, False, None),
    ],
)
def test_an_embedding_model_is_told_by_pooling_or_attention(
    tmp_path: Path, metadata: dict[str, object], is_embedding: bool, pooling: str | None
) -> None:
    header = read_header(make_gguf(tmp_path / "m.gguf", metadata))
    assert (header.is_embedding_model, header.pooling_type) == (is_embedding, pooling)


@pytest.mark.parametrize("metadata", [{"general.type": "adapter"}, {"general.architecture": "clip"}])
def test_an_adapter_or_projector_is_no_language_model(tmp_path: Path, metadata: dict[str, str]) -> None:
    assert not read_header(make_gguf(tmp_path / "m.gguf", metadata)).is_language_model


# ── memory ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, 2 * 2 * (16 + 16) * 2),  # 2 layers × 2 heads × (key + value) × 2 bytes
        ({"llama.attention.key_length": 32, "llama.attention.value_length": 8}, 2 * 2 * (32 + 8) * 2),
        ({"llama.attention.head_count_kv": [1, 3]}, (1 + 3) * (16 + 16) * 2),
        ({"llama.attention.head_count_kv": [0, 2]}, 2 * (16 + 16) * 2),  # the first layer is recurrent
        ({"llama.attention.head_count_kv": None}, 2 * 4 * (16 + 16) * 2),  # as many as query heads
        ({"llama.attention.shared_kv_layers": 1}, 2 * (16 + 16) * 2),
        ({"llama.attention.key_length_mla": 16}, 2 * 2 * 16 * 2),  # keys only
        ({"llama.attention.causal": False}, 0),  # an encoder has no cache
    ],
)
def test_kv_bytes_are_summed_over_layers(tmp_path: Path, metadata: dict[str, object], expected: int) -> None:
    assert read_header(make_gguf(tmp_path / "m.gguf", metadata)).kv_bytes_per_token() == expected


def test_a_quantised_cache_takes_its_blocks_size(tiny: Path) -> None:
    header = read_header(tiny)
    by_type = {kv: header.kv_bytes_per_token(kv) for kv in ("f32", "f16", "q8_0", "q4_0")}
    assert by_type == {"f32": 512, "f16": 256, "q8_0": 4 * 34, "q4_0": 4 * 18}
    with pytest.raises(UsageError, match="q9_9"):
        header.kv_bytes_per_token("q9_9")


def test_the_estimate_grows_with_the_padded_window(tiny: Path) -> None:
    header = read_header(tiny)
    assert header.memory_estimate(1) == header.memory_estimate(256)
    mask = 512 * 256 * 2
    assert (
        header.memory_estimate(257) - header.memory_estimate(256) == 256 * header.kv_bytes_per_token() + mask
    )
    assert header.memory_estimate(256) > header.size_bytes


# ── split models ────────────────────────────────────────────────────────────────────────────


def test_the_parts_of_a_split_model_count_as_one(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    whole = read_model(parts[0])
    assert list(whole.paths) == parts
    assert whole.size_bytes == sum(part.stat().st_size for part in parts)
    assert (whole.n_tensors, whole.parameters) == (3, 3 * 128)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    parts[1].unlink()
    with pytest.raises(BadDataError, match=r"big-00002-of-00003\.gguf: this part .* is missing"):
        read_model(parts[0])


@pytest.mark.parametrize("name", ["big-00002-of-00003.gguf", "renamed.gguf", "other-00002-of-00003.gguf"])
def test_only_the_first_part_under_its_own_name_stands_for_the_model(tmp_path: Path, name: str) -> None:
    parts = make_parts(tmp_path)
    os.link(parts[0], tmp_path / "renamed.gguf")
    os.link(parts[0], tmp_path / "other-00002-of-00003.gguf")
    with pytest.raises(BadDataError, match=r"one of 3 parts .* -00001-of-00003"):
        read_model(tmp_path / name)


def test_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(BadDataError, match="not part 2 of 3"):
        read_model(parts[0])


# ── nonsense in well-formed files ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"general.architecture": None}, "architecture is missing"),
        ({"general.architecture": ""}, "architecture is missing"),
        ({"general.architecture": 3}, "architecture is not a text"),
        ({"llama.context_length": -1.5}, "context_length is not a count"),
        ({"llama.context_length": Typed("uint64", 2**63)}, "context_length is not a count"),
        ({"llama.context_length": True}, "context_length is not a count"),
        ({"llama.block_count": 2**31 - 1}, "layers"),
        ({"llama.attention.head_count_kv": [1.5, 2.5]}, "head_count_kv is not a list of counts"),
        ({"llama.attention.head_count_kv": [-1, 2]}, "head_count_kv is not a list of counts"),
        ({"llama.attention.head_count_kv": Typed("int32", [1] * 5000)}, "head_count_kv is not a count"),
        ({"llama.attention.key_length": 2**31 - 1}, "impossibly many or large"),
        ({"tokenizer.chat_template": "x" * (MIB + 1)}, "chat_template is not a text"),
        ({"tokenizer.chat_template.a": 1}, "chat_template.a is not a text"),
        ({"split.count": 65535}, "65,535 parts"),
        ({"general.file_type": "x"}, "file_type is not a count"),
    ],
)
def test_a_key_that_cannot_be_is_bad_data(tmp_path: Path, metadata: dict[str, object], why: str) -> None:
    with pytest.raises(BadDataError, match=why):
        read_header(make_gguf(tmp_path / "m.gguf", metadata))


def test_no_such_file_and_no_permission_have_their_own_errors(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(NotFoundError):
        read_header(tiny / "below.gguf")
    with pytest.raises(NotFoundError, match="not a path"):
        read_header(Path("nul\0.gguf"))

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # as root, no file mode refuses
    with pytest.raises(PermissionDeniedError, match="permission denied"):
        read_header(tiny)


# ── against the reference implementation ────────────────────────────────────────────────────

NUMBERS = (
    st.integers(0, 2**32 - 1) | st.floats(width=32, allow_nan=False) | st.booleans() | st.text(max_size=40)
)


@given(
    metadata=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(\.[a-z_]{1,12}){1,2}", fullmatch=True), NUMBERS, max_size=12
    ),
    tokens=st.lists(st.text(max_size=30), min_size=1, max_size=50),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=4),
)
def test_it_reads_what_the_gguf_package_writes(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, object],
    tokens: list[str],
    shapes: list[list[int]],
) -> None:
    import numpy

    path = tmp_path_factory.mktemp("reference") / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
    for n, shape in enumerate(shapes):
        writer.add_tensor(f"t{n}", numpy.zeros(shape, numpy.float16 if n % 2 else numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours, theirs = read_gguf(path), GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert expected.pop("tokenizer.ggml.tokens") == tokens
    assert ours.metadata["tokenizer.ggml.tokens"] == Skipped("string", len(tokens))
    assert {k: v for k, v in ours.metadata.items() if not isinstance(v, Skipped)} == expected
    assert ours.n_tensors == len(theirs.tensors)
    assert sum(ours.elements.values()) == sum(int(tensor.n_elements) for tensor in theirs.tensors)
    if theirs.tensors:
        assert ours.data_offset == min(int(tensor.data_offset) for tensor in theirs.tensors)


def test_types_and_block_sizes_are_those_of_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    known = {number: (name, *GGML_QUANT_SIZES[kind]) for number, name, kind in _types(GGMLQuantizationType)}
    known[9] = ("Q8_1", 32, 36)  # 40 in gguf 0.19, which no file has ever shown: it is not for storage
    assert {number: TENSOR_TYPES[number] for number in known} == known
    names = {
        t.value: t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in LlamaFileType if t.value < 1024
    }
    assert {number: FILE_TYPES.get(number) for number in names} == names


def _types(enumeration: type) -> list[tuple[int, str, object]]:
    return [(kind.value, kind.name, kind) for kind in enumeration]  # type: ignore[attr-defined]


@pytest.mark.model
def test_the_real_model_reads_as_the_gguf_package_reads_it(smollm2_path: Path) -> None:
    ours, theirs = read_gguf(smollm2_path), GGUFReader(smollm2_path)
    assert ours.n_tensors == len(theirs.tensors)
    assert sum(ours.elements.values()) == sum(int(tensor.n_elements) for tensor in theirs.tensors)
    assert ours.data_offset == min(int(tensor.data_offset) for tensor in theirs.tensors)
    for key, value in ours.metadata.items():
        contents = theirs.fields[key].contents()
        if isinstance(value, Skipped):
            assert value.length == len(contents)
        else:
            assert value == contents
    header = read_header(smollm2_path)
    assert (header.quantization, header.context_length, header.parameters) == ("Q4_1", 8192, 134_515_008)
    assert header.kv_bytes_per_token() == 30 * 3 * (64 + 64) * 2
    for context, measured in ((1024, 183 * MIB), (8192, 341 * MIB)):  # PSS of llama-cpp-python 0.3.36
        assert measured <= header.memory_estimate(context) <= 1.2 * measured


def test_a_big_vocabulary_is_quick(tmp_path: Path) -> None:
    """256,000 tokens in under half a second on a busy machine (about 30 ms on an idle one)."""
    import time

    strings = b"".join(struct.pack("<Q", 5 + n % 7) + b"x" * (5 + n % 7) for n in range(256_000))
    raw = Raw(ARRAY, struct.pack("<IQ", STRING, 256_000) + strings)
    path = make_gguf(tmp_path / "big.gguf", {"tokenizer.ggml.tokens": raw})
    started = time.process_time()
    assert read_header(path).vocab_size == 256_000
    assert time.process_time() - started < 0.5
