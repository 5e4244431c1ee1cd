"""A hostile file costs little and is refused with BadDataError, whatever byte of it is wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_maker import ARRAY, STRING, Raw, Tensor, Typed, header_size, make_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.errors import BadDataError
from myllm.models.gguf import read_header
from myllm.models.gguf_file import CHUNK, MAX_ARRAY, MAX_HEADER, MAX_STRINGS, MAX_TEXT, Skipped, read_gguf

MANY = 2**62


def strings(count: int, text: bytes = b"") -> Raw:
    """An array that claims `count` strings and holds one."""
    return Raw(ARRAY, struct.pack("<IQQ", STRING, count, len(text)) + text)


def array(kind: int, count: int, data: bytes = b"") -> Raw:
    return Raw(ARRAY, struct.pack("<IQ", kind, count) + data)


# ── well-formed ─────────────────────────────────────────────────────────────────────────────


def test_scalars_and_short_arrays_are_kept_and_long_ones_only_counted(tmp_path: Path) -> None:
    path = make_gguf(
        tmp_path / "m.gguf",
        {
            "a.short": Typed("int16", [-3, 4]),
            "a.flags": [True, False],
            "a.long": Typed("uint8", [7] * (MAX_ARRAY + 1)),
            "a.big": Typed("uint64", 2**63),
            "a.double": Typed("float64", 0.1),
            "a.texts": ["x", "", "yy"],
            "a.novel": "n" * (MAX_TEXT + 1),
            "a.empty": array(STRING, 0),
        },
    )
    metadata = read_gguf(path).metadata
    assert {key: value for key, value in metadata.items() if key.startswith("a.")} == {
        "a.short": (-3, 4),
        "a.flags": (True, False),
        "a.long": Skipped("uint8", MAX_ARRAY + 1),
        "a.big": 2**63,
        "a.double": 0.1,
        "a.texts": Skipped("string", 3),
        "a.novel": Skipped("string", MAX_TEXT + 1),
        "a.empty": Skipped("string", 0),
    }


@pytest.mark.parametrize("filler", [0, 1, 7, 8, 9, 15, 16, 17])
def test_strings_are_stepped_over_wherever_a_chunk_ends(tmp_path: Path, filler: int) -> None:
    texts = ["x" * (1000 + n % 13) for n in range(CHUNK * 2 // 1000)]
    path = make_gguf(
        tmp_path / "m.gguf",
        {
            "general.name": "n" * filler,
            "a.texts": texts,
            "a.huge": ["h" * CHUNK, "i" * 3 * CHUNK, "j"],
            "a.end": "here",
        },
    )
    metadata = read_gguf(path).metadata
    assert metadata["a.texts"] == Skipped("string", len(texts))
    assert metadata["a.end"] == "here"


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_files_own_alignment_holds(tmp_path: Path, alignment: int) -> None:
    path = make_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, alignment=alignment)
    file = read_gguf(path)
    assert file.data_offset % alignment == 0
    assert file.data_offset == header_size(path, data_size=max(1024, alignment) + 144)


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    assert read_gguf(make_gguf(tmp_path / "m.gguf", version=2)).n_tensors == 2


def test_text_that_is_not_utf8_is_kept_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", {"general.name": b"caf\xe9"})
    assert read_gguf(path).metadata["general.name"] == "caf�"


# ── each thing that can be wrong ────────────────────────────────────────────────────────────

TENSOR = Tensor("t", (32, 4), size=512)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another magic": ({"magic": b"GGML"}, "it starts with"),
    "version 0": ({"version": 0}, "version is 0"),
    "version 1": ({"version": 1}, "version is 1"),
    "a later version": ({"version": 4}, "version is 4"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "more tensors than fit": ({"n_tensors": 1000}, "claims 1,000 tensors"),
    "huge tensor count": ({"n_tensors": MANY}, "claims"),
    "negative tensor count": ({"n_tensors": 2**64 - 1}, "claims"),
    "huge pair count": ({"n_pairs": MANY}, "claims"),
    "one pair too many": ({"n_pairs": 15}, "not a usable GGUF file"),
    "empty key": ({"pairs": [("", 1)]}, "an empty key"),
    "duplicate key": ({"pairs": [("a.b", 1), ("a.b", 2)]}, "duplicate key 'a.b'"),
    "key that is not UTF-8": ({"pairs": [(b"\xff", 1)]}, "not UTF-8"),
    "long key": ({"pairs": [("k" * 65536, 1)]}, "a key of 65,536 bytes"),
    "unknown value type": ({"metadata": {"a": Raw(13, b"")}}, "unknown value type 13"),
    "unknown array type": ({"metadata": {"a": array(99, 1, b"x")}}, "unknown array type 99"),
    "nested array": ({"metadata": {"a": array(ARRAY, 1, bytes(16))}}, "array of arrays"),
    "huge string": ({"metadata": {"a": Raw(STRING, struct.pack("<Q", MANY))}}, "past the file's end"),
    "negative string": ({"metadata": {"a": Raw(STRING, b"\xff" * 8)}}, "past the file's end"),
    "huge array": ({"metadata": {"a": array(4, MANY)}}, "cut off"),
    "overflowing array": ({"metadata": {"a": array(12, 2**61)}}, "cut off"),
    "huge string array": ({"metadata": {"a": strings(MANY)}}, "past the file's end"),
    "huge string in an array": (
        {"metadata": {"a": array(STRING, 2, struct.pack("<QQ", MANY, 1))}},
        "cut off",
    ),
    "overflowing string in an array": ({"metadata": {"a": array(STRING, 1, b"\xff" * 8)}}, "cut off"),
    "overflow at the very end": ({"pairs": [("a", array(STRING, 1, b"\xff" * 8))], "tensors": ()}, "cut off"),
    "alignment 0": ({"metadata": {"general.alignment": 0}}, "not a power of two"),
    "alignment 3": ({"metadata": {"general.alignment": 3}}, "not a power of two"),
    "alignment 2^31": ({"metadata": {"general.alignment": 2**31}}, "not a power of two"),
    "alignment as text": ({"metadata": {"general.alignment": "32"}}, "not a whole number"),
    "duplicate tensor": ({"tensors": [TENSOR, TENSOR]}, "duplicate tensor 't'"),
    "long tensor name": ({"tensors": [Tensor("n" * 64)]}, "a tensor's name of 64 bytes"),
    "tensor name that is not UTF-8": ({"tensors": [Tensor(b"\xff")]}, "not UTF-8"),
    "five dimensions": ({"tensors": [Tensor(shape=(1,) * 5)]}, "5 dimensions"),
    "2^32-1 dimensions": ({"tensors": [Tensor(n_dims=2**32 - 1)]}, "dimensions"),
    "negative dimension": ({"tensors": [Tensor(shape=(32, -4))]}, "impossible shape"),
    "overflowing shape": ({"tensors": [Tensor(shape=(2**32, 2**32))]}, "impossible shape"),
    "shape that wraps to 0": ({"tensors": [Tensor(shape=(2**40, 2**40, 0))]}, "impossible shape"),
    "unknown tensor type": ({"tensors": [Tensor(kind=4)]}, "unknown type 4"),
    "tensor type past the end": ({"tensors": [Tensor(kind=1000)]}, "unknown type 1000"),
    "half a block": ({"tensors": [Tensor(shape=(33,), kind=2)]}, "no whole blocks of Q4_0"),
    "offset beyond the file": ({"tensors": [Tensor(offset=2**40)]}, "offset 1099511627776"),
    "odd offset": ({"tensors": [Tensor(offset=1)]}, "at offset 1"),
    "overlapping tensors": ({"tensors": [TENSOR, Tensor("u", offset=0)]}, "at offset 0, where 512"),
    "tensor larger than the file": ({"tensors": [Tensor(shape=(2**40,))]}, "its tensors end at byte"),
    "one byte short": ({"tensors": [TENSOR], "data": bytes(511)}, "its tensors end at byte"),
    "no data": ({"data": b""}, "its tensors end at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_bad_data_and_named(tmp_path: Path, case: str) -> None:
    arguments, why = BROKEN[case]
    path = make_gguf(tmp_path / "broken.gguf", **arguments)
    with pytest.raises(BadDataError, match=why) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: not a usable GGUF file: ")
    assert error.value.exit_status == 65


def test_a_file_cut_anywhere_in_its_header_or_data_is_bad_data(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for size in (*range(header_size(path)), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(BadDataError):
            read_header(path)
    path.write_bytes(whole)
    read_header(path)


@pytest.mark.parametrize("text", [b"", b"GGUF", b"Dear reader,\n" * 50, bytes(4096)])
def test_what_is_no_gguf_is_bad_data(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "letter.gguf"
    path.write_bytes(text)
    with pytest.raises(BadDataError, match="not a usable GGUF file"):
        read_header(path)


def test_what_is_no_regular_file_is_bad_data_and_never_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadDataError, match="not a regular file"):
            read_header(path)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 400),
)
def test_random_bytes_anywhere_raise_bad_data_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    path = make_gguf(tmp_path_factory.getbasetemp() / "mutated.gguf")
    content = bytearray(path.read_bytes())
    for at, byte in changes:
        content[at % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    try:
        header = read_header(path)
    except BadDataError:
        return
    for kv_type in ("f16", "q4_0"):
        json.dumps([header.kv_bytes_per_token(kv_type), header.memory_estimate(4096, kv_type)])
    assert header.size_bytes >= header.n_tensors


# ── cost ────────────────────────────────────────────────────────────────────────────────────

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from myllm.errors import BadDataError
from myllm.models.gguf import read_header

resource.setrlimit(resource.RLIMIT_AS, (256_000_000, 256_000_000))
for name in sys.argv[1:]:
    started = time.process_time()
    try:
        read_header(Path(name))
        refused = False
    except BadDataError:
        refused = True
    print(json.dumps([refused, time.process_time() - started]))
"""


def sparse(path: Path, size: int, **arguments: Any) -> Path:
    """A file that claims much and has the size to back it, in holes."""
    make_gguf(path, tensors=(), **arguments)
    os.truncate(path, size)
    return path


def test_a_file_may_not_have_more_strings_than_any_vocabulary(tmp_path: Path) -> None:
    enough = array(STRING, MAX_STRINGS, bytes(8 * MAX_STRINGS))
    read_gguf(make_gguf(tmp_path / "m.gguf", {"a.most": enough, "tokenizer.ggml.tokens": None}))
    with pytest.raises(BadDataError, match="strings"):
        read_gguf(
            make_gguf(tmp_path / "m.gguf", {"a.most": enough, "a.more": ["x"], "tokenizer.ggml.tokens": None})
        )


def test_a_header_may_not_be_larger_than_any_vocabulary(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.gguf", 2**40, pairs=[("a", array(4, 2**34))])
    with pytest.raises(BadDataError, match="header is larger"):
        read_gguf(path)


def test_the_most_expensive_files_take_under_two_seconds_and_256_mb(tmp_path: Path) -> None:
    """Each fills one limit: strings to step over, pairs to keep, text, numbers, tensors."""
    numbers = [(f"k.{n}", Typed("int16", [1000 + n] * MAX_ARRAY)) for n in range(600)]
    wide = "\N{PILE OF POO}" + "x" * (MAX_TEXT - 8)
    files = [
        sparse(tmp_path / "empty-strings.gguf", 2**40, pairs=[("a", strings(2**34))]),
        sparse(tmp_path / "numbers.gguf", 2**40, pairs=[("a", array(4, 2**34))]),
        make_gguf(
            tmp_path / "just-fits.gguf", pairs=[("a", array(STRING, MAX_STRINGS, bytes(8 * MAX_STRINGS)))]
        ),
        make_gguf(tmp_path / "pairs.gguf", pairs=[(f"{n:04x}", True) for n in range(65_536)]),
        make_gguf(tmp_path / "texts.gguf", pairs=[(f"t{n}", wide) for n in range(60)]),
        make_gguf(tmp_path / "arrays.gguf", pairs=numbers),
        make_gguf(tmp_path / "tensors.gguf", tensors=[Tensor(f"{n}", (), size=32) for n in range(30_000)]),
        make_gguf(tmp_path / "long-header.gguf", pairs=[("a", "x" * (MAX_HEADER + 1))]),
    ]
    run = subprocess.run([sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for file, line in zip(files, run.stdout.splitlines(), strict=True):
        refused, seconds = json.loads(line)
        assert seconds < 2, file.name
        assert refused is (file.name != "tensors.gguf"), file.name
