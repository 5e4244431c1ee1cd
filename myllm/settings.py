"""What the user has configured: `MYLLM_*` variables over `config.toml` over defaults.

A leaf, and on every command's way: no dataclasses, no pathlib. Owns the table of settings (`TABLE`), from
which the man page is made and by which README is checked, and the notations for durations and sizes. Flags
win over all of this and are the CLI's affair. Must not know what a setting does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from myllm import paths
from myllm.errors import ConfigError, MyllmError, PermissionDeniedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from myllm.requests import LoadOptions

DEFAULT_MODEL: Final = "smollm2"
"""What gen and chat run where nothing names a model."""
DEFAULT_EMBED_MODEL: Final = "minilm"
"""What embed runs where nothing names a model."""
OUTPUTS: Final = ("auto", "text", "jsonl")
DAEMON_MODES: Final = ("auto", "never", "always")
MODEL_TABLE: Final = "model"
"""`[model.NAME]` holds the loading options of one model."""


class Settings(NamedTuple):
    """What is configured, checked. `keep_alive` in seconds (None: for ever), sizes in bytes."""

    default_model: str | None = None
    default_embed_model: str | None = None
    output: str = "auto"
    daemon: str = "auto"
    offline: bool = False
    keep_alive: float | None = 30 * 60.0
    models_paths: tuple[Path, ...] = ()
    models_max_memory: int | None = None
    models_max_loaded: int | None = None
    models_preload: tuple[str, ...] = ()
    queue: int = 512
    snapshots_max_size: int = 4 * 2**30
    model_options: Mapping[str, LoadOptions] = MappingProxyType({})


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings in force. Reads one file at most.

    Raises ConfigError naming the file (or variable), the key and what was expected;
    PermissionDeniedError where the file may not be read.
    """
    file = paths.config_path(environ)
    values = _from_file(file)
    for setting in TABLE:
        text = environ.get(setting.variable, "")
        if text:  # an empty variable is an unset one
            values[setting.field] = setting.check(setting.variable, text)
    return Settings(**values)


# ── durations and sizes ─────────────────────────────────────────────────────────────────────

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_BYTES: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_duration(text: str) -> float:
    """Seconds in `30s`, `5m`, `2h`, `10d`, `1.5h`, `500ms`; a bare number is seconds. Raises UsageError."""
    number, unit = _split_unit(text)
    if number is None or unit not in _SECONDS:
        raise UsageError(f"expected a duration such as 30s, 5m, 2h or 10d, not {text!r:.80}")
    return number * _SECONDS[unit]


def parse_size(text: str) -> int:
    """Bytes in `512M`, `4G`, `1.5g`, `4GiB`: powers of 1024; a bare number is bytes. Raises UsageError."""
    number, unit = _split_unit(text)
    unit = unit.upper().removesuffix("B").removesuffix("I")
    if number is None or unit not in _BYTES:
        raise UsageError(f"expected a size such as 512M or 4G, not {text!r:.80}")
    return int(number * _BYTES[unit])


def parse_keep_alive(text: str) -> float | None:
    """Seconds a model stays loaded; `-1` is None, for ever; `0` is not at all. Raises UsageError."""
    return None if text.strip() == "-1" else parse_duration(text)


def _split_unit(text: str) -> tuple[float | None, str]:
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(digits) :]
    plain = digits.replace(".", "", 1)
    sound = plain.isascii() and plain.isdigit() and float(digits) < 1e15
    return (float(digits) if sound else None, unit)


# ── the table ───────────────────────────────────────────────────────────────────────────────
# A check takes where the value was found and the value (text from the environment, a TOML value
# from the file), and returns what Settings holds; it raises ConfigError.

Check = Callable[[str, Any], Any]


class Setting(NamedTuple):
    """One setting: its key in config.toml (`table.key`), its variable, its check, and a line of help."""

    key: str
    variable: str
    check: Check
    example: str
    help: str

    @property
    def field(self) -> str:
        """The attribute of Settings that holds it."""
        return self.key.replace(".", "_")


def _wrong(where: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{where}: expected {expected}, not {value!r:.80}; correct or remove it")


def _name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(where, "a model's name", value)
    return value


def _one_of(choices: tuple[str, ...]) -> Check:
    def check(where: str, value: Any) -> str:
        if value not in choices:
            raise _wrong(where, f"one of {', '.join(choices)}", value)
        return str(value)

    return check


def _flag(where: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True}
    known |= {"0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise _wrong(where, "true or false", value)
    return known[value.lower()]


def _count(where: str, value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise _wrong(where, "a whole number from 1", value)
    return number


def _notation(parse: Callable[[str], Any], expected: str) -> Check:
    """Text in one of our notations, or a bare TOML number."""

    def check(where: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise _wrong(where, expected, value)
        try:
            return parse(str(value))
        except UsageError:
            raise _wrong(where, expected, value) from None

    return check


def _texts(where: str, value: Any, separator: str, expected: str) -> list[str]:
    texts = value.split(separator) if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong(where, expected, value)
    return [text.strip() for text in texts if text.strip()]


def _folders(where: str, value: Any) -> tuple[Path, ...]:
    from pathlib import Path

    expected = "a list of absolute paths (in the environment separated by colons)"
    # os.path's expanduser leaves the ~ of an unknown user as it is, which is then not absolute.
    folders = tuple(Path(os.path.expanduser(text)) for text in _texts(where, value, os.pathsep, expected))  # noqa: PTH111
    if not all(folder.is_absolute() for folder in folders):
        raise _wrong(where, expected, value)
    return folders


def _names(where: str, value: Any) -> tuple[str, ...]:
    return tuple(_texts(where, value, ",", "a list of models' names (in the environment: by commas)"))


TABLE: Final = (
    Setting("default_model", "MYLLM_MODEL", _name, f'"{DEFAULT_MODEL}"', "model of gen and chat without -m"),
    Setting(
        "default_embed_model",
        "MYLLM_EMBED_MODEL",
        _name,
        f'"{DEFAULT_EMBED_MODEL}"',
        "model of embed without -m",
    ),
    Setting(
        "output", "MYLLM_OUTPUT", _one_of(OUTPUTS), '"jsonl"', "text, jsonl, or auto: text on a terminal"
    ),
    Setting("daemon", "MYLLM_DAEMON", _one_of(DAEMON_MODES), '"never"', "whether commands use the daemon"),
    Setting("offline", "MYLLM_OFFLINE", _flag, "true", "never fetch anything from a network"),
    Setting(
        "keep_alive",
        "MYLLM_KEEP_ALIVE",
        _notation(parse_keep_alive, "a duration such as 30m, 0 or -1"),
        '"30m"',
        "how long an idle model stays loaded; 0: not at all, -1: for ever",
    ),
    Setting(
        "models.paths", "MYLLM_MODELS_PATHS", _folders, '["/srv/models"]', "more folders with GGUF files"
    ),
    Setting(
        "models.max_memory",
        "MYLLM_MODELS_MAX_MEMORY",
        _notation(parse_size, "a size such as 512M or 4G"),
        '"8G"',
        "memory that all loaded models may take together",
    ),
    Setting(
        "models.max_loaded", "MYLLM_MODELS_MAX_LOADED", _count, "2", "models that are loaded at once, at most"
    ),
    Setting("models.preload", "MYLLM_MODELS_PRELOAD", _names, '["smollm2"]', "models loaded at start"),
    Setting("queue", "MYLLM_QUEUE", _count, "64", "requests that run or wait at once; one more is refused"),
    Setting(
        "snapshots.max_size",
        "MYLLM_SNAPSHOTS_MAX_SIZE",
        _notation(parse_size, "a size such as 512M or 4G"),
        '"1G"',
        "disk for what prompts computed, to be used again; 0: none; 4G by itself",
    ),
)
"""Every setting but `[model.NAME]`, in the order in which the documentation shows them."""


# ── the file ────────────────────────────────────────────────────────────────────────────────


def _from_file(file: str) -> dict[str, Any]:
    """The checked values of config.toml by field; empty where there is no file."""
    values: dict[str, Any] = {}
    by_key = {setting.key: setting for setting in TABLE}
    document = _read(file)
    models = document.pop(MODEL_TABLE, {})
    for key, value in _flattened(document, {key.partition(".")[0] for key in by_key if "." in key}):
        if key not in by_key:
            raise ConfigError(f"{file}: unknown key {key!r}{_nearest(key, [*by_key, 'model.NAME'])}")
        values[by_key[key].field] = by_key[key].check(f"{file}: {key}", value)
    values["model_options"] = _model_options(file, models)
    return values


def _flattened(document: Mapping[str, Any], tables: set[str]) -> Iterable[tuple[str, Any]]:
    """Keys of known tables as `table.key`; anything else as it stands."""
    for key, value in document.items():
        if key in tables and isinstance(value, dict):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def _model_options(file: str, models: Any) -> dict[str, LoadOptions]:
    if models == {}:
        return {}
    from myllm.requests import LoadOptions

    if not isinstance(models, dict):
        raise _wrong(f"{file}: {MODEL_TABLE}", "tables [model.NAME]", models)
    checked = {}
    for name, options in models.items():
        where = f"{file}: [{MODEL_TABLE}.{name}]"
        if not isinstance(options, dict):
            raise _wrong(where, "a table of loading options", options)
        known = list(LoadOptions._fields)
        if unknown := [key for key in options if key not in known]:
            if isinstance(options[unknown[0]], dict):
                raise ConfigError(
                    f"{where}: unknown table {unknown[0]!r}; "
                    f'a name with a dot needs quotes: [{MODEL_TABLE}."{name}.{unknown[0]}"]'
                )
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}{_nearest(unknown[0], known)}")
        try:
            checked[name] = LoadOptions.parse(options)
        except MyllmError as error:
            raise ConfigError(f"{where}: {error}; correct or remove it") from error
    return checked


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            data = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        raise PermissionDeniedError(f"{file}: permission denied; make it readable to you") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; correct or remove it") from error
    import tomllib  # 4 ms that a machine without a config.toml does not pay

    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: not UTF-8 text at line {line}; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not TOML: {error}; correct that line") from error


def _nearest(key: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.rpartition(".")[2] == key]
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
