"""How the program ends: exit statuses, signals, and what is said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from myllm import __version__
from myllm.cli import COMMANDS

from .conftest import MYLLM, Run

FakeModel = Callable[..., Path]


def test_help_lists_every_command_with_its_line(run: Run) -> None:
    ended = run("--help")
    assert ended.status == 0
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", ended.out.decode(), re.MULTILINE)


def test_a_commands_line_is_its_own_short_help() -> None:
    from myllm.cli import myllm

    context = myllm.make_context("myllm", ["gen"])
    for name, line in COMMANDS.items():
        command = myllm.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(200).rstrip(".") == line.rstrip(".")


def test_version_names_all_three(run: Run) -> None:
    ended = run("--version")
    assert re.fullmatch(
        rf"myllm {re.escape(__version__)} \(llama-cpp-python \d\S+, llama\.cpp \S+, ggml \S+ \S+\)\n",
        ended.out.decode(),
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gne"], "no command 'gne': did you mean gen?; see `myllm --help`"),
        ([], "no command given; see `myllm --help`"),
        (["gen", "--tempurature", "1"], "--temperature"),
        (["gen", "--temperature", "hot"], "see `myllm gen --help`"),
        (["gen", "--temperature", "200"], "temperature: expected a number from 0 to 100"),
        (["gen", "--context", "0"], "context: expected a whole number from 1"),
        (["gen", "--set", "dry_multiplyer=1"], "did you mean dry_multiplier"),
        (["gen", "--set", "mirostat"], "expected KEY=VALUE"),
        (["gen", "--deadline", "soon"], "expected a duration such as 30s"),
        (["gen", "--resume", "x"], "--resume: it goes with --batch or --map"),
        (["gen", "--batch", "hi"], "--map 'hi {}'"),
        (["gen", "--map", "no place"], "no {} in it"),
        (["gen", "--batch", "--map", "{}"], "give one of them"),
        (["gen", "--batch", "-n"], "--batch and --map read records"),
        (["gen", "--batch", "--stream", "-t"], "give -o jsonl"),
        (["gen", "-n"], "type `myllm gen 'your prompt'`"),
        (["gen"], "stdin: empty, and no prompt"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line_and_2(
    run: Run, arguments: list[str], said: str
) -> None:
    ended = run(*arguments)
    assert ended.status == 2
    assert not ended.out
    assert ended.err.startswith("myllm: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err


def test_a_bad_configuration_is_78(run: Run, home: Path) -> None:
    file = home / ".config" / "myllm" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('outptu = "text"\n')
    ended = run("gen", "hi")
    assert ended.status == 78
    assert "outptu" in ended.err
    assert str(file) in ended.err


BROKEN = """
import sys
import myllm.settings
myllm.settings.load = lambda: 1 / 0
sys.argv = {argv}
from myllm.__main__ import main
main()
"""


@pytest.mark.parametrize(("set_by_user", "n_threads"), [(None, "1"), ("3", "3")])
def test_numpys_threads_are_not_started_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, set_by_user: str | None, n_threads: str
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", set_by_user)
    code = (
        "import os, myllm.__main__ as program\n"
        "program._run = lambda streams: print(os.environ['OPENBLAS_NUM_THREADS']) or 0\n"
        "program.main()"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == n_threads


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_line_and_70_with_its_traceback_only_on_demand(debug: bool) -> None:
    argv = ["myllm", *(["--debug"] if debug else []), "gen", "hi"]
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN.format(argv=argv)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert ended.returncode == 70
    assert ended.stderr.decode().endswith(
        "myllm: unforeseen: ZeroDivisionError: division by zero; --debug shows where\n"
    )
    assert (b"Traceback" in ended.stderr) == debug


def test_the_environment_can_ask_for_tracebacks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYLLM_DEBUG", "1")
    ended = run("gen", "hi", "-m", "nosuch")
    assert ended.status == 66
    assert "Traceback" in ended.err


@pytest.mark.parametrize("arguments", [["--help"], ["gen", "--help"], ["gen", "hi", "-m", "{model}"]])
def test_a_full_disk_is_74_and_one_line(run: Run, fake_model: FakeModel, arguments: list[str]) -> None:
    model = fake_model(tokens=["a"])
    with open("/dev/full", "w") as full:
        ended = run(*(argument.format(model=model) for argument in arguments), stdout=full)
    assert ended.status == 74
    assert re.fullmatch(r"myllm: .*No space left on device.*\n", ended.err)


def test_a_closed_stdout_is_an_error_and_not_a_socket(fake_model: FakeModel) -> None:
    model = fake_model(tokens=["a"])
    command = f"{' '.join(MYLLM)} gen -n hi -m {model} >&- <&-"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert ended.returncode == 74
    assert b"stdout" in ended.stderr


def test_a_reader_that_leaves_ends_it_by_sigpipe_at_once_and_quietly(fake_model: FakeModel) -> None:
    model = fake_model(ms_per_token=2, window=100_000)
    command = [*MYLLM, "gen", "-n", "--ignore-eos", "a b c", "-m", str(model)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout
    assert process.stdout.readline().startswith(b'{"token":')
    process.stdout.close()
    assert process.wait(10) == -signal.SIGPIPE
    assert process.stderr
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_by_that_very_signal_and_leaves_no_worker(
    fake_model: FakeModel, number: signal.Signals
) -> None:
    model = fake_model(ms_per_token=2, window=100_000)
    command = [*MYLLM, "gen", "-n", "--ignore-eos", "a b c", "-m", str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(10) == -number
        assert process.stderr
        assert process.stderr.read() == b""
    assert children
    for _ in range(100):
        if not any(_lives(pid) for pid in children):
            return
        os.sched_yield()
        signal.sigtimedwait([], 0.02)
    pytest.fail(f"left behind: {children}")


def _lives(pid: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
