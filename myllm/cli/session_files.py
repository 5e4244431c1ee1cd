"""`myllm sessions export` and `import`: kept sessions ⇄ files, MyLLM's own and other programs'.

Owns their options, under which name an import is kept, and what is said of it. What is in a file is the
concern of myllm/transcripts, what can be kept the store's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from myllm.cli.console import Streams
from myllm.cli.session_choice import chosen, complete_session, matching, opened
from myllm.cli.session_pages import transcript_of, write_json, write_text
from myllm.cli.session_table import described
from myllm.conversation import LOCAL, Message, Session
from myllm.errors import MyllmError, UsageError
from myllm.storage.session_store import LONGEST_NAME, check_name
from myllm.transcripts import FORMATS

if TYPE_CHECKING:
    from myllm.storage.session_store import SessionStore
    from myllm.transcripts.transcript import Notes, Transcript

STDIN: Final = "-"


@click.command("export")
@click.argument("wanted", nargs=-1, metavar="[SESSION]...", shell_complete=complete_session)
@click.option("--all", "everything", is_flag=True, help="All sessions.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jsonl", "openai", "markdown"]),
    default="jsonl",
    show_default=True,
    help="jsonl holds everything, and import takes it back; openai is a line of messages for each session.",
)
@click.pass_obj
def export(streams: Streams, wanted: tuple[str, ...], everything: bool, format_: str) -> None:
    """Write sessions to stdout.

    Only jsonl has what is off the conversation's path, such as answers that were tried again.
    """
    from myllm.transcripts import markdown, native, openai

    if bool(wanted) == everything:
        raise UsageError("export: give either sessions or --all")
    with opened() as store:
        found = list(matching(store, {})) if everything else chosen(store, wanted)
        for session in sorted(found, key=lambda session: session.id):  # a fork after what it shares with
            transcript = transcript_of(store, session)
            if format_ == "markdown":
                write_text(streams, markdown.render(transcript))
            else:
                write_json(streams, (native if format_ == "jsonl" else openai).export(transcript))


@click.command("import", short_help="Keep the conversations in files.")
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path())
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of all FILEs.  [default: recognised]")
@click.option(
    "--name", metavar="NAME", help="What the session is called; of several, the others are numbered."
)
@click.pass_obj
def import_sessions(streams: Streams, files: tuple[str, ...], format_: str | None, name: str | None) -> None:
    """Keep the conversations in FILEs, or on stdin: MyLLM's exports, and what other programs keep.

    Those are OpenAI's messages, Claude Code's and Codex' session files, ChatGPT's conversations.json, and
    the logs.db of llm. A conversation is kept whole or not at all, and those before a broken one stay.
    stderr says what each is called now, and what could not be kept as it was.
    """
    if not files and streams.stdin_is_terminal:
        raise UsageError("import: no FILE, and stdin is a terminal; - reads it nevertheless")
    if name is not None:
        check_name(name)
    failures: list[MyllmError] = []
    with opened() as store:
        for file in files or (STDIN,):
            try:
                _import_file(streams, store, file, format_, name)
            except MyllmError as error:
                failures.append(error)
    for failure in failures[:-1]:
        streams.report(failure)
    if failures:
        raise failures[-1]


def _import_file(
    streams: Streams, store: SessionStore, file: str, format_: str | None, name: str | None
) -> None:
    from myllm.transcripts.transcript import Notes

    notes = Notes()
    try:
        for transcript in _read(streams, file, notes, format_):
            given = replace(transcript.session, name=name or transcript.session.name)
            kept = _kept(store, given, transcript.messages)
            streams.note("; ".join([f"{described(kept)}: imported", *_changes(given, kept)]))
    finally:
        for line in notes.lines():
            streams.note(f"{file if file != STDIN else 'stdin'}: not kept as it was: {line}")


def _read(streams: Streams, file: str, notes: Notes, format_: str | None) -> Iterator[Transcript]:
    from myllm.transcripts.importing import read, read_stream

    if file != STDIN:
        yield from read(Path(file), notes, format_)
        return
    streams.await_input("conversations to import on stdin")
    with open(streams.stdin, "rb", buffering=0, closefd=False) as raw:
        yield from read_stream(raw, "stdin", notes, format_)


def _kept(store: SessionStore, given: Session, messages: Iterable[Message]) -> Session:
    """The session as it is kept: the local user's, under its name or one like it that is free."""
    named = _soundly_named(replace(given, owner=LOCAL))
    tried, numbers = named, count(2)
    while True:
        try:
            return store.import_session(tried, messages)
        except UsageError:  # the name is taken
            if named.name is None:
                raise
            tried = replace(named, name=_numbered(named.name, next(numbers)))


def _soundly_named(session: Session) -> Session:
    """The session, what cannot be its name being its title."""
    try:
        if session.name is not None:
            check_name(session.name)
    except UsageError:
        return replace(session, name=None, extra={"title": session.name, **session.extra})
    return session


def _numbered(name: str, number: int) -> str:
    end = f"-{number}"
    return name[: LONGEST_NAME - len(end)] + end


def _changes(given: Session, kept: Session) -> Iterator[str]:
    """What is not as the file says, beside what the notes tell."""
    from myllm.storage.session_ids import parsed

    if kept.name is None and given.name is not None:
        yield f"{given.name!r:.80} cannot be a name"
    elif kept.name != given.name:
        yield f"the name {given.name!r} is taken"
    if given.owner != LOCAL:
        yield f"it was of {given.owner!r:.80}"
    if parsed(given.id) and (kept.id, kept.head) != (given.id, given.head):
        yield "with new ids, as its own are taken"
