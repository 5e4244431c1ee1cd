"""What a line typed in the REPL is: a message, or a slash command with its argument.

Owns the commands' names and help. Pure: must not know what a command does, nor terminals or the store.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from textwrap import fill, indent
from typing import Final, NamedTuple

from myllm.errors import UsageError

BLOCK: Final = '"""'
_COMMAND: Final = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
"""Not `/usr/bin` and not `/* a comment */`, which are messages."""


class Command(NamedTuple):
    """A slash command: what `/help` shows of it."""

    argument: str
    summary: str
    detail: str


COMMANDS: Final[Mapping[str, Command]] = {
    "help": Command("[COMMAND]", "Show the commands, or all about one.", ""),
    "model": Command(
        "[MODEL]",
        "Go on with another model.",
        "Without MODEL: say which one answers. A name, or a path to a GGUF file; the session keeps it.",
    ),
    "system": Command(
        "[TEXT]",
        "Set the system message.",
        'Without TEXT: show it. "" takes it away. What was answered already stays as it is.',
    ),
    "set": Command(
        "[NAME [VALUE]]",
        "Set a sampling parameter.",
        "Without VALUE: back to its default. Without NAME: show what is set. Names are those of "
        "`gen --set`, and temperature, top_p, top_k, min_p, repeat_penalty, max_tokens, seed.",
    ),
    "undo": Command(
        "", "Take back the last message and its answer.", "The session keeps both, off its path."
    ),
    "retry": Command("", "Answer the last message again.", "The session keeps the old answer, off its path."),
    "edit": Command(
        "[TEXT]",
        "Change the last message and send it again.",
        "Without TEXT: it comes back to the prompt to be changed; Ctrl-C there leaves it as it was.",
    ),
    "save": Command(
        "NAME", "Name the session.", "It is saved in any case; `myllm chat -s NAME` goes on with it."
    ),
    "fork": Command("[NAME]", "Go on in a copy of the session.", "The old one stays as it is now."),
    "sessions": Command(
        "[SESSION]", "Show the sessions, or go to one.", "SESSION is a name, or the beginning of an id."
    ),
    "tokens": Command("", "Show how full the window is, and how fast the last answer came.", ""),
    "copy": Command(
        "[N]",
        "Copy the last answer, or its code block N.",
        "By the terminal (OSC 52), so that it works over ssh, too, where the terminal allows it.",
    ),
    "file": Command(
        "[PATH]",
        "Give a text file to the model with the next message.",
        "Without PATH: show those that wait; - lets them go. @PATH in a message of one line does the same.",
    ),
    "quit": Command("", "Leave; so does Ctrl-D.", ""),
}

KEYS: Final = (
    'Enter sends; Alt-Enter begins a new line, and so does Enter between """ and """.',
    "Tab completes commands, sessions, models, and files after /file or @.",
    "Ctrl-C stops an answer and keeps what came; Ctrl-D leaves.",
    "Ctrl-X Ctrl-E opens what is typed in $EDITOR.",
    "A message that begins with / needs a space before it.",
)
_WIDE: Final = 80
"""Columns in which a command and its summary have room beside each other."""


class Invoked(NamedTuple):
    """A command, and what stands after it."""

    name: str
    argument: str


class Said(NamedTuple):
    """A message to the model; empty where nothing was typed."""

    text: str


def parse(typed: str) -> Invoked | Said:
    """What was typed, as one or the other. Raises UsageError for an unknown command, naming the nearest.

    A text of several lines that begins with an unknown command is no mistake but a message.
    """
    if not (match := _COMMAND.fullmatch(typed.rstrip())):
        return Said(unquoted(typed))
    name, argument = match[1].lower(), (match[2] or "").strip()
    if name in COMMANDS:
        return Invoked(name, argument)
    if "\n" in typed.strip():
        return Said(typed)
    near = get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean /{near[0]}?" if near else "/help shows those there are"
    raise UsageError(f"no command /{name}: {hint}")


def in_block(typed: str) -> bool:
    '''Whether a block that a leading `"""` began is still open, so that Enter does not send.'''
    return typed.lstrip().startswith(BLOCK) and typed.count(BLOCK) == 1


def unquoted(typed: str) -> str:
    '''The message without the blank around it, and without `"""` where it is one whole block.

    Text with more of them, such as a Python file, is nobody's block and stays as it is.
    '''
    text = typed.strip()
    if text.startswith(BLOCK) and text.endswith(BLOCK) and text.count(BLOCK) == 2:
        return text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n")
    return text


def help_text(name: str, columns: int) -> str:
    """What `/help NAME` shows in lines of at most `columns`; all commands and keys for no name.

    Raises UsageError.
    """
    if not name:
        commands = [_summary(each, columns) for each in COMMANDS]
        return "\n".join([*commands, "", *(fill(line, columns) for line in KEYS)])
    found = parse(f"/{name.removeprefix('/')}")
    if not isinstance(found, Invoked):
        raise UsageError(f"no command {name!r}: /help shows those there are")
    paragraphs = (_usage(found.name), COMMANDS[found.name].summary, COMMANDS[found.name].detail)
    return "\n".join(fill(paragraph, columns) for paragraph in paragraphs if paragraph)


def _usage(name: str) -> str:
    return f"/{name} {COMMANDS[name].argument}".rstrip()


def _summary(name: str, columns: int) -> str:
    """A command and what it does, beside each other or, where it is narrow, one below the other."""
    if columns < _WIDE:
        return f"{_usage(name)}\n{indent(fill(COMMANDS[name].summary, columns - 4), ' ' * 4)}"
    return f"{_usage(name):<20} {COMMANDS[name].summary}"
