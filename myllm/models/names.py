"""Model names: what may be one, what is a path instead, how one is made of a file's name, and how the
parts of a split model are called.

Owns the rules alone; light, so that the command line may ask before anything is loaded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from myllm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

MAX_NAME: Final = 100
"""Characters in a name that is given or made; names found in other programs' stores may be longer."""

PART_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""llama.cpp's name of a part of a split model (llama_split_path)."""
_PREFIX: Final = r"[a-z]{2,}:"
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._+:/@-]*"
_SUFFIX: Final = r"(?i)(-\d{5}-of-\d{5})?(\.gguf)?$"
_HARMFUL: Final = r"[^A-Za-z0-9._+-]+"
_PATH_STARTS: Final = ("/", "./", "../", "~/")
_PATH_ENDS: Final = (".gguf", ".fake.json")


def is_path(text: str) -> bool:
    """Whether a user who wrote `text` for a model means a file: by how it starts or ends, not by looking."""
    return text.startswith(_PATH_STARTS) or (text.lower().endswith(_PATH_ENDS) and not has_prefix(text))


def has_prefix(text: str) -> bool:
    """Whether `text` names a source, such as `hf:…`, and not a model or a path."""
    return re.match(_PREFIX, text) is not None


def checked_name(name: str) -> str:
    """`name` where it may be given to a model. Raises UsageError."""
    if len(name) > MAX_NAME or not re.fullmatch(_NAME, name) or is_path(name) or has_prefix(name):
        raise UsageError(
            f"name {name!r:.120}: expected at most {MAX_NAME} letters, digits and ._+:/@-, no path or source"
        )
    return name


def name_from(text: str) -> str:
    """A model name made of a file's or package's name: harmless characters, no suffix, no part number."""
    stem = re.sub(_SUFFIX, "", text.rpartition("/")[2])
    name = re.sub(_HARMFUL, "-", stem).strip("-._+")[:MAX_NAME]
    if not name:
        raise UsageError(f"{text!r:.80}: no name can be made of it; give one with --name")
    return name


def parts_named(path: Path) -> list[Path]:
    """The files of a model by name alone: all parts where `path` is called like the first, else itself."""
    part = PART_NAME.fullmatch(path.name)
    if part is None or int(part["number"]) != 1:
        return [path]
    later = range(2, int(part["count"]) + 1)
    return [path, *(path.with_name(f"{part['stem']}-{n:05}-of-{part['count']}.gguf") for n in later)]
