"""Which sessions a command means: by name, by the beginning of an id, by what is known of them.

Owns how the words of a command line become sessions of the store, and what a session is called in return.
Must not know what is done with them. The store is opened when a command runs, not when it is imported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from myllm import paths
from myllm.errors import MyllmError, NotFoundError, UsageError

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


def conditions(
    *,
    model: str | None = None,
    here: bool = False,
    older_than: float | None = None,
    newer_than: float | None = None,
) -> dict[str, Any]:
    """What `SessionStore.page` is asked for; ages are in seconds."""
    now = time.time()
    return {
        "model": model,
        "directory": str(Path.cwd()) if here else None,
        "updated_before": None if older_than is None else now - older_than,
        "updated_since": None if newer_than is None else now - newer_than,
    }


def matching(store: SessionStore, asked: Mapping[str, Any]) -> Iterator[Session]:
    """All sessions of which this is true, changed last first."""
    last = None
    while page := store.page(**asked, after=last):
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


def parent_name(store: SessionStore, session: Session) -> str | None:
    """What the session is called that this one was forked from; its id where it has been removed."""
    if session.parent is None:
        return None
    try:
        store.path(session.parent, 1)  # tells at once; `find` would look for what is spelled alike
        return store.find(session.parent).name or session.parent
    except NotFoundError:
        return session.parent


def complete_session(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Names for the shell's TAB."""
    from click.shell_completion import CompletionItem

    try:
        with opened() as store:
            names = [session.name for session in matching(store, {}) if session.name]
    except MyllmError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
