"""The REPL's loop: read a message or a command, do it, go on, until the user leaves.

Owns `converse`, the way in, and what survives what: an error is one line, and the loop goes on. Must not
know what a command does or how a turn runs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from myllm.cli.console import Streams
from myllm.cli.repl.actions import ACTIONS, Quit
from myllm.cli.repl.bottom_line import bottom_line
from myllm.cli.repl.chat import begun
from myllm.cli.repl.commands import Invoked, Said, parse
from myllm.cli.repl.completion import Completions
from myllm.cli.repl.screen import Screen
from myllm.cli.repl.signals import Ended, Signals
from myllm.cli.repl.talk import Talk
from myllm.cli.repl.turn import TurnClient, Turns
from myllm.conversation import Message, Session
from myllm.errors import MyllmError
from myllm.paths import state_dir
from myllm.settings import Settings
from myllm.storage.session_store import SessionStore

HISTORY: Final = "chat_history"
"""In the state folder: what was typed."""


class Reader(Protocol):
    """Where messages are typed."""

    def read(self, before: str = "") -> str:
        """The next one, blank where there is none; `before` is what it is to replace.

        Raises EOFError where the user leaves, KeyboardInterrupt.
        """

    def awaiting(self) -> AbstractContextManager[None]:
        """Holds while something is done that takes its time."""


def converse(
    streams: Streams,
    open_client: Callable[[], TurnClient],
    store: SessionStore,
    settings: Settings,
    session: Session | None,
    request: Mapping[str, Any],
) -> int:
    """A conversation at the terminal, until the user leaves: the exit status.

    `session` is the one to go on with, None to begin one at the first message. `request` holds what the
    command's options say of every turn (model, system, sampling parameters, loading options, …), without
    `op`, `prompt` and `session`. SIGTERM ends the process by that signal, once the terminal is as it was.

    Raises ConfigError where there is no home, UnavailableError where there is no Runtime to begin with, and
    IOFailureError and BrokenPipeError where nobody reads what is said.
    """
    screen = Screen(streams)
    chat = begun(request, session, os.getcwd())  # noqa: PTH109 — a request's text
    try:
        with Signals() as signals:
            turns = Turns(screen, signals, open_client)
            talk = Talk(screen, store, turns, chat)
            try:
                turns.open()  # so that a worker starts while the first message is typed
                if session is not None:
                    talk.look_back()
                    talk.show_last()
                Loop(talk, _reader(screen, talk, settings)).run()
            finally:
                turns.close()
    except Ended as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.number)
    return 0


class Loop:
    """Reads and does, one after the other."""

    def __init__(self, talk: Talk, reader: Reader) -> None:
        self._talk = talk
        self._reader = reader
        self._edited: Message | None = None
        """What the next message replaces."""

    def run(self) -> None:
        """Until the user leaves. Raises what is no MyllmError."""
        while True:
            edited, self._edited = self._edited, None
            try:
                typed = self._reader.read(_as_typed(edited.content) if edited else "")
            except KeyboardInterrupt:
                self._talk.screen.streams.note("Ctrl-D leaves")
                continue
            except EOFError:
                return
            try:
                with self._reader.awaiting():
                    self._do(typed, edited)
            except Quit:
                return
            except KeyboardInterrupt:
                self._talk.screen.streams.note("stopped")
            except MyllmError as error:
                self._talk.screen.streams.report(error)

    def _do(self, typed: str, edited: Message | None) -> None:
        match parse(typed):
            case Said(""):
                return
            case Said(text) if edited:
                self._talk.say_instead(edited, text)
            case Said(text):
                self._talk.say(text)
            case Invoked("edit", ""):
                self._edited = self._talk.last_exchange().asked
            case Invoked("edit", text):
                self._talk.say_instead(self._talk.last_exchange().asked, text)
            case Invoked(name, argument):
                ACTIONS[name](self._talk, argument)


def _as_typed(message: str) -> str:
    """The message as who typed it had to type it."""
    return f" {message}" if message.startswith("/") else message


def _reader(screen: Screen, talk: Talk, settings: Settings) -> Reader:
    if not (screen.obeys and screen.streams.stdin_is_terminal):
        from myllm.cli.repl.plain import PlainReader

        return PlainReader(screen.streams)
    from myllm.cli.repl.prompt import PromptReader

    completions = Completions(lambda: _models(settings), lambda: _sessions(talk.store))
    return PromptReader(
        screen, state_dir() / HISTORY, completions, lambda columns: bottom_line(talk.chat, columns)
    )


def _models(settings: Settings) -> Iterable[str]:
    from myllm.models.registry import Registry

    registry = Registry(settings)
    yield from (model.name for model in registry.recorded())
    yield from (entry.name for entry in registry.not_pulled())


def _sessions(store: SessionStore) -> Iterable[str]:
    return [session.name or session.id for session in store.page()]
