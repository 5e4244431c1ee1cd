"""A scripted runner: exact answers at a set pace, faults on order, and a KV cache that checks its use.

What it says is in a file, see fake_script.py. Under the real loop and scheduler it gives engine, daemon and
CLI tests answers in milliseconds. Must not know the lives of requests, sockets, templates or llama.cpp.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import orjson
from numpy.typing import NDArray

from myllm.engine.device import Device
from myllm.engine.fake_embedder import FakeEmbedder
from myllm.engine.fake_script import Script
from myllm.engine.kv_cache import Copy, Remove
from myllm.engine.kv_layout import POOL, Layout, Pool, round_up
from myllm.engine.runner import Sampled
from myllm.engine.sequence import Chunk
from myllm.engine.sizing import SLOTS
from myllm.errors import BadDataError, InternalError
from myllm.protocol import Message
from myllm.requests import GenRequest, LoadOptions

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""Control tokens; a token's id is its place here."""
PIECE = re.compile(r"\s?[^\s<]{1,16}|\s?<|\s")
"""A word with the space before it is one token; long ones break up, and `<` stands alone."""
STEP_TOKENS = 512
"""Prompt tokens of a step at most, beside all rows."""


class WordTokenizer:
    """Words as tokens, by ids that are the same in every process. Implements Vocabulary."""

    special_tokens: Sequence[str] = SPECIAL
    bos, eos = 1, 2
    bos_text, eos_text = SPECIAL[bos], SPECIAL[eos]
    max_piece_bytes = 4 * 17
    closing: int | None = None

    def __init__(self, *, add_bos: bool = False) -> None:
        self.add_bos = add_bos
        self._pieces: dict[int, str] = dict(enumerate(SPECIAL))
        self._ids: dict[str, int] = {}
        self._lock = threading.Lock()
        self._specials = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")

    def encode(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            if not special:
                return self._words(text)
            tokens: list[int] = []
            for index, part in enumerate(self._specials.split(text)):
                tokens += [SPECIAL.index(part)] if index % 2 else self._words(part)
            return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._pieces[token] for token in tokens)

    def piece(self, token: int) -> bytes:
        return self._pieces[token].encode("utf-8", "replace") if token >= len(SPECIAL) else b""

    def is_end(self, token: int) -> bool:
        return token == self.eos

    def whole(self, pieces: Sequence[str]) -> list[int]:
        """One token for each piece, whatever is in it."""
        with self._lock:
            return [self._id(piece) for piece in pieces]

    def _words(self, text: str) -> list[int]:
        return [self._id(piece) for piece in PIECE.findall(text)]

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            token = len(SPECIAL) + crc32(piece.encode("utf-8", "replace")) % 2**30
            while token in self._pieces:
                token += 1
            self._ids[piece], self._pieces[token] = token, piece
        return self._ids[piece]


@dataclass(slots=True)
class Answer:
    """What one request will be told: tokens in order, then the end, or all over again if it is `endless`."""

    number: int
    tokens: list[int]
    endless: bool
    said: int = 0

    def next(self) -> int:
        self.said += 1
        if self.said <= len(self.tokens):
            return self.tokens[self.said - 1]
        return self.tokens[(self.said - 1) % len(self.tokens)] if self.endless else WordTokenizer.eos


class FakeRunner:
    """Runs a Script. Implements Runner; no compute, so that any number of rows is as fast as one."""

    writes = normalizes = True

    def __init__(self, script: Script, options: LoadOptions) -> None:
        self.tokenizer = WordTokenizer(add_bos=script.add_bos)
        self.window = self.embed_window = min(options.context or script.window, script.window)
        rows = options.parallel or script.parallel
        tokens = STEP_TOKENS + rows
        self.device = Device(0, rows, rows, step_tokens=tokens, mixed_tokens=tokens, embed_tokens=16)
        self.layout: Layout = Pool(round_up(max(self.window, POOL)), rows, SLOTS + rows, self.device)
        self._script, self._threads = script, options.threads or 1
        self._tokens = None if script.tokens is None else self.tokenizer.whole(script.tokens)
        self._ballast = b"\1" * script.memory_bytes
        self._n_requests = 0
        self._answers: dict[int, Answer] = {}
        self._held: dict[int, list[int]] = {}
        """What is in the KV cache, by slot."""
        self._ms = 0.0
        """How long the batch takes."""
        self._due: list[int] = []
        """The requests of its rows to sample."""

    @classmethod
    def load(cls, path: Path, options: LoadOptions, progress: Callable[[float], None]) -> FakeRunner:
        """Reads the script and takes `load_ms` over it. Raises BadDataError, NotFoundError."""
        script = Script.read(path)
        for tenth in range(10):
            progress(tenth / 10)
            if script.load_ms:
                time.sleep(script.load_ms / 10_000)
        if script.fault and script.fault.at == "load":
            if script.fault.kind == "error":
                raise BadDataError(f"{path}: the script says that it cannot be loaded")
            script.fault.strike()
        progress(1.0)
        return cls(script, options)

    def facts(self) -> Message:
        return {"threads": self._threads, "device": "cpu", "gpu_layers": 0}

    def begin(self, request_id: int, request: GenRequest, prompt: list[int], seed: int) -> None:
        self._n_requests += 1
        tokens = self._tokens
        if tokens is None:
            tokens = [token for token in prompt if token >= len(SPECIAL)]
        self._answers[request_id] = Answer(self._n_requests, tokens, request.ignore_eos and bool(tokens))

    def end(self, request_id: int) -> None:
        self._answers.pop(request_id, None)

    # ── the KV cache ────────────────────────────────────────────────────────────────────────

    def grow(self, layout: Layout, n_cells: int, kept: Sequence[int]) -> list[int]:
        self._held = {slot: self._held[slot] for slot in kept}
        if sum(map(len, self._held.values())) > n_cells:
            raise ValueError("what was kept does not fit")
        return []

    def drop(self) -> None:
        self._held = {}

    def apply(self, operation: Remove | Copy) -> None:
        if isinstance(operation, Remove):
            del self._held.get(operation.slot, [])[operation.start :]
        else:
            self._held[operation.target] = self._held[operation.source][: operation.length]

    kv_format = "fake"

    def read(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """Positions and words, as the numbers of tokens differ between two loads."""
        held = self._held[slot][start:end]
        words = [self.tokenizer.decode([token]) for token in held]
        return np.frombuffer(orjson.dumps([start, words]), np.uint8)

    def write(self, slot: int, start: int, end: int, state: NDArray[np.uint8]) -> bool:
        first, words = orjson.loads(state.tobytes())
        held = self._held.setdefault(slot, [])
        if len(held) != start or not first <= start <= end <= first + len(words):
            return False
        held += self.tokenizer.whole(words[start - first : end - first])
        return True

    # ── a batch ─────────────────────────────────────────────────────────────────────────────

    def fill(self, chunks: Sequence[Chunk]) -> None:
        if sum(chunk.size for chunk in chunks) > self.device.step_tokens:
            raise ValueError("more tokens than a step may have")
        for sequence, start, end, _ in chunks:
            held = self._held.setdefault(sequence.slot.id, []) if sequence.slot else []
            if len(held) != start:
                raise ValueError(f"the cache holds {len(held)} tokens of the sequence, not {start}")
            held += sequence.tokens[start:end]
        self._due = [chunk.sequence.id for chunk in chunks if chunk.sample]
        n_prompt = sum(chunk.size for chunk in chunks if chunk.size > 1)
        self._ms = n_prompt * self._script.prompt_ms_per_token + bool(self._due) * self._script.ms_per_token

    def decode(self) -> int:
        """Takes the time of a step: that of its prompt tokens, and of one token if any row gets one."""
        if self._ms:
            time.sleep(self._ms / 1000)
        return 0

    def sample(self, row: int, top: int | None) -> Sampled:
        answer = self._answers[self._due[row]]
        self._strike(answer)
        token = answer.next()
        return Sampled(token, 0.0, [(token, 0.0)][:top])

    def open_embedder(self, window: int) -> FakeEmbedder:
        script, decode = self._script, self.tokenizer.decode
        pace = script.prompt_ms_per_token
        return FakeEmbedder(self.window, script.dimensions, pace, decode, self._strike_vector)

    def close(self) -> None:
        """Nothing to free."""

    # ── faults ──────────────────────────────────────────────────────────────────────────────

    def _strike_vector(self, n_vectors: int) -> None:
        fault = self._script.fault
        if fault and fault.at == "vector" and n_vectors == fault.after_tokens:
            fault.strike()

    def _strike(self, answer: Answer) -> None:
        fault = self._script.fault
        if fault is None or fault.at != "token" or fault.request not in (None, answer.number):
            return
        if answer.said == fault.after_tokens:
            try:
                fault.strike()
            except RuntimeError as error:
                raise InternalError(f"fake engine: {error}") from error
