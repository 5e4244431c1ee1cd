"""The prompt as prompt-toolkit draws it: editing, history, completion and the bottom line.

Owns all that is prompt-toolkit's; imported only where both ends are a terminal that obeys (3.0.53 prints
its prompt into a pipe, loses a last line without newline there, and in a dumb terminal Enter does not
send). Must not know commands, sessions or the client.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from myllm.cli.repl.commands import in_block
from myllm.cli.repl.completion import Completions
from myllm.cli.repl.held_input import held_input
from myllm.cli.repl.screen import Screen
from myllm.errors import MyllmError
from myllm.paths import make_private

PROMPT: Final = "> "
STYLE: Final = Style.from_dict({"bottom-toolbar": "noreverse dim"})


class PromptReader:
    """Messages from a terminal that obeys escape sequences; `bottom(columns)` is the line below."""

    def __init__(
        self, screen: Screen, history: Path, completions: Completions, bottom: Callable[[int], str]
    ) -> None:
        self._screen = screen
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            key_bindings=_bindings(),
            history=_history(history),
            completer=_NameCompleter(completions),
            complete_while_typing=False,
            complete_in_thread=True,
            enable_open_in_editor=True,
            enable_suspend=True,
            prompt_continuation=" " * len(PROMPT),
            bottom_toolbar=lambda: bottom(self._session.output.get_size().columns),
            style=STYLE,
        )

    def read(self, before: str = "") -> str:
        """The next message, which may have several lines; blocks. `before` stands there to be changed.

        Empty where Ctrl-C dropped what was typed. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C
        with nothing typed.
        """
        return _utf8(self._session.prompt(default=before))

    def awaiting(self) -> AbstractContextManager[None]:
        """While an answer comes, what is typed is kept for the next prompt."""
        return held_input(self._screen.streams.stdin, self._screen.send)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching the history

    @bindings.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # what was chosen from the menu stays
        elif in_block(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=typing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-c", filter=typing)
    @bindings.add("<sigint>", filter=typing)
    def drop(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.app.exit(result="")
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings


class _NameCompleter(Completer):
    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        with suppress(MyllmError):  # a TAB is no place for errors
            begun, names = self._completions.candidates(document.text_before_cursor)
            for name in names:
                yield Completion(name, start_position=-len(begun))


def _history(path: Path) -> History:
    """What was typed before; in memory only where the file cannot be.

    The file is made here, because prompt-toolkit would make it readable by everybody.
    """
    try:
        make_private(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except (OSError, MyllmError):
        return InMemoryHistory()
    return _FileHistory(path)


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a full disk is no reason to lose the message
            super().store_string(string)


def _utf8(text: str) -> str:
    """Bytes that were no UTF-8 come from prompt-toolkit as lone surrogates, which nothing can carry."""
    return text.encode("utf-8", "replace").decode()
