"""`embed --similar-to`: the k nearest of what is read, exactly, in memory bounded by k and a block.

Owns the top k and what a stored vector looks like. Must not know how a text becomes a vector: it is
given a function for that.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import Any, Final

import orjson

from myllm.cli.console import Streams
from myllm.cli.documents import Input, first_line
from myllm.cli.input_records import Line, loads, record_lines
from myllm.errors import BadDataError, MyllmError

BLOCK: Final = 2048
"""Vectors compared at once: 3 MiB of 384 numbers each."""

EmbedInputs = Callable[[list[Input], Callable[[dict[str, Any]], bytes]], int]
"""Embeds all texts of inputs and gives each record to a function; returns how many failed."""


class Nearest:
    """The k best of all vectors offered, by cosine; an earlier one wins a tie."""

    def __init__(self, query: Any, k: int) -> None:
        self._query = query
        self._k = k
        self._best: list[tuple[float, int, bytes]] = []
        self._block: list[tuple[Any, bytes]] = []
        self._n_seen = 0

    def offer(self, vector: Any, line: bytes) -> None:
        """Takes one vector, shape (dimensions,), and what is kept of it. Raises BadDataError."""
        if len(vector) != len(self._query):
            raise BadDataError(
                f"embedding: {len(vector)} numbers, and the text's has {len(self._query)}; use the same model"
            )
        self._block.append((vector, line))
        if len(self._block) >= BLOCK:
            self._compare()

    def best(self) -> list[tuple[float, bytes]]:
        """Score and line, best first."""
        self._compare()
        return [(score, line) for score, _, line in self._best]

    def _compare(self) -> None:
        if not self._block:
            return
        import numpy as np

        matrix = np.asarray([vector for vector, _ in self._block], dtype=np.float32)
        norms = np.linalg.norm(matrix, axis=1)
        scores = (matrix @ self._query) / np.where(norms > 0, norms, 1)
        for at in np.argsort(-scores, kind="stable")[: self._k].tolist():
            self._best.append((float(scores[at]), self._n_seen + at, self._block[at][1]))
        self._best.sort(key=lambda entry: (-entry[0], entry[1]))
        del self._best[self._k :]
        self._n_seen += len(self._block)
        self._block = []


def run_similar(
    streams: Streams, query: list[str], embed_inputs: EmbedInputs, inputs: list[Input], values: dict[str, Any]
) -> int:
    """Writes the records nearest to the text whose windows' vectors are `query`; returns the exit status.

    The first line of all says whether the inputs hold texts or vectors. Raises what let nothing be compared.
    """
    import numpy as np

    from myllm.cli.vectors import cut, floats

    dimensions = values["dimensions"]

    def shaped(vector: Any) -> Any:
        return vector if dimensions is None else cut(vector, dimensions)

    wanted = shaped(floats(_only(query)))
    nearest = Nearest(wanted / np.float32(np.linalg.norm(wanted) or 1), values["nearest"])
    chunks, first = first_line(iter(inputs[0].chunks))
    inputs = [inputs[0]._replace(chunks=chunks), *inputs[1:]]
    if _holds_vector(first):
        n_failed = _compare_stored(streams, inputs, lambda vector, line: nearest.offer(shaped(vector), line))
    else:

        def record(event: dict[str, Any]) -> bytes:
            if "embedding" not in event:
                return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
            nearest.offer(shaped(floats(event.pop("embedding"))), orjson.dumps(event))
            return b""

        n_failed = embed_inputs(inputs, record)
    for score, kept in nearest.best():
        streams.write(orjson.dumps(orjson.loads(kept) | {"score": round(score, 6)}) + b"\n")
    if n_failed:
        streams.note(f"{n_failed:,} records could not be compared; each says why in its error")
    return 1 if n_failed else 0


def _only(query: list[str]) -> str:
    if not query:
        raise BadDataError("--similar-to: no vector came back")
    if len(query) > 1:
        raise BadDataError(
            "--similar-to: the text is longer than the window; shorten it, or give --pool mean"
        )
    return query[0]


def _compare_stored(streams: Streams, inputs: Iterable[Input], offer: Callable[[Any, bytes], None]) -> int:
    """Offers the vector of every record, which keeps its own `path`; returns how many had none of use."""
    n_failed = 0
    lines = ((own, line) for _, own, chunks, _ in inputs for line in record_lines(chunks))
    for index, (own, line) in enumerate(lines):
        try:
            record = loads(line.data)
            vector = _vector(record)
            del record["embedding"]
            offer(vector, orjson.dumps(own | record))
        except MyllmError as error:
            n_failed += 1
            said = {"index": index, **own, "done": True, "error": error.to_wire()}
            streams.write(orjson.dumps(said) + b"\n")
    return n_failed


def _holds_vector(line: Line) -> bool:
    try:
        return "embedding" in loads(line.data)
    except BadDataError:
        return False


def _vector(record: dict[str, Any]) -> Any:
    """The stored vector of a record: numbers, or base64 (or hex) of float32. Raises BadDataError."""
    import numpy as np

    try:
        value = record["embedding"]
        if isinstance(value, list):
            return np.asarray(value, dtype=np.float32)
        n = record.get("dimensions")
        if isinstance(n, int) and len(value) == 8 * n:
            return np.frombuffer(binascii.unhexlify(value), "<f4")
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadDataError(f"embedding: expected a list of numbers, or base64 of float32: {error}") from error
