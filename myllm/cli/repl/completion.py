"""What TAB offers: slash commands, models, sessions, parameters, and files after `/file` and `@`.

Pure but for looking into folders. Must not know prompt-toolkit, the store or the registry: who makes a
`Completions` says where names come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from myllm.cli.attachments import at
from myllm.cli.repl.chat import SETTINGS
from myllm.cli.repl.commands import COMMANDS

_COMMAND_BEGUN: Final = re.compile(r"/([A-Za-z]*)")
_ARGUMENT_BEGUN: Final = re.compile(r"/([A-Za-z]+)\s+(.*)")
_MENTION_BEGUN: Final = re.compile(r"(?:.*\s)?@(\S*)")


@dataclass(frozen=True, slots=True)
class Completions:
    """Candidates for what has been typed. `models` and `sessions` may be slow: they are asked when needed."""

    models: Callable[[], Iterable[str]]
    sessions: Callable[[], Iterable[str]]

    def candidates(self, typed: str) -> tuple[str, list[str]]:
        """The last piece of `typed`, the text before the cursor, and what can stand in its place."""
        if "\n" in typed:
            return "", []
        if match := _COMMAND_BEGUN.fullmatch(typed):
            return typed, [f"/{name}" for name in COMMANDS if name.startswith(match[1].lower())]
        if match := _ARGUMENT_BEGUN.fullmatch(typed):
            return match[2], self._arguments(match[1].lower(), match[2])
        if match := _MENTION_BEGUN.fullmatch(typed):
            return match[1], [path for path in files(match[1]) if not re.search(r"\s", path)]
        return "", []

    def _arguments(self, command: str, begun: str) -> list[str]:
        known: dict[str, Callable[[], Iterable[str]]] = {
            "help": lambda: COMMANDS,
            "set": lambda: SETTINGS,
            "sessions": self.sessions,
            "model": lambda: [*self.models(), *files(begun)] if begun else self.models(),
            "file": lambda: files(begun),
        }
        names = known[command]() if command in known else ()
        return [name for name in dict.fromkeys(names) if name.startswith(begun)]


def files(begun: str) -> list[str]:
    """Paths that begin so, folders with a slash at their end; hidden ones only where a dot was typed."""
    head, slash, last = begun.rpartition("/")
    try:
        folder = at(head + slash)
        found = [
            f"{head}{slash}{path.name}{'/' if path.is_dir() else ''}"
            for path in folder.iterdir()
            if path.name.startswith(last) and path.name.isprintable()
            if last or not path.name.startswith(".")
        ]
    except (OSError, ValueError):  # no such folder, a NUL
        return []
    return sorted(found)
