"""The Runtime's embed requests: what is cached is answered at once, only the rest goes to a backend.

Owns the cache's thread. Must not know connections, nor how vectors are made. A run whose texts are
all cached never asks for one.
"""

from __future__ import annotations

import asyncio
import threading
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from myllm import events
from myllm.errors import InternalError
from myllm.models.fingerprint import fingerprint
from myllm.paths import cache_dir
from myllm.protocol import Message
from myllm.requests import EmbedRequest
from myllm.runtime.call import Call
from myllm.runtime.reply import Reply, Wrapper
from myllm.runtime.threads import in_daemon_thread
from myllm.storage.embedding_cache import CachedVectors, EmbeddingCache, cache_keys

if TYPE_CHECKING:
    from myllm.models.registry import Model

T = TypeVar("T")
FLOAT_BYTES = 4
LARGEST_ENTRY = 64 * 1024 * 1024
"""Bytes of one text's vectors up to which they are kept."""


class Embeddings:
    """Answers embed requests on one event loop."""

    def __init__(self) -> None:
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._cache: EmbeddingCache | None = None
        self._thread: threading.Thread | None = None
        self._jobs: SimpleQueue[Callable[[EmbeddingCache], None] | None] = SimpleQueue()

    async def answer(
        self,
        request: EmbedRequest,
        call: Call,
        model: Model,
        submit: Callable[[list[str], Reply], Awaitable[None]],
    ) -> None:
        """Answers what is cached of `request`; for the rest, `submit` readies a backend and passes the texts
        on, whose events come back through the wrapper it is given. Raises MyllmError.
        """
        keys = [b""] * len(request.texts)
        known: dict[bytes, CachedVectors] = {}
        if request.cache:
            keys, known = await self._in_cache(lambda cache: _look_up(cache, request, model))
            self._tell(call)
        missing: dict[str, list[int]] = {}
        for item, text in enumerate(request.texts):
            if (entry := known.get(keys[item])) is not None:
                for event in _events(item, entry):
                    call.event({**event, "model": model.name})
            else:
                missing.setdefault(text, []).append(item)
        n_cached = len(request.texts) - sum(map(len, missing.values()))
        if not missing:
            call.done(_all_cached(model.name, known[keys[0]], n_cached))
            return

        async def keep(entries: dict[int, CachedVectors]) -> None:
            kept = {keys[item]: entry for item, entry in entries.items()}
            await self._in_cache(lambda cache: cache.put(kept))
            self._tell(call)

        items = list(missing.values())
        await submit(
            list(missing), Misses(call, model.name, items, n_cached, keep if request.cache else None)
        )

    async def close(self) -> None:
        """Closes the cache; returns when all is written."""
        if self._thread:
            self._jobs.put(None)
            await in_daemon_thread(self._thread.join)

    async def _in_cache(self, work: Callable[[EmbeddingCache], T]) -> T:
        """Runs `work` on the cache's own thread, as its connection wants it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job(cache: EmbeddingCache) -> None:
            try:
                result = work(cache)
            except Exception as error:  # noqa: BLE001 — handed to whoever waits
                loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                loop.call_soon_threadsafe(_settle, future, result, None)

        if self._cache is None:
            self._cache = EmbeddingCache(cache_dir(), note=self._notes.put)
            self._thread = threading.Thread(
                target=self._serve, args=(self._cache,), name="cache", daemon=True
            )
            self._thread.start()
        self._jobs.put(job)
        return await future

    def _serve(self, cache: EmbeddingCache) -> None:
        while job := self._jobs.get():
            job(cache)
        cache.close()

    def _tell(self, call: Call) -> None:
        while not self._notes.empty():
            call.event(events.note(self._notes.get()))


def _look_up(
    cache: EmbeddingCache, request: EmbedRequest, model: Model
) -> tuple[list[bytes], dict[bytes, CachedVectors]]:
    """The key of each text, and the entries there are. Raises what the model's file cannot be read for."""
    keys = cache_keys(
        request.texts,
        fingerprint=fingerprint(model.path),
        window=request.window,
        overlap=request.overlap,
        pool=request.pool,
        purpose=request.purpose,
        on_overflow=request.on_overflow,
    )
    return keys, cache.get(list(dict.fromkeys(keys)))


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)


class Misses(Wrapper):
    """The reply to the part of a request that a backend does: its events go to the asker under their own
    items, and what came whole goes to `keep`, if there is one. Of equal texts one is computed.
    """

    def __init__(
        self,
        inner: Reply,
        model: str,
        items: list[list[int]],
        n_cached: int,
        keep: Callable[[dict[int, CachedVectors]], Awaitable[None]] | None,
    ) -> None:
        super().__init__(inner)
        self._model, self._items, self._n_cached, self._keep = model, items, n_cached, keep
        self._windows: dict[int, list[tuple[int, int, int]]] = {}
        self._vectors: dict[int, list[bytes]] = {}
        self._conclusion: asyncio.Task[None] | None = None

    def event(self, event: Message) -> None:
        if "item" not in event:
            self.inner.event(event)
            return
        items = self._items[event["item"]]
        for item in items:
            self.inner.event({**event, "item": item, "model": self._model})
        if "embedding" in event and self._keep:
            window = (event["start"], event["end"], event["tokens"])
            self._windows.setdefault(items[0], []).append(window)
            self._vectors.setdefault(items[0], []).append(b64decode(event["embedding"]))

    def done(self, event: Message) -> None:
        if "usage" in event:
            event["usage"]["cached_texts"] = self._n_cached
        if "error" in event or "finish_reason" in event or not self._vectors or self._keep is None:
            self.inner.done(event)
        else:
            self._conclusion = asyncio.get_running_loop().create_task(self._conclude(event, self._keep))

    async def _conclude(
        self, event: Message, keep: Callable[[dict[int, CachedVectors]], Awaitable[None]]
    ) -> None:
        """Keeps the vectors first: a cold command ends with its last line."""
        entries = {
            item: CachedVectors(self._windows[item], vectors)
            for item, parts in self._vectors.items()
            if len(vectors := b"".join(parts)) <= LARGEST_ENTRY
        }
        try:
            await keep(entries)
        except Exception as error:  # noqa: BLE001 — a bug of the cache must not take the answer along
            event = events.failed(InternalError(f"embed: {type(error).__name__}: {error}"))
        self.inner.done(event)


def _events(item: int, entry: CachedVectors) -> list[Message]:
    size = len(entry.vectors) // len(entry.windows)
    return [
        events.vector(
            item,
            chunk,
            window,
            b64encode(entry.vectors[chunk * size : (chunk + 1) * size]).decode(),
            cached=True,
        )
        for chunk, window in enumerate(entry.windows)
    ]


def _all_cached(model: str, entry: CachedVectors, n_cached: int) -> Message:
    dimensions = len(entry.vectors) // len(entry.windows) // FLOAT_BYTES
    return events.completed(events.embedded(dimensions, 0, cached_texts=n_cached), model, 0.0)
