"""Variables win over config.toml, config.toml over defaults; a mistake is named with its place."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm import paths
from myllm.errors import ConfigError, PermissionDeniedError, UsageError
from myllm.requests import LoadOptions
from myllm.settings import (
    TABLE,
    Settings,
    load,
    parse_duration,
    parse_keep_alive,
    parse_size,
)

EVERYTHING = """
default_model = "smollm2"
default_embed_model = "minilm"
output = "jsonl"
daemon = "never"
offline = true
keep_alive = "2h"
queue = 16

[models]
paths = ["/srv/models", "~/models"]
max_memory = "4G"
max_loaded = 2
preload = ["smollm2", "minilm"]

[model.smollm2]
context = 4096
kv_type = "q8_0"

[model."llama-3.2"]
threads = 3
"""


@pytest.fixture
def config(home: Path) -> Path:
    file = Path(paths.config_path())
    file.parent.mkdir(parents=True)
    return file


def test_without_a_file_the_defaults_hold() -> None:
    assert load() == Settings()
    assert Settings().keep_alive == 1800
    assert (Settings().output, Settings().daemon, Settings().offline) == ("auto", "auto", False)


def test_every_key_of_the_file_is_read(config: Path, home: Path) -> None:
    config.write_text(EVERYTHING)
    assert load() == Settings(
        default_model="smollm2",
        default_embed_model="minilm",
        output="jsonl",
        daemon="never",
        offline=True,
        keep_alive=7200,
        models_paths=(Path("/srv/models"), home / "models"),
        models_max_memory=4 * 2**30,
        models_max_loaded=2,
        queue=16,
        models_preload=("smollm2", "minilm"),
        model_options={
            "smollm2": LoadOptions(context=4096, kv_type="q8_0"),
            "llama-3.2": LoadOptions(threads=3),
        },
    )


def test_variables_win_over_the_file(config: Path) -> None:
    config.write_text(EVERYTHING)
    given = {
        "MYLLM_MODEL": "other",
        "MYLLM_EMBED_MODEL": "e5",
        "MYLLM_OUTPUT": "text",
        "MYLLM_DAEMON": "always",
        "MYLLM_OFFLINE": "0",
        "MYLLM_KEEP_ALIVE": "-1",
        "MYLLM_MODELS_PATHS": "/a:/b",
        "MYLLM_MODELS_MAX_MEMORY": "512M",
        "MYLLM_MODELS_MAX_LOADED": "3",
        "MYLLM_QUEUE": "7",
        "MYLLM_MODELS_PRELOAD": "a, b",
        "MYLLM_SNAPSHOTS_MAX_SIZE": "1G",
    }
    assert set(given) == {setting.variable for setting in TABLE}
    settings = load({**os.environ, **given})
    assert settings == Settings(
        default_model="other",
        default_embed_model="e5",
        output="text",
        daemon="always",
        offline=False,
        keep_alive=None,
        models_paths=(Path("/a"), Path("/b")),
        models_max_memory=512 * 2**20,
        models_max_loaded=3,
        queue=7,
        models_preload=("a", "b"),
        snapshots_max_size=2**30,
        model_options=settings.model_options,
    )


def test_an_empty_variable_is_an_unset_one(config: Path) -> None:
    config.write_text('default_model = "smollm2"\n')
    assert load({**os.environ, "MYLLM_MODEL": "", "MYLLM_OFFLINE": ""}).default_model == "smollm2"


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_a_flag_is_said_in_the_usual_words(text: str) -> None:
    assert load({**os.environ, "MYLLM_OFFLINE": text}).offline is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('default_modle = "x"', "unknown key 'default_modle'; did you mean 'default_model'?"),
        ('[models]\npath = ["/x"]', "unknown key 'models.path'; did you mean 'models.paths'?"),
        ('preload = ["x"]', "unknown key 'preload'; did you mean 'models.preload'?"),
        ("zzz = 1", "unknown key 'zzz'; known: default_model, "),
        ("models = 1", "unknown key 'models'"),
        ("default_model = 3", "default_model: expected a model's name, not 3"),
        ('default_model = ""', "default_model: expected a model's name"),
        ('output = "xml"', "output: expected one of auto, text, jsonl, not 'xml'"),
        ('daemon = ["never"]', "daemon: expected one of auto, never, always"),
        ('offline = "maybe"', "offline: expected true or false, not 'maybe'"),
        ("offline = 2", "offline: expected true or false, not 2"),
        ('keep_alive = "soon"', "keep_alive: expected a duration"),
        ("keep_alive = true", "keep_alive: expected a duration"),
        ('models.max_memory = "lots"', "models.max_memory: expected a size"),
        ("models.max_memory = nan", "models.max_memory: expected a size"),
        ("models.paths = [1]", "models.paths: expected a list of absolute paths"),
        ('models.paths = ["here"]', "models.paths: expected a list of absolute paths"),
        ("models.preload = {}", "models.preload: expected a list of models' names"),
        ("model = 1", "model: expected tables [model.NAME]"),
        ("model.x = 1", "[model.x]: expected a table of loading options"),
        ("[model.x]\ncontex = 1", "[model.x]: unknown key 'contex'; did you mean 'context'?"),
        ("[model.x]\ncontext = 0", "[model.x]: context: expected a whole number from 1"),
        ('[model.x]\nkv_type = "f8"', "[model.x]: kv_type: expected one of f32, f16"),
        ("[model.llama3.2]\ncontext = 1", 'a name with a dot needs quotes: [model."llama3.2"]'),
    ],
)
def test_a_mistake_names_the_file_the_key_and_what_was_expected(
    config: Path, text: str, message: str
) -> None:
    config.write_text(text)
    with pytest.raises(ConfigError) as error:
        load()
    assert str(error.value).startswith(str(config))
    assert message in str(error.value)
    assert error.value.exit_status == 78


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MYLLM_MODEL", " "),
        ("MYLLM_EMBED_MODEL", " "),
        ("MYLLM_OUTPUT", "json"),
        ("MYLLM_DAEMON", "yes"),
        ("MYLLM_OFFLINE", "?"),
        ("MYLLM_KEEP_ALIVE", "-2"),
        ("MYLLM_MODELS_PATHS", "/a:b"),
        ("MYLLM_MODELS_PATHS", "~nobody-has-this-name/models"),
        ("MYLLM_MODELS_MAX_MEMORY", "4 GB"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable}: expected "):
        load({**os.environ, variable: text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'output = "text"\ndaemon = never\n', "line 2"),
        (b'output = "text"\n\n[models\n', "line 3"),
        (b'output = "text"\noutput = "text"\n', "line 2"),
        (b'# caf\xe9\noutput = "text"', "not UTF-8 text at line 1"),
        (b'output = "text"\n# caf\xe9', "not UTF-8 text at line 2"),
        (b"a = " + b"[" * 5000, "not TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_named_with_its_line(config: Path, content: bytes, message: str) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load()
    assert str(config) in str(error.value)


def test_a_file_that_cannot_be_read_is_told(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # as root, no mode refuses
    with pytest.raises(PermissionDeniedError, match="permission denied"):
        load()


def test_the_table_covers_every_setting_and_its_examples_are_valid(config: Path) -> None:
    assert [setting.field for setting in TABLE] == [
        name for name in Settings._fields if name != "model_options"
    ]
    config.write_text("".join(f"{setting.key} = {setting.example}\n" for setting in TABLE))
    settings = load()
    for setting in TABLE:
        assert (
            getattr(settings, setting.field) != getattr(Settings(), setting.field)
            or setting.key == "keep_alive"
        )
        assert setting.help


def test_loading_imports_nothing_heavy() -> None:
    code = "import sys, myllm.settings as s; s.load(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tomllib", "asyncio", "subprocess", "numpy", "click", "difflib"} & set(run.stdout.split())


# ── durations and sizes ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("5m", 300),
        ("2h", 7200),
        ("10d", 864_000),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("7", 7),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * 2**20),
        ("4G", 2**32),
        ("4GiB", 2**32),
        ("4gb", 2**32),
        ("1.5k", 1536),
        ("2T", 2**41),
        ("7", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "1 s", "5x", "1e3s", "nan", "inf", "1..5s", "٣s", "1_0s", "9" * 400]
)
def test_what_is_neither_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected a duration"):
        parse_duration(text)
    with pytest.raises(UsageError, match="expected a size"):
        parse_size(text)


def test_minus_one_keeps_alive_for_ever() -> None:
    assert parse_keep_alive("-1") is None
    assert parse_keep_alive("0") == 0
    with pytest.raises(UsageError):
        parse_keep_alive("-2")


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_usage_error(text: str) -> None:
    for parse in (parse_duration, parse_size):
        with suppress(UsageError):
            assert 0 <= parse(text) < float("inf")
