"""What each slash command does.

Owns the table `ACTIONS`, beside commands.py's of their help. Must not know how commands are typed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from myllm.cli import attachments
from myllm.cli.options import absolute
from myllm.cli.output import statistics
from myllm.cli.repl import bottom_line
from myllm.cli.repl.chat import assigned
from myllm.cli.repl.code_blocks import clipboard_sequence, code_blocks
from myllm.cli.repl.commands import help_text
from myllm.cli.repl.talk import Talk, shortened
from myllm.cli.table import table
from myllm.errors import UsageError

_LISTED: Final = 20
"""Sessions that `/sessions` shows; `myllm sessions` shows all."""
_NOTHING: Final = '""'
"""How a user says: no text at all."""


class Quit(Exception):
    """The user leaves."""


def _help(talk: Talk, argument: str) -> None:
    talk.screen.say(help_text(argument, talk.screen.columns))


def _quit(talk: Talk, argument: str) -> None:
    raise Quit


# ── what the next message is sent with ──────────────────────────────────────────────────────


def _model(talk: Talk, argument: str) -> None:
    if argument:
        talk.chat.model = absolute(argument)
        talk.keep_settings()
    talk.screen.say(f"model: {talk.chat.model or talk.chat.last.get('model') or 'the default'}")


def _system(talk: Talk, argument: str) -> None:
    if argument:
        talk.chat.system = None if argument == _NOTHING else argument
        talk.keep_settings()
    talk.screen.say(f"system: {talk.chat.system or 'none'}")


def _set(talk: Talk, argument: str) -> None:
    if argument:
        talk.chat.settings = assigned(talk.chat.settings, argument)
        talk.keep_settings()
    settings = talk.chat.settings
    talk.screen.say(
        ", ".join(f"{name} {value}" for name, value in settings.items()) or "all settings are the defaults"
    )


def _file(talk: Talk, argument: str) -> None:
    if argument == "-":
        talk.chat.files = []
    elif argument:
        talk.chat.files.append(attachments.read(argument))
    names = [f"{name} ({len(text):,} characters)" for name, text in talk.chat.files]
    talk.screen.say(f"with the next message: {', '.join(names)}" if names else "no file waits")


# ── where the conversation goes on ──────────────────────────────────────────────────────────


def _undo(talk: Talk, argument: str) -> None:
    asked = talk.last_exchange().asked
    talk.chat.session = talk.store.move_head(talk.session().id, asked.parent)
    talk.look_back()
    talk.screen.say(f"undone: {shortened(asked.content)}")


def _retry(talk: Talk, argument: str) -> None:
    asked = talk.last_exchange().asked
    talk.say_instead(asked, asked.content)


def _fork(talk: Talk, argument: str) -> None:
    old = talk.session()
    talk.chat.session = new = talk.store.fork(old.id, name=argument or None)
    talk.screen.say(f"session {bottom_line.session_name(new)}, from {bottom_line.session_name(old)}")


def _save(talk: Talk, argument: str) -> None:
    if not argument:
        raise UsageError("save: it takes a NAME; without, the session is saved under its id")
    talk.chat.session = talk.store.rename(talk.begin().id, argument)
    talk.screen.say(f"session {argument}")


def _sessions(talk: Talk, argument: str) -> None:
    if argument:
        talk.enter(talk.store.find(argument))
        talk.show_last()
        return
    rows = [
        (session.name or session.id, f"{session.n_messages:,}", session.model or "")
        for session in talk.store.page(limit=_LISTED)
    ]
    shown = table([("SESSION", "MESSAGES", "MODEL"), *rows]).decode()
    talk.screen.say(shown.rstrip() if rows else "no sessions yet")


# ── the last answer ─────────────────────────────────────────────────────────────────────────


def _tokens(talk: Talk, argument: str) -> None:
    if not talk.chat.last:
        raise UsageError("tokens: nothing has been answered yet")
    usage = talk.chat.last.get("usage", {})
    shown = (
        bottom_line.window_used(usage),
        bottom_line.messages_dropped(usage),
        statistics(dict(talk.chat.last)),
    )
    talk.screen.say("\n".join(filter(None, shown)))


def _copy(talk: Talk, argument: str) -> None:
    text = talk.chat.answer
    if not text:
        raise UsageError("copy: nothing has been answered yet")
    if argument:
        blocks = code_blocks(text)
        if not argument.isdecimal() or not 0 < int(argument) <= len(blocks):
            raise UsageError(f"copy: the answer has {len(blocks)} code blocks; {argument} is none of them")
        text = blocks[int(argument) - 1]
    if not talk.screen.obeys:
        raise UsageError("copy: this terminal has no clipboard that could be reached")
    talk.screen.send(clipboard_sequence(text))
    talk.screen.say(f"copied {len(text):,} characters")


Action = Callable[[Talk, str], None]
ACTIONS: Final[Mapping[str, Action]] = {
    "help": _help,
    "model": _model,
    "system": _system,
    "set": _set,
    "undo": _undo,
    "retry": _retry,
    "save": _save,
    "fork": _fork,
    "sessions": _sessions,
    "tokens": _tokens,
    "copy": _copy,
    "file": _file,
    "quit": _quit,
}
"""All but `/edit`, which is the prompt's affair, too."""
