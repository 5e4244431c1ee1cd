"""README.md tells the truth: its examples run in order, its tables are the program's own.

A ```console block is run in one bash, `$ ` before each command; below a command stands what it prints,
stderr included, with … for anything. Under `<!-- words vary -->` a model's words are not compared, as
they differ between processors, but for the kinds of lines they come in. Blocks of Python run, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from myllm import settings
from myllm.cli import COMMANDS, myllm
from myllm.cli.docs import EXIT_STATUS
from myllm.daemon.daemon import GRACE
from myllm.socket_file import socket_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[\w ]+) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
END = "\x1e"
"""Printed after each command, with its exit status."""
VARYING = ("token", "full_text", "completion_tokens", "timings", "embedding", "score")
"""Keys whose values depend on the processor or the clock."""
JQ = """\
import json, sys
FILTERS = {
    "select(.done).full_text": lambda r: r["full_text"] if r["done"] else None,
    "[.index, .id, .finish_reason // .error.code] | @tsv": lambda r: "\\t".join(
        str(x) for x in (r["index"], r.get("id", ""), r.get("finish_reason") or r["error"]["code"])
    ),
    "select(.error | not).id": lambda r: None if "error" in r else r["id"],
    'select(.role == "assistant").id': lambda r: r["id"] if r["role"] == "assistant" else None,
    "[.quantization, .context_length, .kv_bytes_per_token]": lambda r: json.dumps(
        [r["quantization"], r["context_length"], r["kv_bytes_per_token"]], separators=(",", ":")
    ),
}
wanted, *files = [word for word in sys.argv[1:] if not word.startswith("-")]
for line in open(files[0]) if files else sys.stdin:
    if (found := FILTERS[wanted](json.loads(line))) is not None:
        print(found)
"""
"""What jq does with the README's filters, for machines without it."""


class Example(NamedTuple):
    """A command of a console block and what should come of it."""

    block: int
    command: str
    expected: str
    words_vary: bool
    may_fail: bool


class Outcome(NamedTuple):
    output: str
    status: int


def bodies(language: str) -> list[str]:
    return [match["body"] for match in BLOCK.finditer(README) if match["language"] == language]


def examples() -> Iterator[Example]:
    """All commands of the console blocks, in order."""
    blocks = [match for match in BLOCK.finditer(README) if match["language"] == "console"]
    for number, block in enumerate(blocks):
        parts = [part.partition("\n") for part in re.split(r"^\$ ", block["body"], flags=re.M)[1:]]
        for i, (command, _, expected) in enumerate(parts):
            asked = parts[i + 1 :] and parts[i + 1][0] == "echo $?"
            yield Example(number, command, expected, block["mark"] == "words vary", bool(asked))


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def sandbox(smollm2_path: Path, minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the models are on record and the examples' files are."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data/myllm").mkdir(parents=True)
    shutil.copy(smollm2_path.parents[1] / "models.json", folder / "data/myllm")
    (folder / "report.txt").write_text("The ship reached the harbour at dawn. Its cargo was tea.\n")
    for example in EXAMPLES:
        verb, _, file = example.command.partition(" ")
        if verb == "cat":
            (folder / file).write_text(example.expected)
    (folder / "bin").mkdir()
    if not shutil.which("jq"):
        (folder / "bin/jq").write_text(f"#!{sys.executable}\n{JQ}")
        (folder / "bin/jq").chmod(0o755)
    return folder


def environment(sandbox: Path) -> dict[str, str]:
    path = os.pathsep.join((str(sandbox / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    homes = {f"XDG_{kind}_HOME": str(sandbox / kind.lower()) for kind in ("DATA", "CONFIG", "CACHE", "STATE")}
    return {"PATH": path, "HOME": str(sandbox), "LANG": "C.UTF-8", "MYLLM_OFFLINE": "1", **homes}


def run(sandbox: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=sandbox,
        env=environment(sandbox),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def outcomes(sandbox: Path) -> dict[Example, Outcome]:
    """Everything is run once, block after block, as a reader would."""
    found = {}
    try:
        _run_all(sandbox, found)
    finally:
        run(sandbox, "myllm", "load", "--stop")
    return found


def _run_all(sandbox: Path, found: dict[Example, Outcome]) -> None:
    for _, group in groupby(EXAMPLES, key=lambda example: example.block):
        block = list(group)
        mark = f"status=$?; printf '%s%d%s' {END} $status {END}; (exit $status)"
        said = run(sandbox, "bash", "-c", "\n".join(f"{e.command}\n{mark}" for e in block)).stdout.split(END)
        for example, output, status in zip(block, said[::2], said[1::2], strict=False):
            found[example] = Outcome(output, int(status))


@pytest.mark.model
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.command[:60])
def test_an_example_prints_what_stands_below_it(example: Example, outcomes: dict[Example, Outcome]) -> None:
    outcome = outcomes[example]
    assert example.may_fail or outcome.status == 0, outcome.output
    if example.words_vary:
        assert shape(outcome.output) == shape(example.expected)
    else:
        pattern = ".*".join(map(re.escape, example.expected.split("…")))
        assert re.fullmatch(pattern, outcome.output), outcome.output


def shape(output: str) -> list[Any]:
    """The kinds of lines in their order: text, or JSON without the values that vary."""
    kinds = [neutral(json.loads(line)) if line.startswith("{") else "text" for line in output.splitlines()]
    return [kind for kind, _ in groupby(kinds)]


def neutral(value: Any, key: str = "") -> Any:
    """A JSON value with the varying parts of it replaced by their types."""
    if isinstance(value, dict):
        return {name: neutral(each, "timings" if key == "timings" else name) for name, each in value.items()}
    return type(value).__name__ if key in VARYING else value


@pytest.mark.model
def test_the_python_example_prints_a_line_for_each_city(sandbox: Path) -> None:
    (source,) = bodies("python")
    ended = run(sandbox, sys.executable, "-c", source)
    assert ended.returncode == 0, ended.stdout
    assert [line.split()[0] for line in ended.stdout.splitlines() if line[:5] in ("Tokyo", "Cairo")]


@pytest.mark.model
def test_the_shell_example_gets_its_summary(sandbox: Path) -> None:
    (source,) = [body for body in bodies("sh") if "summary=" in body]
    ended = run(sandbox, "bash", "-c", f'{source}\nprintf %s "$summary"')
    assert ended.returncode == 0
    assert ended.stdout not in ("", "no summary\n")


def test_continuous_integration_runs_the_second_command_of_the_readme() -> None:
    first, second = [body.strip() for body in bodies("sh") if body.startswith("python3 -m venv")]
    assert first.endswith("myllm gen")
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == second


def test_the_exit_statuses_are_those_of_the_man_page() -> None:
    assert re.findall(r"^\| ([\d, ]+) \|", README, re.M) == [status for status, _ in EXIT_STATUS]


def test_the_settings_are_those_that_there_are() -> None:
    known = {(setting.key, setting.variable) for setting in settings.TABLE}
    shown = set(re.findall(r"^\| `([\w.]+)` \| `(MYLLM_\w+)` \|", README, re.M))
    assert shown
    assert shown <= known


def test_the_configuration_shown_is_valid(home: Path) -> None:
    (text,) = bodies("toml")
    file = home / ".config/myllm/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    loaded = settings.load()
    assert loaded.default_model == tomllib.loads(text)["default_model"]
    assert loaded.model_options["smollm2"].context == 4096


def test_the_units_shown_put_the_socket_where_commands_look() -> None:
    """%t is systemd's word for XDG_RUNTIME_DIR; it must not kill what is still given time to finish."""
    socket_unit, service = bodies("ini")
    (listen,) = re.findall(r"^ListenStream=(.*)$", socket_unit, re.M)
    assert listen.replace("%t", "/run/user/1000") == socket_path({"XDG_RUNTIME_DIR": "/run/user/1000"})
    (start,) = re.findall(r"^ExecStart=\S+/myllm (.*)$", service, re.M)
    name, *arguments = start.split()
    command = myllm.get_command(click.Context(myllm), name)
    assert command is not None
    assert command.make_context(name, arguments).params["no_http"] is True
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", service, re.M)
    assert int(stop) > GRACE


def options_of(command: click.Command, context: click.Context) -> set[str]:
    """Long options of a command and of all below it."""
    found = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= options_of(below, click.Context(below, parent=context))
    return found


def test_every_command_and_option_named_is_one_that_there_is() -> None:
    others = re.compile("pip|systemctl")
    lines = [line for line in README.splitlines() if "myllm" in line and not others.search(line)]
    commands = {name for line in lines for name in re.findall(r"\bmyllm ([a-z]+)", line)}
    assert commands <= set(COMMANDS)
    known = options_of(myllm, click.Context(myllm))
    assert {option for line in lines for option in re.findall(r"--[a-z][a-z-]+", line)} <= known
