"""`myllm sessions`: list, show, search, rename, fork and remove conversations.

Owns options and what is asked and said. Which sessions are meant is session_choice's, how they look
session_table's and session_pages', what is kept the store's; sessions as files are session_files'.
"""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click

from myllm.cli.console import Streams
from myllm.cli.options import as_text, complete_model, duration, output_options
from myllm.cli.session_choice import (
    chosen,
    complete_session,
    conditions,
    matching,
    opened,
    parent_name,
    short_id,
)
from myllm.cli.session_files import export, import_sessions
from myllm.cli.session_pages import transcript_of, write_records, write_text
from myllm.cli.session_table import (
    Row,
    described,
    hit_line,
    hit_record,
    session_record,
    session_table,
)
from myllm.errors import ConfigError, UsageError
from myllm.snapshot_files import folder, forget

if TYPE_CHECKING:
    from myllm.conversation import Session
    from myllm.storage.session_store import SessionStore

ON_A_PAGE: Final = 50
"""Rows of a table, and places found, unless more are asked for."""
NOTHING_FOUND: Final = 1
"""As grep ends."""
NOT_AGREED: Final = 1
EPILOG: Final = """\b
Examples:
  myllm sessions
  myllm sessions list --here --newer-than 10d
  myllm sessions show tea -n 4
  myllm sessions search earl grey
  myllm sessions fork tea --name tea-with-milk
  myllm sessions export --all > sessions.jsonl
  myllm sessions import conversations.json
  myllm sessions rm --older-than 90d

\b
Exit status: 0 done; 1 nothing found, or not agreed to; 2 usage; 65 a file that
cannot be imported, or a damaged store; 66 no such session or file; 73, 74 and
77 the store or a file cannot be made, written or may not be; 75 another
command is at it, try again; 78 configuration. See `man myllm`.
"""


class ListingGroup(click.Group):
    """Lists where no word says what else to do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        no_word = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        if no_word and not ctx.resilient_parsing:  # which is how completion looks for the words there are
            args = ["list", *args]
        return super().parse_args(ctx, args)


session_argument = click.argument("wanted", metavar="SESSION", shell_complete=complete_session)
older_option = click.option(
    "--older-than", metavar="AGE", callback=duration, help="Only those not changed for so long, say 10d."
)


@click.group("sessions", cls=ListingGroup, epilog=EPILOG)
def sessions() -> None:
    """List, show, search and keep conversations; no word lists them.

    A session is given by its name, or by the beginning of its id, at least four characters. On a terminal
    control characters in names and messages are escaped.
    """


sessions.add_command(export)
sessions.add_command(import_sessions)


@sessions.command("list")
@click.option("-m", "--model", metavar="MODEL", shell_complete=complete_model, help="Only those with MODEL.")
@click.option("--here", is_flag=True, help="Only those begun in this directory.")
@older_option
@click.option("--newer-than", metavar="AGE", callback=duration, help="Only those changed since, say 2h.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help=f"At most N.  [default: {ON_A_PAGE} in a table, else all]",
)
@click.option("--all", "everything", is_flag=True, help="All of them, in a table, too.")
@output_options
@click.pass_obj
def list_sessions(
    streams: Streams, /, limit: int | None, everything: bool, output: str | None, **which: Any
) -> None:
    """Print the sessions, changed last first."""
    if everything and limit:
        raise UsageError("--all and -n: give one of them")
    with opened() as store:
        found = matching(store, conditions(**which))
        if not _as_text(streams, output):
            records = (session_record(each, parent_name(store, each)) for each in islice(found, limit))
            write_records(streams, records)
            return
        page = list(islice(found, None if everything else limit or ON_A_PAGE))
        _print_table(streams, store, page)
        if limit is None and next(found, None) is not None:
            streams.note(f"these are the newest {len(page)}; --all shows all, -n N so many")


def _print_table(streams: Streams, store: SessionStore, page: list[Session]) -> None:
    rows = [Row(session, short_id(store, session), parent_name(store, session)) for session in page]
    if rows:
        streams.write(session_table(rows, time.time(), streams.columns))
    else:
        streams.note("there is no session, or none that is as you say")


@sessions.command("show", short_help="Print a conversation.")
@session_argument
@click.option("-n", "--newest", type=click.IntRange(1), metavar="N", help="Only the last N messages.")
@click.option("--markdown", is_flag=True, help="Print a Markdown page, which holds reasoning and calls, too.")
@output_options
@click.pass_obj
def show(streams: Streams, wanted: str, newest: int | None, markdown: bool, output: str | None) -> None:
    """Print a conversation: as text, or its messages as JSONL, which `myllm gen` reads."""
    from dataclasses import replace

    from myllm.transcripts import markdown as page
    from myllm.transcripts import native, plain
    from myllm.transcripts.transcript import Transcript

    with opened() as store:
        session = store.find(wanted)
        shown = transcript_of(store, session)
        if newest is not None:
            shown = Transcript(replace(session, system=None), store.path(session.id, newest))
        if markdown:
            write_text(streams, page.render(shown))
        elif _as_text(streams, output):
            write_text(streams, plain.render(shown))
        else:
            if system := shown.session.system:
                write_records(streams, [{"role": "system", "content": system}])
            write_records(streams, map(native.record, shown.path()))


@sessions.command("search", short_help="Print where words are.")
@click.argument("words", nargs=-1, required=True, metavar="WORD...")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1),
    default=ON_A_PAGE,
    show_default=True,
    metavar="N",
    help="At most N places.",
)
@click.option("--best", is_flag=True, help="The most relevant first, rather than the newest.")
@output_options
@click.pass_obj
def search(streams: Streams, words: tuple[str, ...], limit: int, best: bool, output: str | None) -> int:
    """Print where all of WORDs are in one message, in any case and with any accents.

    No character is special: what is no part of a word separates words.
    """
    with opened() as store:
        hits = store.search(" ".join(words), order="best" if best else "newest", limit=limit + 1)
    if not hits:
        streams.note("no message has all of these words")
        return NOTHING_FOUND
    if _as_text(streams, output):
        for hit in hits[:limit]:
            streams.write(hit_line(hit, coloured=streams.takes_colour).encode("utf-8", "replace"))
    else:
        write_records(streams, map(hit_record, hits[:limit]))
    if len(hits) > limit:
        streams.note(f"there are more than these {limit}; -n N shows so many")
    return 0


@sessions.command("rename")
@session_argument
@click.argument("name")
@click.pass_obj
def rename(streams: Streams, wanted: str, name: str) -> None:
    """Give SESSION the name NAME."""
    with opened() as store:
        session = store.find(wanted)
        store.rename(session.id, name)
        streams.note(f"{session.name or session.id}: now {name}")


@sessions.command("fork", short_help="Begin a session that goes on from another.")
@session_argument
@click.option("--at", metavar="MESSAGE", help="Go on from this message, by its id.  [default: the last]")
@click.option("--name", metavar="NAME", help="Name of the new session.")
@output_options
@click.pass_obj
def fork(streams: Streams, wanted: str, at: str | None, name: str | None, output: str | None) -> None:
    """Begin a session that goes on from a message of SESSION, and print it.

    As text it is its name, or else its id, for -s of other commands; SESSION stays as it is. `show`
    prints the ids of messages.
    """
    with opened() as store:
        session = store.find(wanted)
        place = session.head if at is None else store.find_message(session.id, at).id
        new = store.fork(session.id, place, name)
    if _as_text(streams, output):
        write_text(streams, [f"{new.name or new.id}\n"])
    else:
        write_records(streams, [session_record(new, session.name or session.id)])


@sessions.command("rm", short_help="Remove sessions, after asking.")
@click.argument("wanted", nargs=-1, metavar="[SESSION]...", shell_complete=complete_session)
@older_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(streams: Streams, wanted: tuple[str, ...], older_than: float | None, yes: bool) -> int:
    """Remove sessions, after asking; what a fork goes on from stays with the fork."""
    if bool(wanted) == (older_than is not None):
        raise UsageError("rm: give either sessions or --older-than")
    with opened() as store:
        going = chosen(store, wanted) or list(matching(store, conditions(older_than=older_than)))
        if going and not yes and not _agreed(streams, going):
            streams.note("nothing was removed")
            return NOT_AGREED
        for session in going:
            _remove(store, session)
            streams.note(f"{described(session)}: removed")
    if not going:
        streams.note("no session is that old")
    return 0


def _remove(store: SessionStore, session: Session) -> None:
    """A session and whatever is kept for it alone, while nobody takes a turn in it."""
    with store.turn(session.id, wait_seconds=0):
        ends = [end for message in store.tree(session.id) if (end := message.answer.get("snapshot"))]
        store.remove(session.id)
    with suppress(ConfigError):
        forget(folder(), reversed(ends))


def _agreed(streams: Streams, going: list[Session]) -> bool:
    """Whether somebody says yes. Raises UsageError where nobody can be asked."""
    if not streams.can_ask:
        raise UsageError("rm: it asks before it removes, and here is no terminal; -y removes without asking")
    for session in going:
        streams.note(described(session))
    n_going = "this session" if len(going) == 1 else f"these {len(going):,} sessions"
    return streams.ask(f"remove {n_going}? [y/N]").lower() in ("y", "yes")


def _as_text(streams: Streams, output: str | None) -> bool:
    from myllm import settings

    return as_text(streams, output or settings.load().output)
