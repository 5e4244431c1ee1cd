"""Vectors as output: base64 on the wire → JSON records, hex or one npy file.

Owns formats and the cut to fewer dimensions. Must not know requests or where a text came from. numpy is
imported when the first vector comes.
"""

from __future__ import annotations

import base64
import binascii
import os
from contextlib import suppress
from typing import Any, Final, Protocol

import orjson

from myllm.errors import BadDataError, IOFailureError, UsageError

FORMATS: Final = ("json", "base64", "hex", "npy")
_RECORD: Final = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
_HEADER_BYTES: Final = 128
"""Of an npy file, magic included: a multiple of 64, with room for any number of rows."""


def floats(encoded: str) -> Any:
    """The float32 vector, shape (dimensions,), behind base64. Raises BadDataError."""
    import numpy as np

    try:
        return np.frombuffer(base64.b64decode(encoded, validate=True), "<f4")
    except (binascii.Error, ValueError) as error:
        raise BadDataError(f"embedding: not base64 of float32: {error}") from error


def cut(vector: Any, dimensions: int) -> Any:
    """The first `dimensions` numbers, normalised again. Raises UsageError where there are fewer."""
    import numpy as np

    if dimensions > len(vector):
        raise UsageError(f"--dimensions {dimensions}: the model's vectors have {len(vector)}")
    part = vector[:dimensions]
    norm = float(np.sqrt(np.dot(part, part)))
    return part / np.float32(norm) if norm else part


class Writer(Protocol):
    """Turns records, whose `embedding` is base64, into what goes to stdout."""

    def record(self, record: dict[str, Any]) -> bytes: ...

    def in_order(self, lines: bytes) -> bytes: ...

    def close(self) -> None: ...


class JsonWriter:
    """One line a record, its vector in the chosen notation."""

    def __init__(self, notation: str, dimensions: int | None) -> None:
        self._notation = notation
        self._dimensions = dimensions

    def record(self, record: dict[str, Any]) -> bytes:
        """The line of a record, or of an error."""
        if "embedding" not in record:
            return orjson.dumps(record, option=_RECORD)
        if self._notation == "base64" and self._dimensions is None:
            size = len(record["embedding"])
            record["dimensions"] = (size // 4 * 3 - record["embedding"][-2:].count("=")) // 4
            return orjson.dumps(record, option=_RECORD)
        vector = floats(record["embedding"])
        if self._dimensions is not None:
            vector = cut(vector, self._dimensions)
        record["dimensions"] = len(vector)
        if self._notation == "json":
            record["embedding"] = vector
        else:
            raw = vector.astype("<f4").tobytes()
            record["embedding"] = raw.hex() if self._notation == "hex" else base64.b64encode(raw).decode()
        return orjson.dumps(record, option=_RECORD)

    def in_order(self, lines: bytes) -> bytes:
        """What goes to stdout of records whose turn it is."""
        return lines

    def close(self) -> None:
        """Nothing is held."""


class NpyWriter:
    """A float32 matrix, a row a vector, streamed to a file; the records without vectors are the lines.

    The header is written last, since it holds the number of rows: a run that is cut off leaves a file
    that says it has none.
    """

    def __init__(self, path: str, dimensions: int | None) -> None:
        self._path = path
        self._cut = dimensions
        self._rows = self._dimensions = 0
        try:
            self._file = open(path, "wb")  # noqa: SIM115 — closed by close()
            self._write(self._header())
        except OSError as error:
            raise self._failure(error) from error

    def record(self, record: dict[str, Any]) -> bytes:
        """The line of a record with its vector, to be taken apart when its turn comes."""
        return orjson.dumps(record, option=_RECORD)

    def in_order(self, lines: bytes) -> bytes:
        """Appends the vectors of records whose turn it is; the rest of each, with its `row`, is its line."""
        return b"".join(self._take(orjson.loads(line)) for line in lines.splitlines())

    def _take(self, record: dict[str, Any]) -> bytes:
        if "embedding" in record:
            vector = floats(record.pop("embedding"))
            if self._cut is not None:
                vector = cut(vector, self._cut)
            if self._rows and len(vector) != self._dimensions:
                raise BadDataError(f"{self._path}: a vector of {len(vector)} among {self._dimensions}")
            self._dimensions = len(vector)
            record |= {"dimensions": len(vector), "row": self._rows}
            self._rows += 1
            self._write(vector.astype("<f4").tobytes())
        return orjson.dumps(record, option=_RECORD)

    def close(self) -> None:
        """Says how many rows there are. Raises IOFailureError."""
        try:
            self._file.seek(0)
            self._file.write(self._header())
            self._file.close()
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            raise self._failure(error) from error

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failure(error) from error

    def _header(self) -> bytes:
        """The header of npy version 1.0 (numpy.lib.format), padded to a fixed size."""
        shape = f"({self._rows}, {self._dimensions})"
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        room = _HEADER_BYTES - 10
        return (
            b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("latin-1") + b"\n"
        )

    def _failure(self, error: OSError) -> IOFailureError:
        return IOFailureError(f"{self._path}: cannot be written: {error.strerror}; it is not complete")


def writer(notation: str, out: str | None, dimensions: int | None) -> Writer:
    """The writer for `--format`. Raises UsageError, IOFailureError."""
    if (out is not None) != (notation == "npy"):
        raise UsageError("--out FILE: it goes with --format npy, and npy needs it; stdout gets the records")
    return JsonWriter(notation, dimensions) if out is None else NpyWriter(os.fspath(out), dimensions)
