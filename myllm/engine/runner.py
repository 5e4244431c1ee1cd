"""The seam between the engine's loop and what runs a model: one KV cache, one batch at a time.

`llama_runner.py` is llama.cpp behind it, `fake.py` a script. Everything but the tokenizer is used by the
engine's thread alone. Must not know the lives of requests, scheduling, events or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from myllm.engine.device import Device
from myllm.engine.kv_cache import Copy, Remove
from myllm.engine.kv_layout import Layout
from myllm.engine.sequence import Chunk
from myllm.errors import MyllmError
from myllm.protocol import Message
from myllm.requests import GenRequest
from myllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Vocabulary(Tokenizer, Protocol):
    """A tokenizer that also knows single tokens of an answer."""

    def piece(self, token: int) -> bytes:
        """The bytes of one token, perhaps part of a character; empty for control tokens."""

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation."""


class Sampled(NamedTuple):
    """A row's next token and, where asked for, its log-probability and the likeliest ones, best first."""

    token: int
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()


class Embedder(Protocol):
    """What makes vectors of windows."""

    n_tokens: int
    """Tokens of a batch at most, and so of a window."""
    n_sequences: int
    """Windows of a batch at most."""
    n_ahead: int
    """Batches that are to be begun before one is waited for."""

    def start(self, batches: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Begins to compute batches of windows, by number; returns at once. Raises MyllmError."""

    def result(self) -> tuple[int, NDArray[np.float32] | MyllmError]:
        """The number of a batch that was begun, any of them, and its `(len(windows), dimensions)` vectors
        or what went wrong; blocks."""

    def close(self) -> None: ...


class Runner(Protocol):
    """One loaded model. A step is `apply`, `fill`, `decode`, then `sample` for each row that asks for it."""

    device: Device
    layout: Layout
    """How its KV cache is laid out to begin with."""
    window: int
    """The most tokens of one sequence."""
    embed_window: int
    """The most tokens that one vector can stand for."""
    writes: bool
    """Whether it can generate; an encoder only makes vectors."""
    normalizes: bool
    """Whether its vectors are to have norm 1."""

    @property
    def tokenizer(self) -> Vocabulary: ...

    def facts(self) -> Message:
        """`threads`, `device` and `gpu_layers`, for a status. Thread-safe."""

    def begin(self, request_id: int, request: GenRequest, prompt: list[int], seed: int) -> None:
        """Readies what samples a request's tokens. Raises UsageError and BadDataError for what cannot be."""

    def end(self, request_id: int) -> None:
        """Lets go of what `begin` made; an unknown id is ignored."""

    def grow(self, layout: Layout, n_cells: int, kept: Sequence[int]) -> list[int]:
        """A KV cache of `n_cells`, laid out like this, in place of the present one, which need not be there.

        The slots in `kept` keep what they hold, all others are empty. Returns those of `kept` that could
        not be moved. Blocks; raises UnavailableError where the memory cannot be had.
        """

    def drop(self) -> None:
        """Frees the KV cache, until `grow`."""

    def apply(self, operation: Remove | Copy) -> None:
        """Brings the KV cache in line with the scheduler's books."""

    @property
    def kv_format(self) -> str | None:
        """All but the model that `read`'s bytes depend on; None where a sequence's memory cannot be cut."""

    def read(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """The keys and values of a slot's positions `start` to `end`, as bytes."""

    def write(self, slot: int, start: int, end: int, state: NDArray[np.uint8]) -> bool:
        """Appends the keys and values of the positions `start` to `end` to a slot, out of bytes that `read`
        gave, of these or more. False where they are not taken; the slot cannot be trusted then."""

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """The next batch, within `device.step_tokens`."""

    def decode(self) -> int:
        """Runs the batch: 0 is success, 1 no cells, below 0 an error, said on stderr, after which the cache
        of its sequences cannot be trusted. Blocks for as long as it takes."""

    def sample(self, row: int, top: int | None) -> Sampled:
        """The next token of the `row`-th chunk that asked for one, with log-probabilities where `top` is
        not None. Called once a row, in order. A MyllmError is this request's own."""

    def open_embedder(self, window: int) -> Embedder:
        """An embedder for windows of so many tokens, to be closed before this. Raises MyllmError."""

    def close(self) -> None:
        """Frees all of it."""
