"""The Runtime: from a request that names a model to the worker that answers it.

Owns which workers there are. The same object serves one cold command, the daemon and `myllm
serve`. Must not know sockets, click, HTTP or llama.cpp. Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from myllm.errors import InternalError, MyllmError, UsageError
from myllm.protocol import EmbedRequest, GenRequest, LoadOptions, Message
from myllm.runtime.call import Call
from myllm.runtime.events import completed, ended_early
from myllm.runtime.resolver import Resolver
from myllm.runtime.shared import Shared, Watch
from myllm.runtime.spawn import WorkerProcess, spawn
from myllm.runtime.workers import Worker

if TYPE_CHECKING:
    from pathlib import Path

    from myllm.models.registry import Model, Registry
    from myllm.runtime.embedding import Embeddings
    from myllm.settings import Settings

DEFAULT_MODEL: Final = "smollm2"
"""What `gen` runs where nobody named a model (DESIGN.md §4)."""
DEFAULT_EMBED_MODEL: Final = "minilm"

Work = Callable[[Message, Call, float], Awaitable[None]]
"""Takes a request with the moment of its arrival up to where a worker has it. Raises MyllmError."""


class Runtime:
    """Answers requests. `spare` is a worker process started in advance, used for the first model."""

    def __init__(self, settings: Settings, spare: WorkerProcess | None = None) -> None:
        self._settings = settings
        self._resolver = Resolver(self._open_registry)
        self._spare = spare
        self._workers: dict[tuple[Path, LoadOptions], Shared[Worker]] = {}
        self._running: set[Worker] = set()
        self._embeddings: Embeddings | None = None

    def start(self, message: Message, call: Call) -> None:
        """Takes a request in; all that follows, at last one done event, goes to `call`."""
        match message.get("op"):
            case "gen" | "count":
                self._begin(self._pass_on, message, call)
            case "embed":
                self._begin(self._embed, message, call)
            case "status":
                call.finish({"done": True, "status": {"workers": [worker.pid for worker in self._running]}})
            case op:
                call.fail(UsageError(f"request: no operation {op!r:.80}"))

    async def close(self) -> None:
        """Ends all workers; returns when they are gone."""
        if self._embeddings:
            self._embeddings.close()
        if self._spare:
            self._running.add(await Worker.attach(self._spare))
            self._spare = None
        await asyncio.gather(*(worker.close() for worker in list(self._running)))

    def _begin(self, work: Work, message: Message, call: Call) -> None:
        loop = asyncio.get_running_loop()
        arrived = loop.time()

        def ended(task: asyncio.Task[None]) -> None:
            call.task = None
            if task.cancelled():  # perhaps before it ran at all
                call.finish(self._early(message, "cancelled", arrived, call))

        call.task = loop.create_task(self._answer(work, message, call, arrived))
        call.task.add_done_callback(ended)

    async def _answer(self, work: Work, message: Message, call: Call, arrived: float) -> None:
        """Does the work up to where a worker has the request; whatever goes wrong is its done event."""
        try:
            await work(message, call, arrived)
        except TimeoutError:
            call.finish(self._early(message, "deadline", arrived, call))
        except MyllmError as error:
            call.fail(error)
        except Exception as error:  # noqa: BLE001 — a bug fails this request, not the others
            call.fail(InternalError(f"runtime: {type(error).__name__}: {error}"))

    async def _pass_on(self, message: Message, call: Call, arrived: float) -> None:
        """Finds and readies the model, then passes the request on to its worker."""
        request = GenRequest.parse(message)
        async with _within(request.deadline_ms):
            name = _text(message, "model") or self._settings.default_model or DEFAULT_MODEL
            worker = await self._ready(await self._find(name, call), message, call)
        call.load_ms = _ms_since(arrived)
        worker.submit(_with_time_left(message, call.load_ms), call)

    async def _embed(self, message: Message, call: Call, arrived: float) -> None:
        """Answers from the cache; a model is loaded for what is not there."""
        request = EmbedRequest.parse(message)
        async with _within(request.deadline_ms):
            name = _text(message, "model") or self._settings.default_embed_model or DEFAULT_EMBED_MODEL
            model = await self._find(name, call)

            async def submit(misses: Message, as_call: Call) -> None:
                worker = await self._ready(model, message, call)
                as_call.load_ms = _ms_since(arrived)
                worker.submit(_with_time_left(misses, as_call.load_ms), as_call)

            if self._embeddings is None:
                from myllm.runtime.embedding import Embeddings  # with SQLite, which nobody else wants

                self._embeddings = Embeddings()
            await self._embeddings.answer(message, call, model, submit)

    def _early(self, message: Message, reason: str, arrived: float, call: Call) -> Message:
        return completed(ended_early(message["op"], reason), call.model, _ms_since(arrived))

    async def _find(self, name: str, call: Call) -> Model:
        """The model of that name, pulled if need be; `call` gets events meanwhile."""
        call.model = name
        model = await self._resolver.resolve(name, call.send)
        call.model = model.name
        return model

    async def _ready(self, model: Model, message: Message, call: Call) -> Worker:
        """The worker with the model, loaded as the request asks; `call` gets events meanwhile."""
        options = LoadOptions.parse(message.get("options") or {})
        key = model.path, self._merged(model.name, options)
        work = self._workers.get(key)
        if work is None:
            work = self._workers[key] = self._loading(model, key)
        return await work.join(call.send)

    def _open_registry(self) -> Registry:
        from myllm.models.registry import Registry

        return Registry(self._settings)

    def _merged(self, name: str, given: LoadOptions) -> LoadOptions:
        configured = self._settings.model_options.get(name)
        if configured is None:
            return given
        return LoadOptions(**(configured.to_wire() | given.to_wire()))

    def _loading(self, model: Model, key: tuple[Path, LoadOptions]) -> Shared[Worker]:
        def forget(*_: object) -> None:
            if self._workers.get(key) is work:
                del self._workers[key]

        work = Shared(lambda tell: self._load(model, key[1], tell, forget), forget)
        return work

    async def _load(
        self, model: Model, options: LoadOptions, tell: Watch, forget: Callable[[], None]
    ) -> Worker:
        process, self._spare = self._spare or spawn(), None
        worker = await Worker.attach(process)
        self._running.add(worker)

        def dead(burial: asyncio.Task[None]) -> None:
            forget()
            burial.add_done_callback(lambda _: self._running.discard(worker))

        worker.when_dead(dead)
        try:
            await worker.load(model.path, model.name, options, tell)
        except BaseException:
            await worker.close()
            raise
        return worker


def _ms_since(moment: float) -> float:
    return (asyncio.get_running_loop().time() - moment) * 1000


def _with_time_left(message: Message, waited_ms: float) -> Message:
    """The request for a worker, whose clock starts later: its deadline counts from the arrival here."""
    if message.get("deadline_ms") is None:
        return message
    return {**message, "deadline_ms": max(message["deadline_ms"] - waited_ms, 0)}


def _within(deadline_ms: float | None) -> asyncio.Timeout:
    return asyncio.timeout(None if deadline_ms is None else deadline_ms / 1000)


def _text(message: Message, key: str) -> str | None:
    value: Any = message.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{key}: expected a string, not {value!r:.80}")
    return value
