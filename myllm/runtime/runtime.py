"""The Runtime: from a request that names a model to the backend that answers it.

Owns the requests in flight: how many there may be, and their end when it closes. The same object serves one
cold command, the daemon and `myllm serve`. Must not know sockets, click, HTTP or llama.cpp. Everything runs
on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from myllm import events
from myllm.errors import InternalError, MyllmError, TryAgainError, UnavailableError, UsageError
from myllm.protocol import Message
from myllm.requests import EmbedRequest, LoadOptions, Request
from myllm.runtime.asker import Asker
from myllm.runtime.backend import Backend
from myllm.runtime.call import Call
from myllm.runtime.keeper import Keeper
from myllm.runtime.reply import Completed, Reply, Retried
from myllm.runtime.resolver import Resolver
from myllm.runtime.threads import in_daemon_thread
from myllm.settings import DEFAULT_EMBED_MODEL, DEFAULT_MODEL

if TYPE_CHECKING:
    from myllm.models.registry import Model, Registry
    from myllm.runtime.cached_embeddings import Embeddings
    from myllm.runtime.conversations import Conversations
    from myllm.settings import Settings

BATCH_SHARE: Final = 0.75
"""The part of the queue that connections with many requests may fill: a lone request finds a place."""

Work = Callable[[Request, Call, float], Awaitable[None]]
"""Takes a request with the moment of its arrival up to where a backend has it, or answers it. Raises
MyllmError."""


class Runtime:
    """Answers requests with the backends of `keeper`; at most as many at once as `settings.queue` says."""

    def __init__(
        self,
        settings: Settings,
        keeper: Keeper,
        *,
        log: Callable[..., None] = lambda event, **fields: None,
        about: Callable[[], Message] = dict,
        operations: Mapping[str, Work] = MappingProxyType({}),
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
        self._conversations: Conversations | None = None
        self._calls: set[Call] = set()
        self._n_requests = self._n_askers = 0
        self._refusal: MyllmError | None = None
        self._ended = asyncio.Event()
        self._operations: dict[str, Work] = {
            "gen": self._generate,
            "chat": self._chat,
            "count": self._generate,
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

    def welcome(self) -> Asker:
        """Somebody new, by whom requests come."""
        self._n_askers += 1
        return Asker(self, self._n_askers)

    def start(self, message: Message, call: Call) -> None:
        """Takes a request in; all that follows, at last one done event, goes to `call`."""
        try:
            request = Request.parse(message)
            work = self._operations.get(request.op)
            if work is None:
                raise UsageError(f"request: {request.op} is not for this process")
            if request.op != "status":
                self._check_open()
        except MyllmError as error:
            call.fail(error)
        except Exception as error:  # noqa: BLE001 — a bug fails this request, not its connection
            call.fail(_bug(error))
        else:
            self._begin(work, request, call)

    def _check_open(self) -> None:
        """Raises what new requests are refused with."""
        if self._refusal:
            raise self._refusal
        if len(self._calls) >= self._settings.queue:
            raise TryAgainError(f"queue: {len(self._calls)} requests run or wait already; try again")

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
        """Ends all backends; returns when they are gone."""
        if self._embeddings:
            await self._embeddings.close()
        if self._conversations:
            await self._conversations.close()
        await self._keeper.close()

    # ── a request's life ────────────────────────────────────────────────────────────────────

    def _begin(self, work: Work, request: Request, call: Call) -> None:
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
                **{"request": number, "op": request.op, "model": call.model, "client": call.client},
                **{"seconds": round(loop.time() - arrived, 3), **call.outcome},
            )

        self._calls.add(call)
        call.when_over(over)
        self._work(work, request, call, arrived)

    def _work(self, work: Work, request: Request, call: Call, arrived: float) -> None:
        """Does the work in a task of the call's own, by which it can be cancelled."""

        def ended(task: asyncio.Task[None]) -> None:
            call.task = None
            if task.cancelled():  # perhaps before it ran at all
                call.done(_early(request, "cancelled", arrived, call))

        call.task = asyncio.get_running_loop().create_task(self._answer(work, request, call, arrived))
        call.task.add_done_callback(ended)

    async def _answer(self, work: Work, request: Request, call: Call, arrived: float) -> None:
        """Does the work up to where a backend has the request; whatever goes wrong is its done event."""
        try:
            await work(request, call, arrived)
        except TimeoutError:
            call.done(_early(request, "deadline", arrived, call))
        except MyllmError as error:
            call.fail(error)
        except Exception as error:  # noqa: BLE001 — a bug fails this request, not the others
            call.fail(_bug(error))

    async def _generate(self, request: Request, call: Call, arrived: float) -> None:
        """Finds and readies the model, then passes the request on to its backend."""
        async with _in_time(request, arrived):
            model = await self._find(request, call, self._settings.default_model or DEFAULT_MODEL)
            backend = await self._ready(model, request, call)
        self._ask(backend, model, request, call, arrived, call)

    async def _chat(self, request: Request, call: Call, arrived: float) -> None:
        """Takes a turn in a session: what was said there is sent along, and what is said now is kept."""
        if self._conversations is None:
            from myllm.runtime.conversations import Conversations  # with SQLite, which nobody else wants

            self._conversations = Conversations()
        async with _in_time(request, arrived), self._conversations.turn(request, call) as turn:
            default = request.turn.default_model or self._settings.default_model or DEFAULT_MODEL
            default = turn.session.model or default
            model = await self._find(request, call, default)
            backend = await self._ready(model, request, call)
            reply = turn.saved(call, model, backend.window)
            self._ask(backend, model, turn.request, call, arrived, reply)

    def _ask(
        self, backend: Backend, model: Model, request: Request, call: Call, arrived: float, reply: Reply
    ) -> None:
        """Has the backend answer to `reply`, which is the call or a wrapper of it."""

        def again() -> bool:
            return self._widen(backend, model, request, call, arrived, reply)

        _submit(backend, request, call, arrived, Retried(reply, again))

    def _widen(
        self, backend: Backend, model: Model, request: Request, call: Call, arrived: float, reply: Reply
    ) -> bool:
        """Whether a prompt that did not fit the window that an idle model was loaded with is asked again, of
        the model's own window. A busy one's error says what to do.
        """
        asked = self._options(model, request).context is not None
        narrow = None if asked or call.over else self._keeper.give_way(backend)
        if narrow is None:
            return False

        async def work(request: Request, call: Call, arrived: float) -> None:
            async with _in_time(request, arrived):
                wider = await self._keeper.widen(narrow, model, call.event)
            _submit(wider, request, call, arrived, reply)

        call.leave_backend()
        self._work(work, request, call, arrived)
        return True

    async def _embed(self, request: Request, call: Call, arrived: float) -> None:
        """Answers from the cache; a model is loaded for what is not there."""
        if not isinstance(request.asked, EmbedRequest):
            raise InternalError("embed: no texts were parsed")
        async with _in_time(request, arrived):
            model = await self._find(request, call, self._settings.default_embed_model or DEFAULT_EMBED_MODEL)

            async def submit(texts: list[str], reply: Reply) -> None:
                backend = await self._ready(model, request, call)
                _submit(backend, request, call, arrived, reply, texts=texts)

            if self._embeddings is None:
                from myllm.runtime.cached_embeddings import Embeddings  # with SQLite, which nobody else wants

                self._embeddings = Embeddings()
            await self._embeddings.answer(request.asked, call, model, submit)

    async def _load(self, request: Request, call: Call, arrived: float) -> None:
        """Has a model loaded, and kept as long as is asked for."""
        model = await self._find(request, call, self._settings.default_model or DEFAULT_MODEL)
        backend = await self._ready(model, request, call)
        entries = await self._keeper.status()
        loaded = next((entry for entry in entries if entry.get("pid") == backend.pid), None)
        call.done(events.done(model=model.name, loaded=loaded))

    async def _unload(self, request: Request, call: Call, arrived: float) -> None:
        """Has a model go, or all of them."""
        name = given = request.model.name
        if request.all:
            name = None
        elif given is None:
            raise UsageError("unload: give a model, or all")
        elif not self._keeper.has(
            given
        ):  # an alias, say; not `_find`, which would pull what is not even here
            registry = self._open_registry(offline=True)
            name = await in_daemon_thread(lambda: registry.resolve(given).name)
        call.done(events.done(unloaded=await self._keeper.unload(name)))

    async def _status(self, request: Request, call: Call, arrived: float) -> None:
        about = {"requests": len(self._calls) - 1, "draining": self._refusal is not None, **self._about()}
        call.done(events.done(status={"daemon": about, "models": await self._keeper.status()}))

    # ── models ──────────────────────────────────────────────────────────────────────────────

    async def _find(self, request: Request, call: Call, default: str) -> Model:
        """The model that the request names, pulled if need be, unless it is `offline`; `call` gets events
        meanwhile."""
        call.model = request.model.name or default
        model = await self._resolvers[request.model.offline].resolve(call.model, call.event)
        call.model = model.name
        return model

    async def _ready(self, model: Model, request: Request, call: Call) -> Backend:
        """The backend with the model, loaded as the request asks; `call` gets events meanwhile."""
        options = self._options(model, request)
        return await self._keeper.ready(model, options, call.event, request.model.wishes)

    def _options(self, model: Model, request: Request) -> LoadOptions:
        """How the request and the configuration want the model loaded."""
        configured = self._settings.model_options.get(model.name, LoadOptions())
        return LoadOptions(**(configured.to_wire() | request.model.options.to_wire()))

    def _open_registry(self, *, offline: bool) -> Registry:
        from myllm.models.registry import Registry

        return Registry(self._settings._replace(offline=offline or self._settings.offline))


def _submit(
    backend: Backend, request: Request, call: Call, arrived: float, reply: Reply, **changed: object
) -> None:
    """Gives the request to a backend, whose clock starts later: its deadline counts from the arrival here."""
    load_ms = _ms_since(arrived)
    message = {"op": request.op, **request.wire, **changed}
    if (deadline_ms := message.get("deadline_ms")) is not None:
        message["deadline_ms"] = max(deadline_ms - load_ms, 0)
    call.carry(backend, message, Completed(reply, call.model, load_ms))


def _in_time(request: Request, arrived: float) -> asyncio.Timeout:
    """Raises TimeoutError in its block when the request's deadline has passed."""
    deadline_ms = request.asked.deadline_ms if request.asked else None
    return asyncio.timeout_at(None if deadline_ms is None else arrived + deadline_ms / 1000)


def _early(request: Request, reason: str, arrived: float, call: Call) -> Message:
    return events.completed(events.ended_early(request.op, reason), call.model, _ms_since(arrived))


def _bug(error: Exception) -> InternalError:
    return InternalError(f"runtime: {type(error).__name__}: {error}")


def _ms_since(moment: float) -> float:
    return (asyncio.get_running_loop().time() - moment) * 1000
