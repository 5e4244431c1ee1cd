"""The conversation under way: turns that are sent, and the session's path on which they go.

Owns how `Chat`, the store and the turns go together. Must not know commands, nor how a message is typed.
The Runtime saves what is said; here the session is begun, and its head moved before a turn that goes on
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from myllm.cli.attachments import composed, mentioned, read
from myllm.cli.output import losses
from myllm.cli.repl.chat import Chat
from myllm.cli.repl.screen import Screen
from myllm.cli.repl.turn import Turns
from myllm.conversation import Message, Session, State
from myllm.errors import (
    CannotCreateError,
    IOFailureError,
    NotFoundError,
    PermissionDeniedError,
    UsageError,
    from_wire,
)
from myllm.storage.session_store import SessionStore

_NEWEST: Final = 8
"""Messages read to find the last exchange; with calls of tools between them it may take all."""
_CUT: Final[Mapping[str, str]] = {
    "cancelled": "stopped; what came is kept, /retry asks again",
    "length": "the answer is cut: max_tokens, or the window's end",
    "deadline": "the answer is cut: its deadline passed",
}
"""What is said of an answer by its finish reason."""
_CANNOT_KEEP: Final = (PermissionDeniedError, CannotCreateError, IOFailureError)


class Exchange(NamedTuple):
    """The last message of the user's, and its answer if there is one."""

    asked: Message
    answered: Message | None


class Talk:
    """One conversation at a time; `chat.session` is the one it is."""

    def __init__(self, screen: Screen, store: SessionStore, turns: Turns, chat: Chat) -> None:
        self.screen = screen
        self.store = store
        self.chat = chat
        self._turns = turns
        self._warned = False

    # ── turns ───────────────────────────────────────────────────────────────────────────────

    def say(self, text: str) -> None:
        """Sends a new message, with the files that wait and those it mentions. Raises MyllmError."""
        files = [*self.chat.files, *map(read, mentioned(text))]
        if files:
            self.screen.say(f"with {', '.join(file.name for file in files)}")
        self._turn(composed(files, text))
        self.chat.files = []  # where the turn failed they go on waiting

    def say_instead(self, old: Message, text: str) -> None:
        """Sends `text` where `old` was said; the path goes on from there. Raises MyllmError.

        Where it does not come to be said, the session stays as it was.
        """
        session = self.session()
        self.store.move_head(session.id, old.parent)
        try:
            self._turn(text)
        finally:
            if self.store.find(session.id).head == old.parent:
                self.chat.session = self.store.move_head(session.id, session.head)

    def _turn(self, prompt: str) -> None:
        chat = self.chat
        dropped = chat.last.get("usage", {}).get("dropped_messages", 0)
        self._begin_if_possible()
        try:
            event = self._turns.ask(chat.request(prompt))
        finally:
            self._refresh()
        if error := event.get("error"):
            raise from_wire(error)
        chat.last, chat.answer = event, str(event.get("full_text", ""))
        if chat.session is None:
            chat.unsaved = event.get("session_id")
        self._remark(event, dropped)

    def _remark(self, event: Mapping[str, Any], dropped_before: int) -> None:
        """What of an answer is not as it should be."""
        note = self.screen.streams.note
        if event.get("usage", {}).get("dropped_messages", 0) != dropped_before:
            note(losses(dict(event)) or "the whole conversation fits the window again")
        if cut := _CUT.get(str(event.get("finish_reason"))):
            note(cut)

    # ── the session ─────────────────────────────────────────────────────────────────────────

    def session(self) -> Session:
        """The one there is. Raises UsageError before the first message."""
        if self.chat.session is None:
            raise UsageError("session: there is none yet; say something first")
        return self.chat.session

    def last_exchange(self) -> Exchange:
        """What was said last. Raises UsageError where nothing was."""
        session = self.session()
        for newest in (_NEWEST, None):
            path = self.store.path(session.id, newest)
            answered = None
            for message in reversed(path):
                if message.role == "user":
                    return Exchange(message, answered)
                if message.role == "assistant" and answered is None:
                    answered = message
        raise UsageError("session: nothing has been said in it")

    def enter(self, session: Session) -> None:
        """Goes on with `session` at its head. Raises MyllmError."""
        self.chat.enter(session)
        self.look_back()

    def look_back(self) -> None:
        """Takes the last answer, and what is known of it, from the session."""
        try:
            answered = self.last_exchange().answered
        except UsageError:
            answered = None
        self.chat.answer = answered.content if answered else ""
        self.chat.last = answered.answer if answered else {}

    def show_last(self) -> None:
        """Where the conversation stands, for who comes back to it."""
        session = self.session()
        name = session.name or session.id
        self.screen.say(f"session {name}: {session.n_messages:,} messages")
        try:
            asked, answered = self.last_exchange()
        except UsageError:
            return
        self.screen.say(f"> {shortened(asked.content)}")
        if answered:
            cut = " […]" if answered.state is State.CUT else ""
            self.screen.say(f"{answered.content}{cut}")

    def keep_settings(self) -> None:
        """Saves model, system message and settings with the session, once there is one."""
        chat = self.chat
        if chat.session is not None:
            changed = replace(
                chat.session, model=chat.model, system=chat.system, settings=dict(chat.settings)
            )
            chat.session = self.store.update(changed)

    def begin(self) -> Session:
        """The session, begun if there is none. Raises MyllmError where it cannot be kept."""
        chat = self.chat
        if chat.session is None:
            chat.session = self.store.create(
                model=chat.model, system=chat.system, settings=chat.settings, directory=chat.directory
            )
        return chat.session

    def _begin_if_possible(self) -> None:
        """The same; where it cannot be kept the conversation goes on all the same, with one warning.

        Begun here and not by the Runtime, so that a turn that breaks off is not left without its session.
        """
        try:
            self.begin()
        except _CANNOT_KEEP as error:
            if not self._warned:
                self.screen.streams.note(f"{error}. This conversation is not saved")
                self._warned = True

    def _refresh(self) -> None:
        """The session as the turn left it."""
        chat = self.chat
        if chat.session is not None:
            try:
                chat.session = self.store.find(chat.session.id)
            except NotFoundError:  # removed by another command: the next message begins a new one
                chat.session = None


def shortened(text: str, longest: int = 200) -> str:
    """A message's first line, or part of it."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= longest and line == text.strip() else f"{line[:longest]} …"
