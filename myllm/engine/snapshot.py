"""Keys and values on disk: what was computed once is read back by any request that begins with the tokens.

Owns the files: blocks of up to `BLOCK` tokens of a sequence, each named by what comes before it and by what
it ends, so that sequences with one beginning keep that once. Must not know llama.cpp, slots or scheduling:
what is in a block's payload is the runner's. Used by several threads and processes at once: a file appears
whole, never changes, and may vanish any time. What is broken, cut off or another model's is no block.
"""

from __future__ import annotations

import os
import queue
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import count, pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from myllm import paths
from myllm.engine.kv_cache import common_prefix
from myllm.errors import MyllmError
from myllm.snapshot_files import Named, parsed

BLOCK: Final = 256
"""Tokens of a block at most: a step of the disk's work, and about what a turn of a conversation adds."""
SHORTEST: Final = 32
"""Tokens from which a stretch is worth a file, or worth reading out of one."""
MAGIC: Final = b"MyLLM KV 01\n"
HEADER: Final = struct.Struct("<12s32sIQQ")
"""Magic, identity, number of tokens, bytes of payload, checksum of the rest: tokens as int32, the payload."""
NAME_BYTES: Final = 16
MAX_WAITING: Final = 512 * 2**20
"""Bytes that may wait to be written."""
TICK_NS: Final = 50_000_000
"""Longer than any file system's clock takes for a step: two changes within one look like one."""
PAGE: Final = 512
"""Words of 8 bytes that a checksum sums at a time."""

Payload = NDArray[np.uint8]


class Block(NamedTuple):
    """A file with keys and values of `size` positions from `start` on; the first `used` are wanted."""

    path: Path
    start: int
    size: int
    used: int


class Head(NamedTuple):
    """What a block's file says of the rest of it."""

    size: int
    n_bytes: int
    checksum: int


class Found(NamedTuple):
    """The blocks, in order, that together hold the first `length` tokens of a prompt."""

    blocks: tuple[Block, ...] = ()
    length: int = 0

    @property
    def within(self) -> str:
        """What the last block's end is called, where it is not reached."""
        last = self.blocks[-1] if self.blocks else None
        named = parsed(last.path.name) if last and last.used < last.size else None
        return named.end if named else ""


NOT_FOUND: Final = Found()


class Snapshots:
    """The blocks in `folder` that go with `identity`: all that a payload depends on beside the tokens.

    All blocks of the folder, whatever their identity, take `max_bytes` at most: what was not used for the
    longest time goes first.
    """

    def __init__(self, folder: Path, identity: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._identity = sha256(identity.encode()).digest()
        self._numbers = count()
        self._listed: dict[str, list[tuple[int, str, Path]]] = {}
        self._listed_at = 0

    def keeps(self, tokens: Sequence[int]) -> bool:
        """Whether so many are worth it."""
        return len(tokens) >= SHORTEST

    def find(self, tokens: Sequence[int]) -> Found:
        """The longest beginning of `tokens` that is there. Reads names, and heads of what fits in part."""
        if not self.keeps(tokens):
            return NOT_FOUND
        there = self._by_beginning()
        beginnings = Beginnings(self._identity, tokens)
        blocks: list[Block] = []
        at = 0
        while block := self._next(there.get(beginnings.name(at), []), beginnings, tokens, at):
            blocks.append(block)
            at += block.used
        return Found(tuple(blocks), at)

    def read(self, block: Block) -> Payload | None:
        """The payload of a block; None where it is gone or not what it should be. Blocks."""
        try:
            data = np.fromfile(block.path, np.uint8)
        except OSError:
            return None
        head = self._head(data[: HEADER.size].tobytes())
        body = data[HEADER.size :]
        if head is None or head.size != block.size or len(body) != 4 * head.size + head.n_bytes:
            return None
        if head.checksum != checksum(body):
            return None
        with suppress(OSError):
            os.utime(block.path)
        return body[4 * head.size :]

    def name(self, tokens: Sequence[int]) -> str:
        """What `tokens` are the end of, in the names of files."""
        return Beginnings(self._identity, tokens).name(len(tokens))

    def gaps(self, tokens: Sequence[int], stored: Found) -> list[tuple[int, int, str]]:
        """Stretches of `tokens` that are to be written so that all of them are there, those of `stored` being
        there: start, end, and what `write` is to know of where the start is."""
        if not self.keeps(tokens):
            return []
        edges = pairwise([*range(stored.length, len(tokens), BLOCK), len(tokens)])
        return [(start, end, stored.within if start == stored.length else "") for start, end in edges]

    def write(self, tokens: Sequence[int], start: int, payload: Payload, within: str = "") -> None:
        """Keeps the payload of the positions from `start` to the end of `tokens`; `within` is the end of the
        block that it branches off from, if any. Raises OSError.
        """
        paths.make_private(self._folder)
        beginnings = Beginnings(self._identity, tokens)
        size = len(tokens) - start
        name = str(Named(beginnings.name(start), size, beginnings.name(len(tokens)), within))
        body = np.concatenate((np.array(tokens[start:], "<i4").view(np.uint8), payload))
        head = HEADER.pack(MAGIC, self._identity, size, len(payload), checksum(body))
        partial = self._folder / f".{os.getpid()}-{next(self._numbers)}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(head)
                file.write(body.data)
            partial.rename(self._folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def evict(self) -> None:
        """Removes what was not used for the longest time until the rest is within `max_bytes`."""
        files = sorted((*_use(entry), entry.path) for entry in self._entries())
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in files:
            if excess <= 0:
                return
            with suppress(OSError):
                Path(path).unlink()
                excess -= size

    # ── looking ─────────────────────────────────────────────────────────────────────────────────

    def _next(
        self, candidates: list[tuple[int, str, Path]], beginnings: Beginnings, tokens: Sequence[int], at: int
    ) -> Block | None:
        """Of the blocks that follow on the first `at` tokens, the longest that fits whole, else in part."""
        for size, end, path in sorted(candidates, reverse=True):
            if at + size <= len(tokens) and beginnings.name(at + size) == end:
                return Block(path, at, size, size)
        parts = [(self._shared(path, size, tokens, at), size, path) for size, _, path in candidates]
        used, size, path = max(parts, default=(0, 0, Path()))
        enough = min(SHORTEST, max(len(tokens) - at, 1))  # the rest of a prompt may be shorter
        return Block(path, at, size, used) if used >= enough else None

    def _shared(self, path: Path, size: int, tokens: Sequence[int], at: int) -> int:
        """How many of a block's tokens go on as `tokens` do from `at`."""
        try:
            with path.open("rb") as file:
                head = self._head(file.read(HEADER.size))
                theirs = np.frombuffer(file.read(4 * size), "<i4")
        except (OSError, ValueError):
            return 0
        return common_prefix(theirs.tolist(), tokens[at : at + size]) if head else 0

    def _head(self, data: bytes) -> Head | None:
        """None where the file is none of ours, or goes with another identity."""
        if len(data) < HEADER.size:
            return None
        magic, identity, *rest = HEADER.unpack(data)
        return Head(*rest) if (magic, identity) == (MAGIC, self._identity) else None

    def _by_beginning(self) -> dict[str, list[tuple[int, str, Path]]]:
        """Of each beginning, by name, the blocks that follow on it: size, name of the end, file."""
        changed = self._changed()
        if changed and changed == self._listed_at:
            return self._listed
        there: dict[str, list[tuple[int, str, Path]]] = {}
        for entry in self._entries():
            if named := parsed(entry.name):
                there.setdefault(named.beginning, []).append((named.size, named.end, Path(entry.path)))
        self._listed, self._listed_at = there, changed
        return there

    def _changed(self) -> int:
        """When a file last came or went; 0 where that is not known, or too fresh to see another change."""
        try:
            changed = self._folder.stat().st_mtime_ns
        except OSError:
            return 0
        return changed if time.time_ns() - changed > TICK_NS else 0

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """What is in the folder, half-written files of others, too."""
        with suppress(OSError), os.scandir(self._folder) as entries:
            yield from entries


class Archive(Snapshots):
    """Snapshots that are written on a thread of their own, which begins with the first."""

    def __init__(self, folder: Path, identity: str, max_bytes: int) -> None:
        super().__init__(folder, identity, max_bytes)
        self._waiting: queue.Queue[tuple[Sequence[int], int, Payload, str] | None] = queue.Queue()
        self._n_bytes = 0
        self._thread: threading.Thread | None = None

    def put(self, tokens: Sequence[int], start: int, payload: Payload, within: str = "") -> None:
        """Has a payload written soon, as `write` would; not where the disk is far behind."""
        if self._n_bytes + len(payload) > MAX_WAITING:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
            self._thread.start()
        self._n_bytes += len(payload)
        self._waiting.put((tokens, start, payload, within))

    def wait(self, seconds: float) -> None:
        """Until all that was put is written, at most so long."""
        deadline = time.monotonic() + seconds
        with self._waiting.all_tasks_done:
            while self._waiting.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self._waiting.all_tasks_done.wait(left)

    def close(self) -> None:
        """Writes what was put, and ends the thread."""
        self._waiting.put(None)
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while block := self._waiting.get():
            try:
                self.write(*block)
                self.evict()
            except (OSError, MyllmError) as error:  # it only makes another request slower
                sys.stderr.write(f"snapshots: not kept: {error}\n")
            self._n_bytes -= len(block[2])
            self._waiting.task_done()


class Beginnings:
    """Names for the beginnings of one list of tokens; cheap where they are asked for in order."""

    def __init__(self, identity: bytes, tokens: Sequence[int]) -> None:
        self._identity, self._tokens = identity, np.array(tokens, "<i4")
        self._hash, self._at = sha256(identity), 0

    def name(self, length: int) -> str:
        """Names the first `length` tokens, in hexadecimal digits."""
        if length < self._at:
            self._hash, self._at = sha256(self._identity), 0
        self._hash.update(self._tokens[self._at : length].data)
        self._at = length
        return self._hash.hexdigest()[: 2 * NAME_BYTES]


def checksum(data: Payload) -> int:
    """Of any bytes, 64 bits: against damage, not against malice. As fast as memory is read, unlike zlib's.

    The words of each page are summed, and the pages' sums weighed by their place.
    """
    words = data[: len(data) // 8 * 8].view("<u8")
    pages = np.add.reduceat(words, np.arange(0, len(words), PAGE)) if len(words) else words
    weights = np.arange(1, 2 * len(pages), 2, dtype=np.uint64)
    rest = int.from_bytes(data[len(words) * 8 :].tobytes(), "little")
    return (int(pages @ weights) * 3 + rest + len(data)) % 2**64


def _use(entry: os.DirEntry[str]) -> tuple[int, int]:
    """When a file was last used and how many bytes it takes; none where it is gone."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
