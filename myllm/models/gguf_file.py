"""The GGUF container: reads and checks a file's header, trusting nothing in it.

Ours, as hostile files need bounds: the library `gguf` makes an object of every array element and maps all
tensors. Owns what is a well-formed file, as llama.cpp sees it (ggml/src/gguf.cpp); numbers and names are in
`gguf_format.py`. Must not know what any key means for a language model: that is `header.py`.

The file is read forwards through one chunk of memory. Arrays of the tokenizer are stepped over, not
built; every count, length and offset is checked before it is used, so that a process takes under 2 s
and 256 MB whatever the file says. Anything wrong is a BadDataError.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from myllm.errors import BadDataError, IOFailureError, MyllmError, NotFoundError, PermissionDeniedError
from myllm.models.gguf_format import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_ELEMENTS,
    MAX_KEY,
    MAX_TENSOR_NAME,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    VERSIONS,
)

# Limits. Headers of real models have 20 to 100 pairs, up to 3,000 tensors, and 2 to 20 MiB, nearly all
# of it the vocabulary (up to 800,000 tokens and merges). These leave room and bound the work.
MAX_HEADER: Final = 64 * 2**20
MAX_PAIRS: Final = 2**16
MAX_TENSORS: Final = 2**16
MAX_STRINGS: Final = 3 * 2**20
"""Strings in arrays, all told: some 0.4 s of stepping over them."""
MAX_TEXT: Final = 2**20
"""A longer string is skipped, not kept (some files carry a whole tokenizer.json as one)."""
MAX_ARRAY: Final = 4096
"""A longer array is skipped; per-layer values have as many elements as there are layers."""
MAX_KEPT: Final = 4 * 2**20
"""Bytes of values kept in all; as Python objects they take up to 18 times that (int16)."""
CHUNK: Final = 2**20

U32: Final = struct.Struct("<I")
U64: Final = struct.Struct("<Q")
TENSOR_TAIL: Final = struct.Struct("<IQ")
SHAPES: Final = tuple(struct.Struct(f"<{n}q") for n in range(MAX_DIMS + 1))


@dataclass(frozen=True, slots=True)
class Skipped:
    """A value that was checked and stepped over: its type's name and how many elements (or bytes) it has."""

    kind: str
    length: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Skipped


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the header of one file says; sizes and offsets in bytes, `elements` by tensor type name."""

    path: Path
    size_bytes: int
    metadata: Mapping[str, Value]
    n_tensors: int
    elements: Mapping[str, int]
    data_offset: int


def read_gguf(path: Path) -> GgufFile:
    """Reads and checks the whole header, and that each tensor lies inside the file.

    Raises BadDataError, NotFoundError, PermissionDeniedError or IOFailureError. Blocks on the disk.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadDataError(f"{path}: not a regular file; give the path of a .gguf file")
        return _parse(_Window(descriptor, path, status.st_size), path, status)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError | ValueError) -> MyllmError:
    """The operating system's error about a file as ours."""
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return NotFoundError(f"{path}: no such file; `myllm models list` shows what there is")
        case PermissionError():
            return PermissionDeniedError(f"{path}: permission denied; make it readable to you")
        case OSError():
            return IOFailureError(f"{path}: cannot be read: {error.strerror}; check the disk and the path")
        case _:
            return NotFoundError(f"{str(path)!r:.200}: not a path: {error}; check the name")


def _parse(window: _Window, path: Path, status: os.stat_result) -> GgufFile:
    _check_preamble(window)
    n_tensors, n_pairs = window.number(U64), window.number(U64)
    # 33 and 13 bytes are the least that a tensor and a pair take.
    if n_tensors > min(MAX_TENSORS, status.st_size // 33) or n_pairs > min(MAX_PAIRS, status.st_size // 13):
        window.refuse(f"it claims {n_tensors:,} tensors and {n_pairs:,} metadata pairs")
    metadata = _read_metadata(window, n_pairs)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        window.refuse("general.alignment is not a whole number")
    if alignment <= 0 or alignment & (alignment - 1) or alignment > MAX_HEADER:
        window.refuse(f"general.alignment is {alignment}, not a power of two")
    elements, data_offset = _read_tensors(window, n_tensors, alignment)
    return GgufFile(
        path,
        status.st_size,
        metadata,
        n_tensors,
        elements,
        min(data_offset, status.st_size),
    )


def _check_preamble(window: _Window) -> None:
    if window.size < 24:
        window.refuse(f"{window.size} bytes is too short for a header")
    if (magic := window.take(4)) != MAGIC:
        window.refuse(f"it starts with {magic!r}, not {MAGIC!r}")
    version = window.number(U32)
    if version and not version & 0xFFFF:  # as gguf.cpp tells: 3 read in the other byte order
        window.refuse("it is big-endian, and this machine reads little-endian files")
    if version not in VERSIONS:
        window.refuse(f"its format version is {version}; versions 2 and 3 are supported")


def _read_metadata(window: _Window, n_pairs: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    kept = 0
    for _ in range(n_pairs):
        key = window.text(MAX_KEY, "a key")
        if not key or key in metadata:
            window.refuse(f"duplicate key {key!r:.80}" if key else "an empty key")
        start = window.position
        value = metadata[key] = _read_value(window, window.number(U32))
        kept += len(key) + (0 if isinstance(value, Skipped) else window.position - start)
        if kept > MAX_KEPT:
            window.refuse(f"more than {MAX_KEPT:,} bytes of metadata")
    return metadata


def _read_value(window: _Window, kind: int) -> Value:
    if kind == STRING:
        length = window.length("a string")
        if length <= MAX_TEXT:
            return window.take(length).decode("utf-8", "replace")
        window.skip(length)
        return Skipped("string", length)
    if kind == ARRAY:
        return _read_array(window, window.number(U32), window.number(U64))
    if kind not in SCALARS:
        window.refuse(f"unknown value type {kind}")
    value: int | float | bool = window.number(SCALARS[kind][1])
    return value


def _read_array(window: _Window, kind: int, count: int) -> Value:
    if kind == STRING:
        window.skip_strings(count)
        return Skipped("string", count)
    if kind not in SCALARS:
        window.refuse("an array of arrays" if kind == ARRAY else f"unknown array type {kind}")
    name, layout = SCALARS[kind]
    if count > MAX_ARRAY:
        window.skip(count * layout.size)
        return Skipped(name, count)
    code = layout.format.removeprefix("<")
    return struct.unpack(f"<{count}{code}", window.take(count * layout.size))


def _read_tensors(window: _Window, n_tensors: int, alignment: int) -> tuple[dict[str, int], int]:
    """Elements by type, and where the data starts. As llama.cpp wants it, tensors lie end to end."""
    names: set[str] = set()
    elements: dict[str, int] = {}
    expected = end = 0
    for _ in range(n_tensors):
        name = window.text(MAX_TENSOR_NAME, "a tensor's name")
        if name in names:
            window.refuse(f"duplicate tensor {name!r}")
        names.add(name)
        n_dims = window.number(U32)
        if n_dims > MAX_DIMS:
            window.refuse(f"tensor {name!r} has {n_dims} dimensions, the most is {MAX_DIMS}")
        shape = SHAPES[n_dims].unpack(window.take(8 * n_dims))
        kind, offset = TENSOR_TAIL.unpack(window.take(TENSOR_TAIL.size))
        type_name, count, size = _tensor_size(window, name, shape, kind)
        if offset != expected:
            window.refuse(f"tensor {name!r} is at offset {offset}, where {expected} was expected")
        elements[type_name] = elements.get(type_name, 0) + count
        end = offset + size
        expected = _padded(end, alignment)
    data_offset = _padded(window.position, alignment)
    if n_tensors and data_offset + end > window.size:
        window.refuse(f"its tensors end at byte {data_offset + end:,}, the file at {window.size:,}")
    return elements, data_offset


def _tensor_size(window: _Window, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int, int]:
    """The type's name, the number of elements, and the bytes that they take."""
    if kind not in TENSOR_TYPES:
        window.refuse(f"tensor {name!r} has the unknown type {kind}")
    type_name, block_elements, block_bytes = TENSOR_TYPES[kind]
    count = 1
    for dimension in shape:
        count *= dimension
        if dimension < 0 or count > MAX_ELEMENTS:
            window.refuse(f"tensor {name!r} has the impossible shape {shape}")
    if (shape[0] if shape else 1) % block_elements:
        window.refuse(f"tensor {name!r} has rows that are no whole blocks of {type_name}")
    return type_name, count, count // block_elements * block_bytes


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Window:
    """A file's bytes in order, through one chunk in memory; refuses to pass the file's or header's end."""

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self.size = size
        self._descriptor = descriptor
        self._path = path
        self._chunk = b""
        self._start = 0  # where in the file the chunk starts
        self._at = 0  # how far in the chunk we are
        self._strings_left = MAX_STRINGS

    @property
    def position(self) -> int:
        """Offset in the file of the next byte."""
        return self._start + self._at

    def refuse(self, why: str) -> NoReturn:
        """Raises the BadDataError that names the file."""
        raise BadDataError(f"{self._path}: not a usable GGUF file: {why}; get it again from its source")

    def take(self, n: int) -> bytes:
        """The next `n` bytes."""
        if self._at + n > len(self._chunk):
            self._fill(n)
        taken = self._chunk[self._at : self._at + n]
        self._at += n
        return taken

    def skip(self, n: int) -> None:
        """Passes over `n` bytes without reading them."""
        self._check(n)
        self._at += n

    def number(self, layout: struct.Struct) -> int:
        """The next number; `layout` may also be of a float or bool."""
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def length(self, what: str) -> int:
        """A length in bytes that fits into what is left."""
        n = self.number(U64)
        if n > self.size - self.position:
            self.refuse(f"{what} of {n:,} bytes, past the file's end")
        return n

    def text(self, limit: int, what: str) -> str:
        """A name of at most `limit` bytes."""
        n = self.length(what)
        if n > limit:
            self.refuse(f"{what} of {n:,} bytes, the most is {limit:,}")
        try:
            return self.take(n).decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} that is not UTF-8")

    def skip_strings(self, count: int) -> None:
        """Steps over `count` strings: the hot loop, some 100 ns each for a whole vocabulary."""
        if count * 8 > self.size - self.position:
            self.refuse(f"an array of {count:,} strings, past the file's end")
        self._strings_left -= count
        if self._strings_left < 0:
            self.refuse(f"more than {MAX_STRINGS:,} strings in arrays")
        unpack = U64.unpack_from
        while count:
            self._fill(8)
            chunk, at, last = self._chunk, self._at, len(self._chunk) - 8
            while count and at <= last:
                at += 8 + unpack(chunk, at)[0]
                count -= 1
            self._at = at  # perhaps past the chunk: the next fill checks it and reads from there
        self._check(0)

    def _fill(self, n: int) -> None:
        """Makes sure that the chunk holds the next `n` bytes."""
        self._check(n)
        if self._at + n <= len(self._chunk):
            return
        self._start, self._at = self.position, 0
        self._chunk = os.pread(self._descriptor, max(n, CHUNK), self._start)
        if len(self._chunk) < n:
            self.refuse("it became shorter while it was read")

    def _check(self, n: int) -> None:
        if self.position + n > self.size:
            self.refuse(f"its header is cut off: the file ends at byte {self.size:,}")
        if self.position + n > MAX_HEADER:
            self.refuse(f"its header is larger than {MAX_HEADER:,} bytes")
