"""Where MyLLM's files live: the XDG base directories, each with a `myllm` folder inside.

A leaf. Every function but `make_private` only computes a path and creates nothing. Must not
know what is kept in these folders. Imports pathlib only when a Path is asked for: it costs a warm
command 3 ms, and all that one needs is `config_path` and `runtime_folder`.

The rules are those of the XDG Base Directory Specification 0.8: a variable that is empty or not
absolute is ignored. They are resolved here rather than by `xdg-base-dirs` because that library
raises RuntimeError where there is no home even when the wanted `XDG_*` variable is set, and takes
an empty `HOME` for `/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from myllm.errors import CannotCreateError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FOLDER: Final = "myllm"
PRIVATE: Final = 0o700


def config_path(environ: Mapping[str, str] = os.environ) -> str:
    """`$XDG_CONFIG_HOME/myllm/config.toml`, as text. Raises ConfigError where there is no home."""
    return os.path.join(_base("XDG_CONFIG_HOME", ".config", environ), FOLDER, "config.toml")


def data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_DATA_HOME/myllm`: pulled models. Raises ConfigError where there is no home."""
    return _path(_base("XDG_DATA_HOME", ".local/share", environ), FOLDER)


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/myllm`: what can be deleted and made again. Raises ConfigError without a home."""
    return _path(_base("XDG_CACHE_HOME", ".cache", environ), FOLDER)


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_STATE_HOME/myllm`: sessions and logs. Raises ConfigError where there is no home."""
    return _path(_state(environ))


def runtime_folder(environ: Mapping[str, str] = os.environ) -> str:
    """`$XDG_RUNTIME_DIR/myllm` as text, for sockets; without (macOS, cron) `run` in the state folder.

    Raises ConfigError where there is neither such a folder nor a home.
    """
    given = environ.get("XDG_RUNTIME_DIR", "")
    return os.path.join(given, FOLDER) if os.path.isabs(given) else os.path.join(_state(environ), "run")


def make_private(folder: Path) -> Path:
    """`folder`, created with whatever parents are missing, all of them 0700 whatever the umask.

    A folder that exists is left as it is. Raises CannotCreateError.
    """
    try:
        for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            missing.mkdir(PRIVATE, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(20, "it is not a folder")
    except OSError as error:
        raise CannotCreateError(
            f"{folder}: cannot be created: {error.strerror}; make it writable, or set another XDG folder"
        ) from error
    return folder


def _path(*parts: str) -> Path:
    from pathlib import Path

    return Path(*parts)


def _state(environ: Mapping[str, str]) -> str:
    return os.path.join(_base("XDG_STATE_HOME", ".local/state", environ), FOLDER)


def _base(variable: str, under_home: str, environ: Mapping[str, str]) -> str:
    given = environ.get(variable, "")
    if os.path.isabs(given):
        return given
    home = _home(environ)
    if home is None:
        raise ConfigError(
            f"home folder: HOME is not set and user {os.getuid()} has none in the password database; "
            f"set HOME, or {variable} to an absolute path"
        )
    return os.path.join(home, under_home)


def _home(environ: Mapping[str, str]) -> str | None:
    """`$HOME`, else what the password database says, else None; never a made-up folder."""
    given = environ.get("HOME", "")
    if os.path.isabs(given):
        return given
    import pwd  # not on the warm path: a login always has HOME

    try:
        entry = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None
    return entry if os.path.isabs(entry) else None
