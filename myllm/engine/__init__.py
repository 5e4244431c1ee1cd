"""What a worker asks of an engine, and which runner a file needs.

tests/engine/test_contract.py holds what is promised here, with each runner. Must not know sockets,
processes or templates. Imports no engine until one is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from myllm.protocol import Message
from myllm.requests import Arrival, EmbedRequest, GenRequest, LoadOptions
from myllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from myllm.engine.runner import Runner

Emit = Callable[[list[Message]], None]
"""Takes the events of one step at once, each with its arrival's `id`; called from the engine's thread."""

Progress = Callable[[float], None]
"""Takes the part of a load that is done, 0 to 1."""


class TextWindow(NamedTuple):
    """A window of a text: `start` and `end` in characters, `tokens` as the model takes them, not empty."""

    start: int
    end: int
    tokens: list[int]


class Kept(NamedTuple):
    """A folder for keys and values to use again, and how much it may hold, those of other models too."""

    folder: Path
    max_bytes: int
    fingerprint: str
    """The model's."""


class Engine(Protocol):
    """One loaded model that runs many requests at once, on a thread of its own."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def window(self) -> int:
        """The most tokens one sequence may have, prompt and answer together."""

    @property
    def embed_window(self) -> int:
        """The most tokens of a text that one vector can stand for."""

    def submit(
        self,
        request: GenRequest,
        prompt: list[int],
        arrival: Arrival,
        *,
        dropped_tokens: int = 0,
        dropped_messages: int = 0,
        in_reasoning: bool = False,
    ) -> None:
        """Takes in a request with its tokens, `dropped_tokens` fewer than were asked, or without so many of
        its messages. Thread-safe, returns at once.

        Its events, up to exactly one done event, come through the `Emit` the engine was opened with, each
        with the arrival's `id`. Deadline and timings count from the arrival. `in_reasoning` says that the
        prompt ends within a reasoning, so that what follows belongs to it.
        """

    def embed(self, request: EmbedRequest, texts: list[list[TextWindow]], arrival: Arrival) -> None:
        """Takes in texts as windows of tokens, the model's own tokens included; an empty list of windows is
        a text answered already. Thread-safe, returns at once; its events come as a generation's do.
        """

    def cancel(self, request_id: int) -> None:
        """Ends a request with finish reason `cancelled`; an unknown id is ignored. Thread-safe."""

    def pause(self, request_id: int, paused: bool) -> None:
        """Stops a request at the next step, or lets it go on from where it was; an unknown id is ignored.

        A paused one costs the others nothing, can be cancelled, and its deadline runs on. Thread-safe.
        """

    def status(self) -> dict[str, Any]:
        """Counters and settings worth showing, as JSON values. Thread-safe.

        Of every engine: `busy`, `waiting` and `paused` requests, `cached` idle sequences with tokens to
        reuse, `tokens_per_second` generated lately, `kv_hit_rate` (prompt tokens found in the cache, 0 to
        1), `context` (tokens there is room for now), `window`, `threads`, `gpu_layers` (-1: all).
        """

    def settle(self, seconds: float) -> None:
        """Waits, at most about so long, until what has ended is kept; not where a request still runs.
        Thread-safe."""

    def close(self) -> None:
        """Ends the engine's thread and frees the model; blocks until that is done."""


def open_engine(
    path: Path,
    options: LoadOptions,
    emit: Emit,
    progress: Progress,
    recommended: Mapping[str, float] = MappingProxyType({}),
    kept: Kept | None = None,
) -> Engine:
    """Loads the model at `path`; blocks for as long as that takes.

    `recommended` are the sampling parameters that the model's file asks for, by their wire names; `kept` says
    where what was computed is kept on disk, None that it is not.
    Raises BadDataError for a file that is no model or a broken one, UsageError for options it
    cannot have, UnavailableError where there is too little memory.
    """
    if is_fake(path):
        from myllm.engine.fake import FakeRunner

        return _open(FakeRunner.load(path, options, progress), emit, kept)
    from myllm.engine import llama

    llama.start()
    gpu_layers = -1 if options.gpu_layers is None else options.gpu_layers
    model = llama.Model(path, gpu_layers=gpu_layers, progress=progress)
    # With numpy, imported while the model loads (see worker/main.py).
    from myllm.engine.llama_runner import LlamaRunner

    return _open(LlamaRunner(model, options, recommended), emit, kept)


def _open(runner: Runner, emit: Emit, kept: Kept | None) -> Engine:
    from myllm.engine.engine import BatchingEngine

    if kept is None or runner.kv_format is None:
        return BatchingEngine(runner, emit)
    from myllm.engine.snapshot import Archive

    identity = f"{kept.fingerprint} {runner.kv_format}"
    return BatchingEngine(runner, emit, archive=Archive(kept.folder, identity, kept.max_bytes))


def is_fake(path: Path) -> bool:
    """Whether the file is a script for the fake runner, by its name."""
    return path.name.endswith(".fake.json")
