"""Which sessions a command means: by name, by the beginning of an id, by what is known of them.

Owns how the words of a command line become sessions of the store, and the shortest id that names one.
Must not know what is done with them. The store is opened when a command runs, not when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final

from myllm import paths
from myllm.errors import MyllmError, UsageError

if TYPE_CHECKING:
    import click

    from myllm.conversation import Session
    from myllm.storage.session_store import SessionStore

SHORT: Final = 7
"""Characters of an id that say the second of its making (storage/session_ids.py); nearly always enough."""


@contextmanager
def opened() -> Iterator[SessionStore]:
    """The user's sessions. Raises ConfigError where there is no home."""
    from myllm.storage.sessions import SQLiteSessions

    with closing(SQLiteSessions(paths.state_dir())) as store:
        yield store


def chosen(store: SessionStore, wanted: Sequence[str]) -> list[Session]:
    """Each session that is named, once. Raises NotFoundError, with the nearest names, and UsageError."""
    found = {session.id: session for session in map(store.find, wanted)}
    return list(found.values())


def matching(store: SessionStore, conditions: Mapping[str, Any]) -> Iterator[Session]:
    """All sessions that `SessionStore.page` finds by these conditions, changed last first."""
    last = None
    while page := store.page(**conditions, after=last):
        yield from page
        last = page[-1]


def short_id(store: SessionStore, session: Session) -> str:
    """The beginning of its id that the store takes for this one session."""
    for length in range(SHORT, len(session.id)):
        try:
            if store.find(session.id[:length]).id == session.id:
                return session.id[:length]
        except UsageError:  # it is the beginning of several
            continue
    return session.id


def complete_session(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Names for the shell's TAB."""
    from click.shell_completion import CompletionItem

    try:
        with opened() as store:
            names = [session.name for session in matching(store, {}) if session.name]
    except MyllmError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
