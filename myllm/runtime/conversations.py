"""Turns in sessions: what was said before goes along with what is said now, and this is kept with its answer.

Owns a turn from its lock to its end, and what of the store's troubles still lets a model answer. The store
blocks, so it runs on threads. Must not know connections, how a backend answers, or SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from myllm import events, paths
from myllm.conversation import Message, Session, State
from myllm.errors import (
    CannotCreateError,
    InternalError,
    IOFailureError,
    MyllmError,
    NotFoundError,
    PermissionDeniedError,
    TryAgainError,
    UsageError,
)
from myllm.models.fingerprint import fingerprint
from myllm.protocol import parse
from myllm.requests import GenRequest, InSession, Request
from myllm.runtime.call import Call
from myllm.runtime.reply import Reply, Wrapper
from myllm.runtime.threads import in_daemon_thread
from myllm.storage.sessions import SQLiteSessions

if TYPE_CHECKING:
    from myllm.models.registry import Model
    from myllm.protocol import Message as Event
    from myllm.storage.session_store import SessionStore

Sent = dict[str, Any]
"""A message as a template takes it."""
WRITTEN_EVERY: Final = 1.0
"""Seconds between two moments at which an answer is kept as far as it has come: more is never lost."""
LOOKED_BACK: Final = 16
"""Messages among which there mostly is an answer, which says how many before it were sent."""
NOT_WRITABLE: Final = (PermissionDeniedError, CannotCreateError)
"""Why a session cannot be kept here at all: said, and no failure."""
NOT_WRITTEN: Final = (IOFailureError, TryAgainError)
"""Why it could not be kept this time: the answer is shown, and the command fails."""
UNSAVED: Final = "unsaved-"
"""How ids begin of sessions that only this process has: no store's do."""
SNAPSHOT: Final = "snapshot"
"""In a done event of a backend and an answer's facts: what names its files, see snapshot_files.py."""
SENT: Final = "sent"
"""In an answer's facts: how many messages, instructions aside, it was made from. The next begins there, too,
so that a conversation of thousands costs no more than one of ten."""


class Conversations:
    """The turns of one Runtime, in the user's own sessions unless a store is given."""

    def __init__(self, store: SessionStore | None = None) -> None:
        self._store = store or SQLiteSessions(paths.state_dir())
        self._turns: set[asyncio.Task[None]] = set()
        self._unsaved: dict[str, list[Sent]] = {}
        """What was said in sessions that cannot be kept anywhere else, by ids of this Runtime's."""

    @asynccontextmanager
    async def turn(self, request: Request, call: Call) -> AsyncIterator[Turn]:
        """Takes the turn, which lasts until the reply of `Turn.saved` is done, or the block fails.

        Raises TryAgainError where another has it for long, and whatever the store raises but for what lets a
        model answer unsaved.
        """
        turn = Turn(self._store, self._unsaved, request, self._keep)
        beginning = asyncio.ensure_future(in_daemon_thread(turn.begin))
        try:
            await asyncio.shield(beginning)
            if isinstance(turn.trouble, NOT_WRITABLE):  # said once: the next turn is in a session of ours
                call.event(events.note(f"not saved: {turn.trouble}"))
            yield turn
        except BaseException:
            self._keep(_after(beginning, turn.end))
            raise

    async def close(self) -> None:
        """Returns when all that was said is kept."""
        while self._turns:
            await asyncio.wait(self._turns)
        await in_daemon_thread(self._store.close)

    def _keep(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)
        return task


class Turn:
    """One turn: the session, and the `request` with all that is sent. Its methods but `saved` block."""

    def __init__(
        self,
        store: SessionStore,
        unsaved: dict[str, list[Sent]],
        request: Request,
        keep: Callable[[Any], asyncio.Task[None]],
    ) -> None:
        if not isinstance(request.asked, GenRequest):
            raise InternalError("chat: nothing to say was parsed")
        self._store, self._wanted, self._asked = store, request.turn, request.asked
        self._unsaved, self._keep_task = unsaved, keep
        self.request = request
        self.session = Session(id="", name=None, created=0, updated=0)
        self.trouble: MyllmError | None = None
        """Why nothing is kept of it."""
        self._held = ExitStack()
        self._has_turn = False
        self._n_unsent = self._n_sent = 0
        self._window: int | None = None
        self._answer: Message | None = None
        self._messages: list[Sent] = []

    def begin(self) -> None:
        """Finds or makes the session, waits for its turn, and keeps what the user says."""
        conversation = self._asked.conversation()
        new = [message for message in conversation if message["role"] != "system"]
        system = "\n\n".join(message["content"] for message in conversation if message["role"] == "system")
        if not new:
            raise UsageError("chat: there is nothing to answer; give a prompt")
        if (known := self._unsaved.get(self._wanted.session or "")) is not None:
            self.session = replace(self.session, id=self._wanted.session or "")
            messages = [*known, *new]
        else:
            messages = [*self._begin_kept(new, system), *new]
        self._n_sent = len(messages)
        self._messages = messages
        instructions = system or self.session.system
        given = [{"role": "system", "content": instructions}] if instructions else []
        wire = {key: value for key, value in self.request.wire.items() if key not in ("prompt", "system")}
        self.request = replace(
            self.request,
            op="gen",
            wire={
                **{"on_overflow": "turns", **self.session.settings, **wire},
                **{"messages": given + messages, "name_snapshot": True},
            },
        )

    def _begin_kept(self, new: list[Sent], system: str) -> list[Sent]:
        """What was said before that is to be sent; what is new is kept, unless there is `trouble`."""
        before: list[Message] = []
        try:
            self.session = _session(self._store, self._wanted, self.request.model.name, system)
            before = self._look_back()
            self._held.enter_context(self._store.turn(self.session.id))
            self._has_turn = True
            before = self._look_back()  # others may have had theirs while we waited
            for message in new:
                extra = {"name": message["name"]} if "name" in message else {}
                self._store.append(self.session.id, message["role"], message["content"], extra=extra)
        except (*NOT_WRITABLE, *NOT_WRITTEN) as error:
            if isinstance(error, TryAgainError) and self.session.id and not self._has_turn:
                raise  # another has it
            self.trouble = error
            if isinstance(error, NOT_WRITABLE):
                self.session = replace(self.session, id=f"{UNSAVED}{len(self._unsaved) + 1}")
        return [m.to_wire() for m in before if m.state is not State.FAILED and m.content]

    def _look_back(self) -> list[Message]:
        self.session = self._store.find(self.session.id, owner=self.session.owner)
        before = _sent_before(self._store, self.session)
        self._n_unsent = self.session.n_messages - len(before)
        return before

    def saved(self, reply: Reply, model: Model, window: int | None) -> Saved:
        """The reply that keeps the answer before it passes its done event on to `reply`."""
        self._window = window
        return Saved(reply, self, model, self._keep_task)

    def write(self, content: str, state: State, **known: Any) -> None:
        """Keeps the answer as far as it has come. Raises MyllmError."""
        if self.session.id.startswith(UNSAVED):
            self._unsaved[self.session.id] = [*self._messages, {"role": "assistant", "content": content}]
        if self.trouble or self.session.id.startswith(UNSAVED):
            return
        if self._answer is None:
            self._answer = self._store.append(self.session.id, "assistant", "", state=State.OPEN)
        self._answer = replace(self._answer, content=content, state=state, **known)
        self._store.write_answer(self._answer)

    def remember(self, model: str) -> None:
        """Has a session that named none go on with this model. Raises MyllmError."""
        if self.session.model is None and self._answer is not None:
            self._store.update(replace(self.session, model=model))

    def end(self) -> None:
        """Lets go of the session; what the user said without getting an answer counts as failed."""
        self._held.close()

    def counted(self, event: Event) -> Event:
        """The done event with the window and all the messages that were not sent; counts those that were."""
        usage = event.get("usage")
        if not usage:
            return event
        dropped = usage.get("dropped_messages", 0)
        self._n_sent -= dropped
        known = {"window": self._window} if self._window else {}
        return {**event, "usage": {**usage, "dropped_messages": dropped + self._n_unsent, **known}}

    def facts(self, event: Event, model: Model) -> dict[str, Any]:
        """What is kept of an answer beside its words."""
        known = ("model", "finish_reason", "usage", "timings", "seed")
        facts = {key: event[key] for key in known if key in event}
        return {**facts, "fingerprint": fingerprint(model.path), SENT: self._n_sent}


class Saved(Wrapper):
    """Keeps an answer: in between what came so far, and all of it before the done event goes on."""

    def __init__(
        self, inner: Reply, turn: Turn, model: Model, keep: Callable[[Any], asyncio.Task[None]]
    ) -> None:
        super().__init__(inner)
        self._turn, self._model, self._keep = turn, model, keep
        self._lines: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._writing: asyncio.Task[None] | None = None

    def line(self, line: bytes, start: int) -> None:
        self._lines.append(b"{" + line[start:])
        if self._loop.time() >= self._due and (self._writing is None or self._writing.done()):
            self._due = self._loop.time() + WRITTEN_EVERY
            self._writing = self._keep(self._write_so_far())
        self.inner.line(line, start)

    def done(self, event: Event) -> None:
        self._keep(self._end(event))

    async def _write_so_far(self) -> None:
        content, reasoning = _said(self._lines)
        with suppress(MyllmError):  # the end tries it again, and says why
            await in_daemon_thread(lambda: self._turn.write(content, State.OPEN, reasoning=reasoning))

    async def _end(self, event: Event) -> None:
        if self._writing:
            await asyncio.wait({self._writing})
        event = self._turn.counted(event)
        snapshot = event.pop(SNAPSHOT, None)
        trouble = self._turn.trouble
        try:
            await in_daemon_thread(lambda: self._write_all(event, snapshot))
        except MyllmError as error:
            trouble = error
        except Exception as error:  # noqa: BLE001 — a bug here must not keep the answer from its asker
            trouble = InternalError(f"session: {type(error).__name__}: {error}")
        if self._turn.session.id:
            event = events.in_session(event, self._turn.session.id)
        if trouble and not isinstance(trouble, NOT_WRITABLE) and "error" not in event:
            event = {**event, **events.failed(type(trouble)(f"the answer is not saved: {trouble}"))}
        self.inner.done(event)

    def _write_all(self, event: Event, snapshot: str | None) -> None:
        content, reasoning = _said(self._lines)
        content = event.get("full_text", content)
        try:
            if content or "error" not in event:
                state = State.WHOLE if event.get("finish_reason") in ("stop", "length") else State.CUT
                facts = self._turn.facts(event, self._model) | ({SNAPSHOT: snapshot} if snapshot else {})
                reasoning = event.get("reasoning_text", reasoning)
                self._turn.write(content, state, reasoning=reasoning, answer=facts)
                self._turn.remember(self._model.name)
        finally:
            self._turn.end()


async def _after(beginning: asyncio.Future[None], end: Callable[[], None]) -> None:
    """Ends a turn that failed or was given up, when it has begun."""
    with suppress(Exception):
        await beginning
    await in_daemon_thread(end)


def _session(store: SessionStore, wanted: InSession, model: str | None, system: str) -> Session:
    """The session that is wanted, made where it is not there, with what it is to go on with."""
    found = None
    if wanted.session is not None:
        with suppress(NotFoundError):
            found = store.find(wanted.session)
    elif wanted.last:
        found = store.last(directory=wanted.directory)
        if found is None:
            raise NotFoundError("session: there is none to go on with; begin one with `myllm chat`")
    if found is None:
        return store.create(wanted.session, model=model, system=system or None, directory=wanted.directory)
    changed = replace(found, model=model or found.model, system=system or found.system)
    if changed != found:
        with suppress(*NOT_WRITABLE, *NOT_WRITTEN):  # what is said says so
            return store.update(changed)
    return found


def _sent_before(store: SessionStore, session: Session) -> list[Message]:
    """The end of the conversation, from where the last answer's began."""
    end = store.path(session.id, LOOKED_BACK)
    for at in range(len(end) - 1, -1, -1):
        if (n_sent := end[at].answer.get(SENT)) is not None:
            wanted = n_sent + len(end) - at
            return end[-wanted:] if wanted <= len(end) else store.path(session.id, wanted)
    return end if len(end) < LOOKED_BACK else store.path(session.id)


def _said(lines: list[bytes]) -> tuple[str, str]:
    """Answer and reasoning in token lines."""
    tokens = list(map(parse, lines))
    answer, reasoning = (
        "".join(token["token"] for token in tokens if bool(token.get("reasoning")) is wanted)
        for wanted in (False, True)
    )
    return answer, reasoning
