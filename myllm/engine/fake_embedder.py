"""The fake engine's vectors: exact ones from a text's tokens, at a set pace, with faults on order.

Implements Embedder. Must not know requests, sockets or llama.cpp.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from myllm.errors import InternalError, MyllmError


class FakeEmbedder:
    """Makes vectors of `dimensions` numbers that depend on a window's text alone, each after its pace."""

    n_sequences = 16
    n_ahead = 1

    def __init__(
        self,
        n_tokens: int,
        dimensions: int,
        ms_per_token: float,
        decode: Callable[[Sequence[int]], str],
        strike: Callable[[int], None],
    ) -> None:
        """`strike` is told before every vector how many there were, and lets happen what is scripted."""
        self.n_tokens = n_tokens
        self._dimensions = dimensions
        self._ms_per_token = ms_per_token
        self._decode = decode
        self._strike = strike
        self._n_vectors = 0
        self._begun: dict[int, Sequence[Sequence[int]]] = {}

    def start(self, batches: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Only notes them: all the work is `result`'s."""
        self._begun.update(batches)

    def result(self) -> tuple[int, NDArray[np.float32] | MyllmError]:
        """The oldest batch's `(len(windows), dimensions)` vectors, or a scripted InternalError."""
        number = next(iter(self._begun))
        windows = self._begun.pop(number)
        try:
            return number, np.stack([self._vector(tokens) for tokens in windows])
        except InternalError as error:
            return number, error

    def _vector(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        try:
            self._strike(self._n_vectors)
        except RuntimeError as error:
            raise InternalError(f"fake engine: {error}") from error
        finally:
            self._n_vectors += 1
        if pause_ms := self._ms_per_token * len(tokens):
            time.sleep(pause_ms / 1000)
        digest = hashlib.shake_256(self._decode(tokens).encode()).digest(self._dimensions)
        return np.frombuffer(digest, np.uint8).astype(np.float32) - 127.5

    def close(self) -> None:
        """Nothing to free."""
