"""The Runtime: from a request that names a model to the worker that answers it.

Owns the requests in flight: how many there may be, and their end when it closes. The same object
serves one cold command, the daemon and `myllm serve`. Must not know sockets, click, HTTP or llama.cpp.
Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from myllm.errors import (
    ContextOverflowError,
    InternalError,
    MyllmError,
    TryAgainError,
    UnavailableError,
    UsageError,
)
from myllm.events import completed, ended_early
from myllm.protocol import Message
from myllm.requests import EmbedRequest, GenRequest, LoadOptions
from myllm.runtime.call import Call
from myllm.runtime.keeper import Keeper, Wishes
from myllm.runtime.resolver import Resolver
from myllm.runtime.threads import in_daemon_thread
from myllm.runtime.worker import Worker

if TYPE_CHECKING:
    from myllm.models.registry import Model, Registry
    from myllm.runtime.cached_embeddings import Embeddings
    from myllm.settings import Settings

DEFAULT_MODEL: Final = "smollm2"
"""What `gen` runs where nobody named a model (DESIGN.md §4)."""
DEFAULT_EMBED_MODEL: Final = "minilm"
BATCH_SHARE: Final = 0.75
"""The part of the queue that connections with many requests may fill: a lone request finds a place."""

Work = Callable[[Message, Call, float], Awaitable[None]]
"""Takes a request with the moment of its arrival up to where a worker has it, or answers it. Raises
MyllmError."""


class Runtime:
    """Answers requests with the workers of `keeper`; at most as many at once as `settings.queue` says."""

    def __init__(
        self,
        settings: Settings,
        keeper: Keeper,
        *,
        log: Callable[..., None] = lambda event, **fields: None,
        about: Callable[[], Message] = dict,
        operations: Mapping[object, Work] = MappingProxyType({}),
    ) -> None:
        """`about` tells what `status` says of the process that this runs in, whose own `operations` these
        are."""
        self._settings = settings
        self._keeper = keeper
        self._log = log
        self._about = about
        self._resolvers = {
            offline: Resolver(partial(self._open_registry, offline=offline)) for offline in (False, True)
        }
        self._embeddings: Embeddings | None = None
        self._calls: set[Call] = set()
        self._n_requests = 0
        self._refusal: MyllmError | None = None
        self._ended = asyncio.Event()
        self._operations: dict[object, Work] = {
            "gen": self._pass_on,
            "count": self._pass_on,
            "embed": self._embed,
            "load": self._load,
            "unload": self._unload,
            "status": self._status,
            **operations,
        }

    @property
    def idle(self) -> bool:
        """Whether there is neither a request nor a model."""
        return not self._calls and self._keeper.empty

    def configure(self, settings: Settings) -> None:
        """From now on other settings are in force; what is loaded stays as it is."""
        self._settings = settings
        self._keeper.configure(settings)

    def start(self, message: Message, call: Call) -> None:
        """Takes a request in; all that follows, at last one done event, goes to `call`."""
        operation = message.get("op")
        if (work := self._operations.get(operation) if isinstance(operation, str) else None) is None:
            call.fail(UsageError(f"request: no operation {operation!r:.80}"))
        elif self._refusal and operation != "status":
            call.fail(self._refusal)
        elif len(self._calls) >= self._settings.queue and operation != "status":
            call.fail(TryAgainError(f"queue: {len(self._calls)} requests run or wait already; try again"))
        else:
            self._begin(work, message, call)

    async def room(self) -> None:
        """Waits until the queue has a place for one more request of a connection with many."""
        while len(self._calls) >= max(1, self._settings.queue * BATCH_SHARE):
            await self._ended.wait()

    async def drain(self, grace: float) -> None:
        """Refuses what is new from now on, and returns when all that runs has ended, after `grace`
        seconds by an error.
        """
        self._refusal = TryAgainError("daemon: it is being stopped; try again in a moment")
        try:
            async with asyncio.timeout(grace):
                while self._calls:
                    await self._ended.wait()
        except TimeoutError:
            for call in list(self._calls):
                call.stop(UnavailableError("daemon: it was stopped before the answer's end; try again"))

    async def close(self) -> None:
        """Ends all workers; returns when they are gone."""
        if self._embeddings:
            await self._embeddings.close()
        await self._keeper.close()

    # ── a request's life ────────────────────────────────────────────────────────────────────

    def _begin(self, work: Work, message: Message, call: Call) -> None:
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        self._n_requests += 1
        number = self._n_requests

        def over(call: Call) -> None:
            self._calls.discard(call)
            self._ended.set()
            self._ended.clear()
            self._log(
                "request",
                **{"request": number, "op": message.get("op"), "model": call.model, "client": call.client},
                **{"seconds": round(loop.time() - arrived, 3), **call.outcome},
            )

        self._calls.add(call)
        call.when_over(over)
        self._work(work, message, call, arrived)

    def _work(self, work: Work, message: Message, call: Call, arrived: float) -> None:
        """Does the work in a task of the call's own, by which it can be cancelled."""

        def ended(task: asyncio.Task[None]) -> None:
            call.task = None
            if task.cancelled():  # perhaps before it ran at all
                call.finish(self._early(message, "cancelled", arrived, call))

        call.task = asyncio.get_running_loop().create_task(self._answer(work, message, call, arrived))
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
            model = await self._find(name, message, call)
            worker = await self._ready(model, message, call)
        call.load_ms = _ms_since(arrived)
        call.rescue = lambda event: self._rescued(event, worker, model, message, call, arrived)
        worker.submit(_with_time_left(message, call.load_ms), call)

    def _rescued(
        self, event: Message, worker: Worker, model: Model, message: Message, call: Call, arrived: float
    ) -> bool:
        """Whether a prompt that did not fit the window that an idle model was loaded with is asked again,
        of the model's own window. A busy one's says what to do.
        """
        call.rescue = None
        if (event.get("error") or {}).get("code") != ContextOverflowError.code:
            return False
        asked = self._options(model, message).context is not None
        narrow = None if asked else self._keeper.give_way(worker)
        if narrow is None:
            return False

        async def again(message: Message, call: Call, arrived: float) -> None:
            async with _within(_with_time_left(message, _ms_since(arrived)).get("deadline_ms")):
                wider = await self._keeper.widen(narrow, model, call.send)
            call.load_ms = _ms_since(arrived)
            wider.submit(_with_time_left(message, call.load_ms), call)

        call.carrier = None
        self._work(again, message, call, arrived)
        return True

    async def _embed(self, message: Message, call: Call, arrived: float) -> None:
        """Answers from the cache; a model is loaded for what is not there."""
        request = EmbedRequest.parse(message)
        async with _within(request.deadline_ms):
            name = _text(message, "model") or self._settings.default_embed_model or DEFAULT_EMBED_MODEL
            model = await self._find(name, message, call)

            async def submit(misses: Message, as_call: Call) -> None:
                worker = await self._ready(model, message, call)
                as_call.load_ms = _ms_since(arrived)
                worker.submit(_with_time_left(misses, as_call.load_ms), as_call)

            if self._embeddings is None:
                from myllm.runtime.cached_embeddings import Embeddings  # with SQLite, which nobody else wants

                self._embeddings = Embeddings()
            await self._embeddings.answer(request, message, call, model, submit)

    async def _load(self, message: Message, call: Call, arrived: float) -> None:
        """Has a model loaded, and kept as long as is asked for."""
        name = _text(message, "model") or self._settings.default_model or DEFAULT_MODEL
        model = await self._find(name, message, call)
        worker = await self._ready(model, message, call)
        entries = await self._keeper.status()
        loaded = next((entry for entry in entries if entry.get("pid") == worker.pid), None)
        call.finish({"done": True, "model": model.name, "loaded": loaded})

    async def _unload(self, message: Message, call: Call, arrived: float) -> None:
        """Has a model go, or all of them."""
        given = _text(message, "model")
        if message.get("all") is True:
            call.finish({"done": True, "unloaded": await self._keeper.unload(None)})
            return
        if given is None:
            raise UsageError("unload: give a model, or all")
        name = given
        if not self._keeper.has(given):  # an alias, say; not `_find`, which would pull what is not even here
            registry = self._open_registry(offline=True)
            name = await in_daemon_thread(lambda: registry.resolve(given).name)
        call.finish({"done": True, "unloaded": await self._keeper.unload(name)})

    async def _status(self, message: Message, call: Call, arrived: float) -> None:
        about = {"requests": len(self._calls) - 1, "draining": self._refusal is not None, **self._about()}
        call.finish({"done": True, "status": {"daemon": about, "models": await self._keeper.status()}})

    def _early(self, message: Message, reason: str, arrived: float, call: Call) -> Message:
        return completed(ended_early(message["op"], reason), call.model, _ms_since(arrived))

    # ── models ──────────────────────────────────────────────────────────────────────────────

    async def _find(self, name: str, message: Message, call: Call) -> Model:
        """The model of that name, pulled if need be, unless the request is `offline`; `call` gets events
        meanwhile."""
        call.model = name
        model = await self._resolvers[message.get("offline") is True].resolve(name, call.send)
        call.model = model.name
        return model

    async def _ready(self, model: Model, message: Message, call: Call) -> Worker:
        """The worker with the model, loaded as the request asks; `call` gets events meanwhile."""
        return await self._keeper.ready(model, self._options(model, message), call.send, _wishes(message))

    def _options(self, model: Model, message: Message) -> LoadOptions:
        """How the request and the configuration want the model loaded. Raises UsageError."""
        given = LoadOptions.parse(message.get("options") or {})
        configured = self._settings.model_options.get(model.name, LoadOptions())
        return LoadOptions(**(configured.to_wire() | given.to_wire()))

    def _open_registry(self, *, offline: bool) -> Registry:
        from myllm.models.registry import Registry

        return Registry(self._settings._replace(offline=offline or self._settings.offline))


def _wishes(message: Message) -> Wishes:
    """How long the model shall stay. Raises UsageError."""
    keep_alive, pin = message.get("keep_alive"), message.get("pin")
    if keep_alive is not None:
        if isinstance(keep_alive, bool) or not isinstance(keep_alive, int | float) or not keep_alive >= -1:
            raise UsageError(f"keep_alive: expected seconds, or -1 for ever, not {keep_alive!r:.80}")
        keep_alive = math.inf if keep_alive < 0 else float(keep_alive)
    if pin is not None and not isinstance(pin, bool):
        raise UsageError(f"pin: expected true or false, not {pin!r:.80}")
    return Wishes(keep_alive, pin)


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
