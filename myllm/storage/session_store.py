"""The seam of session stores: what any of them does, in terms of sessions and messages.

Owns the interface and the rules that hold in every store, such as those for names. Must not know SQL,
files or models. A second implementation passes tests/storage/test_session_store_contract.py.

A session's messages are a tree; its conversation is the path from a root to the head. Nothing that was
said is ever changed or lost by going on elsewhere: edit, retry and undo move the head. A fork continues
another session's path and shares its messages; what a store removes, it keeps for the forks that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, NamedTuple, Protocol

from myllm.conversation import LOCAL, NOTHING, Message, Session, State
from myllm.errors import UsageError

HEAD: Final = "HEAD"
"""In place of a message's id: the newest of the conversation."""
PAGE: Final = 50
TURN_SECONDS: Final = 10.0
"""How long a turn waits for another's end."""
LONGEST_NAME: Final = 100
"""In characters."""
RANKED: Final = 5000
"""So many hits are ranked, at 4 µs each."""

Order = Literal["newest", "best"]


class Hit(NamedTuple):
    """A message in which words were found, by its id and its session's."""

    session: str
    name: str | None
    """The session's."""
    message: str
    role: str
    created: float
    snippet: tuple[str, ...]
    """Where the words are, in pieces: plain, found, plain, found, …, plain."""


class SessionStore(Protocol):
    """Sessions and their messages, kept. Ids are text that sorts in the order of making.

    All methods block and may be called from any thread. Ids are given whole, as values carry them; only
    `find` and `find_message` take what people type. All raise NotFoundError for what is not there, and:

    - TryAgainError where another process keeps the store locked for longer than 5 s,
    - IOFailureError where it cannot be written or read, such as on a full disk; what was there stays,
    - BadDataError where it is damaged or of a newer MyLLM; it is left untouched,
    - PermissionDeniedError and CannotCreateError where it may not be written; reading goes on working.

    What returns has been committed, and survives the machine's losing power.
    """

    # ── sessions ────────────────────────────────────────────────────────────────────────────

    def create(
        self,
        name: str | None = None,
        *,
        owner: str = LOCAL,
        model: str | None = None,
        system: str | None = None,
        settings: Mapping[str, Any] = NOTHING,
        directory: str | None = None,
    ) -> Session:
        """A new, empty session. Raises UsageError for a bad name, and for one that `owner` has."""
        ...

    def find(self, wanted: str, *, owner: str = LOCAL) -> Session:
        """The session of this exact name, else of this id or unique prefix of one, at least 4 characters.

        Raises NotFoundError, which names those that are spelled alike, and UsageError for the prefix of many.
        """
        ...

    def last(self, *, owner: str = LOCAL, directory: str | None = None) -> Session | None:
        """The session that was changed last, one begun in `directory` before all others; None without any."""
        ...

    def page(
        self,
        *,
        owner: str = LOCAL,
        model: str | None = None,
        directory: str | None = None,
        updated_before: float | None = None,
        updated_since: float | None = None,
        after: Session | None = None,
        limit: int = PAGE,
    ) -> list[Session]:
        """At most `limit` sessions, changed last first; the next page begins `after` the last of this one.

        Times are seconds since the epoch.
        """
        ...

    def rename(self, session: str, name: str | None) -> Session:
        """Gives a session a name, or takes it. Raises UsageError as `create`."""
        ...

    def update(self, session: Session) -> Session:
        """Keeps the model, system prompt and settings of `session`, and nothing else of it."""
        ...

    def fork(self, session: str, at: str | None = HEAD, name: str | None = None) -> Session:
        """A new session that goes on from a message of this one, with its model, system prompt and settings.

        Its `parent` and `forked_at` say from where, also when that has been removed. The cost does not
        depend on the length. `at=None` begins anew. Raises UsageError as `create`.
        """
        ...

    def remove(self, session: str) -> None:
        """Removes a session and those of its messages that no fork goes on from; forks inherit the others."""
        ...

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def path(self, session: str, newest: int | None = None) -> list[Message]:
        """The conversation, oldest first: all of it, or its newest messages at a cost of just those."""
        ...

    def find_message(self, session: str, wanted: str) -> Message:
        """One of the session's messages by its id or a unique prefix of it. Raises as `find`."""
        ...

    def tree(self, session: str) -> Iterator[Message]:
        """All messages, on and off the path, a parent always before its children; read as they are taken."""
        ...

    def append(
        self,
        session: str,
        role: str,
        content: str,
        *,
        parent: str | None = HEAD,
        state: State = State.WHOLE,
        reasoning: str = "",
        extra: Mapping[str, Any] = NOTHING,
        tokens: Mapping[str, int] = NOTHING,
        answer: Mapping[str, Any] = NOTHING,
    ) -> Message:
        """Adds a message after `parent`, one of this session's, or as a first one, and makes it the head.

        A user's message counts as unanswered until another follows it, see `turn`.
        """
        ...

    def write_answer(self, answer: Message) -> None:
        """Keeps what an OPEN answer is now, but for its role and place: while it is written, and at its end.

        Raises UsageError where the one that is kept is WHOLE already.
        """
        ...

    def move_head(self, session: str, to: str | None) -> Session:
        """Lets the conversation end at another message of the session's, or be empty: undo, retry."""
        ...

    def search(
        self, words: str, *, owner: str = LOCAL, order: Order = "newest", limit: int = PAGE
    ) -> list[Hit]:
        """Messages that contain all of `words`, in any case and with any accents; OPEN answers not yet.

        No character is special: what is no part of a word separates words. `best` is by relevance, among
        the newest `RANKED`.
        """
        ...

    def import_session(self, session: Session, messages: Iterable[Message]) -> Session:
        """Adds a session as `tree` and `find` gave it, all or nothing. What stood OPEN is CUT.

        A fork shares again the messages up to where it was forked, if they are there just the same. Ids are
        kept if those of the others are free and of this store's form, else the others' are made anew. Raises
        BadDataError where the messages are no tree with parents first, or a head or fork is none of them,
        and UsageError as `create`.
        """
        ...

    # ── turns ───────────────────────────────────────────────────────────────────────────────

    def turn(self, session: str, wait_seconds: float = TURN_SECONDS) -> AbstractContextManager[None]:
        """Holds the session's turn inside the block: one at a time has it, among all processes and threads.

        When it ends, whichever way, answers that stand OPEN become CUT, and the user's message that nothing
        follows becomes FAILED. If the process dies instead, the next turn begins with that, or `recover`
        does it. Entering blocks; raises TryAgainError after `wait_seconds`. Any thread may leave.
        """
        ...

    def recover(self) -> None:
        """Does for all turns that died with their process what their end would have done; waits for no other.

        Whether a process lives is known by its hold on the turn, not by time. Does nothing where the store
        may not be written.
        """
        ...

    def close(self) -> None:
        """Ends the use of the store."""
        ...


def check_name(name: str) -> None:
    """Raises UsageError for what cannot be a session's name."""
    if why := _name_fault(name):
        raise UsageError(f"session name {name[:LONGEST_NAME]!r}: {why}; choose another")


def _name_fault(name: str) -> str | None:
    if not name.strip():
        return "it is empty"
    if name != name.strip():
        return "it begins or ends with a space"
    if len(name) > LONGEST_NAME:
        return f"it is longer than {LONGEST_NAME} characters"
    if "/" in name:
        return "it has a slash"
    if not name.isprintable():  # control characters, those that turn text round, lone surrogates
        return "it has characters that cannot be seen"
    return None
