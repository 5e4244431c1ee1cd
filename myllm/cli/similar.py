"""`embed --similar-to`: the k nearest of what is read, exactly, in memory bounded by k and a block.

Owns the top k and what a stored vector looks like. Must not know how a text becomes a vector: it is
given a function for that.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import orjson

from myllm.cli.console import Streams
from myllm.cli.documents import Text, first_line, texts
from myllm.cli.records import Line, loads, record_lines
from myllm.errors import BadDataError, MyllmError

BLOCK: Final = 2048
"""Vectors compared at once: 3 MiB of 384 numbers each."""

Source = Callable[[Callable[[], None]], Iterator[Text]]
EmbedTexts = Callable[[Source, Callable[[dict[str, Any]], bytes]], Any]


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
    streams: Streams, embed_texts: EmbedTexts, chunks: Iterable[bytes], values: dict[str, Any]
) -> int:
    """Writes the nearest records; returns the exit status. Raises what let nothing be compared."""
    import numpy as np

    from myllm.cli.vectors import cut, floats

    dimensions = values["dimensions"]

    def shaped(vector: Any) -> Any:
        return vector if dimensions is None else cut(vector, dimensions)

    query = shaped(_query(embed_texts, values["similar_to"]))
    nearest = Nearest(query / np.float32(np.linalg.norm(query) or 1), values["nearest"])
    chunks, first = first_line(iter(chunks))
    if not _holds_vector(first):

        def record(event: dict[str, Any]) -> bytes:
            if "embedding" not in event:
                return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
            nearest.offer(shaped(floats(event.pop("embedding"))), orjson.dumps(event))
            return b""

        mode, field = values["input_mode"], values["field"]
        n_failed = embed_texts(lambda idle: texts(chunks, mode, field, "input", idle), record).n_failed
    else:
        n_failed = 0
        for index, line in enumerate(record_lines(chunks)):
            try:
                vector = _vector(line, floats)
                nearest.offer(shaped(vector), line.data)
            except MyllmError as error:
                n_failed += 1
                streams.write(orjson.dumps({"index": index, "done": True, "error": error.to_wire()}) + b"\n")
    for score, kept in nearest.best():
        own = orjson.loads(kept)
        own.pop("embedding", None)
        streams.write(orjson.dumps(own | {"score": round(score, 6)}) + b"\n")
    if n_failed:
        streams.note(f"{n_failed:,} records could not be compared; each says why in its error")
    return 1 if n_failed else 0


def _query(embed_texts: EmbedTexts, text: str) -> Any:
    """The vector of the text that is looked for. Raises what it failed with."""
    from myllm.cli.vectors import floats

    found: list[Any] = []

    def record(event: dict[str, Any]) -> bytes:
        if "embedding" in event:
            found.append(floats(event["embedding"]))
        return b""

    run = embed_texts(lambda idle: iter([Text({}, len(text), text)]), record)
    if run.first_error or not found:
        raise run.first_error or BadDataError("--similar-to: no vector came back")
    if len(found) > 1:
        raise BadDataError(
            "--similar-to: the text is longer than the window; shorten it, or give --pool mean"
        )
    return found[0]


def _holds_vector(line: Line) -> bool:
    try:
        return "embedding" in loads(line.data)
    except BadDataError:
        return False


def _vector(line: Line, floats: Callable[[str], Any]) -> Any:
    """The stored vector of a record: numbers, or base64 (or hex) of float32. Raises BadDataError."""
    import numpy as np

    try:
        record = orjson.loads(line.data)
        value = record["embedding"]
        if isinstance(value, list):
            return np.asarray(value, dtype=np.float32)
        n = record.get("dimensions")
        if isinstance(n, int) and len(value) == 8 * n:
            return np.frombuffer(binascii.unhexlify(value), "<f4")
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadDataError(f"embedding: expected a list of numbers, or base64 of float32: {error}") from error
