"""`myllm load` as a user types it: a daemon that is there, or not, and what is printed about it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from myllm.socket_file import socket_path

from .conftest import MYLLM, Run, on_a_terminal, processes_of

FakeModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("daemons")


def loaded(run: Run) -> list[dict[str, Any]]:
    return run("load", "--list").lines


def daemon_pid(home: Path) -> int:
    (pid,) = [pid for pid, command in processes_of(home).items() if "daemon.daemon" in command]
    return pid


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """`myllm` in the background, which must have ended by itself."""
    command = [*MYLLM, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_command_that_is_offline_pulls_nothing_though_the_daemon_may(
    run: Run, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("load", fake_model()).status == 0
    monkeypatch.setenv("MYLLM_OFFLINE", "1")
    for arguments in (("gen", "hi"), ("embed",), ("load", "smollm2")):
        ended = run(*arguments, stdin=b"text")
        assert ended.status == 66
        assert "offline is set" in ended.err


def test_a_model_whose_file_is_gone_can_be_unloaded(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    assert run("load", model).status == 0
    model.unlink()
    assert run("load", "--unload", model).status == 0
    assert loaded(run) == []


def test_an_idle_model_is_loaded_wider_for_a_prompt_over_its_window_and_a_busy_one_is_not(
    run: Run, fake_model: FakeModel
) -> None:
    model = fake_model(window=100, ms_per_token=500)
    assert run("load", model, "--context", 8, "--pin").status == 0
    prompt = " ".join("word" for _ in range(20))
    with running("gen", "-n", "-m", model, "a b c d e", "--context", 8, "--ignore-eos"):
        for _ in range(200):
            if loaded(run)[0]["busy"]:
                break
        refused = run("gen", "-m", model, prompt)
    assert (refused.status, "load with a larger --context" in refused.err) == (67, True)
    for _ in range(200):
        if not loaded(run)[0]["busy"]:
            break
    answered = run("gen", "-m", model, prompt, "--max-tokens", 2)
    assert (answered.status, answered.lines[-1]["usage"]["prompt_tokens"]) == (0, 20)
    (entry,) = loaded(run)
    assert (entry["window"], entry["pinned"]) == (100, True)


# ── loading ─────────────────────────────────────────────────────────────────────────────────


def test_load_starts_a_daemon_holds_no_pipe_and_the_model_is_warm(run: Run, fake_model: FakeModel) -> None:
    """That `run` returns is the point: it waits until stdout and stderr have no writer any more."""
    model = fake_model(load_ms=400)
    ended = run("load", model)
    assert (ended.status, ended.err) == (0, "")
    (entry,) = ended.lines
    assert (entry["model"], entry["path"], entry["state"]) == (str(model), str(model), "ready")
    answered = run("gen", "hi", "-m", model)
    assert answered.lines[-1]["timings"]["load_ms"] < 100
    assert [each["pid"] for each in loaded(run)] == [entry["pid"]]


def test_many_models_are_a_line_each_and_the_daemon_is_one(
    run: Run, fake_model: FakeModel, home: Path
) -> None:
    one, two = fake_model("one"), fake_model("two")
    assert [entry["model"] for entry in run("load", one, two).lines] == [str(one), str(two)]
    before = daemon_pid(home)
    assert re.fullmatch(rf"{one}: \d+ MB, .*kept for 30m\n", run("load", "-t", one).out.decode())
    assert daemon_pid(home) == before


def test_on_a_terminal_a_model_is_a_line_and_loading_a_bar_that_goes(fake_model: FakeModel) -> None:
    model = fake_model(load_ms=600)
    shown = on_a_terminal("load", model)
    assert "loading the model" in shown
    last = shown.rpartition("\r")[2]
    assert re.fullmatch(rf"{model}: \d+ MB, .*kept for 30m\n", last)


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(run: Run, fake_model: FakeModel) -> None:
    bad = fake_model("bad", fault={"kind": "abort", "at": "load", "words": "GGML_ASSERT failed"})
    good = fake_model("good")
    ended = run("load", "nosuch", good, bad)
    assert ended.status == 69
    assert [entry["model"] for entry in ended.lines] == [str(good)]
    first, second = ended.err.splitlines()
    assert first.startswith("myllm: 'nosuch': no such model")
    assert "GGML_ASSERT failed" in second
    assert run("load", "nosuch").status == 66


@pytest.mark.parametrize(
    ("flags", "least", "most"),
    [([], 1790, 1800), (["--keep-alive", "5m"], 290, 300), (["--keep-alive", "-1"], None, None)],
)
def test_keep_alive_says_how_long_it_stays(
    run: Run, fake_model: FakeModel, flags: list[str], least: float | None, most: float | None
) -> None:
    (entry,) = run("load", *flags, fake_model()).lines
    if least is None or most is None:
        assert entry["keep_alive_s"] is None
    else:
        assert least <= entry["keep_alive_s"] <= most


def test_keep_alive_is_what_is_configured_here_also_for_a_daemon_that_runs(
    run: Run, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake_model()
    run("load", model)
    monkeypatch.setenv("MYLLM_KEEP_ALIVE", "10m")
    (entry,) = run("load", model).lines
    assert 590 <= entry["keep_alive_s"] <= 600
    monkeypatch.setenv("MYLLM_KEEP_ALIVE", "-1")
    (entry,) = run("load", model).lines
    assert entry["keep_alive_s"] is None


def test_a_model_kept_for_no_time_goes_at_once(run: Run, fake_model: FakeModel) -> None:
    assert run("load", "--keep-alive", 0, fake_model()).status == 0
    deadline = time.monotonic() + 5
    while loaded(run):
        assert time.monotonic() < deadline


def test_pins_are_set_and_taken_back_and_else_left_as_they_are(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    pinned = [run("load", *flags, model).lines[0]["pinned"] for flags in ([], ["--pin"], [], ["--no-pin"])]
    assert pinned == [False, True, True, False]


def test_loading_options_reach_the_model(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    run("load", "--context", 7, model)
    assert run("gen", "--count", "-m", model, "hi").lines[0]["window"] == 7
    assert run("load", "--context", 0, model).status == 2


def test_a_relative_path_is_the_same_model_anywhere(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    (entry,) = run("load", f"./{model.name}", cwd=model.parent).lines
    assert entry["path"] == str(model)
    assert run("load", "--unload", model.name, cwd="/").status == 66
    assert run("load", "--unload", f"./{model.name}", cwd=model.parent).status == 0


def test_a_daemon_that_dies_while_it_loads_is_69(fake_model: FakeModel, home: Path) -> None:
    with running("load", fake_model(load_ms=60_000)) as process:
        deadline = time.monotonic() + 10
        while not any("worker.main" in command for command in processes_of(home).values()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(daemon_pid(home), signal.SIGKILL)
        out, err = process.communicate(timeout=10)
    Path(socket_path()).unlink()  # a killed daemon leaves it, for the next one to replace
    assert (process.returncode, out) == (69, b"")
    assert err.startswith(b"myllm: runtime: the connection ended")
    assert err.count(b"\n") == 1


def test_where_no_daemon_is_wanted_load_refuses_and_starts_none(
    run: Run, fake_model: FakeModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYLLM_DAEMON", "never")
    ended = run("load", fake_model())
    assert (ended.status, ended.out) == (2, b"")
    assert "MYLLM_DAEMON" in ended.err
    assert processes_of(home) == {}


# ── what is loaded ──────────────────────────────────────────────────────────────────────────


def test_the_list_is_a_table_on_a_terminal(run: Run, fake_model: FakeModel) -> None:
    run("load", "--pin", fake_model("one"))
    run("load", "--keep-alive", "2h", fake_model("two"))
    run("load", "--keep-alive", "-1", fake_model("three"))
    head, *rows = on_a_terminal("load", "--list").splitlines()
    assert re.split(r" {2,}", head) == [
        *("MODEL", "MEMORY", "CONTEXT", "BUSY", "CACHED", "TOKENS/S", "KV HITS", "IDLE", "KEPT", "RUNS ON")
    ]
    kept = {re.split(r"/|\.fake", row)[-2]: row[head.index("KEPT") :][:8].strip() for row in rows}
    assert kept == {"one": "pinned", "two": "2h", "three": "for ever"}


@pytest.mark.parametrize("action", ["--list", "--stop", ("--unload", "--all")])
def test_without_a_daemon_nothing_is_found_none_is_started_and_that_is_said(
    run: Run, home: Path, action: str | tuple[str, ...]
) -> None:
    ended = run("load", *([action] if isinstance(action, str) else action))
    assert (ended.status, ended.out) == (0, b"")
    assert ended.err.startswith("myllm: no daemon runs")
    assert not (home / ".local/state/myllm").exists()


def test_a_model_that_is_still_loading_is_in_the_list(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(load_ms=1500)
    run("load", fake_model("other"))
    with running("load", model) as process:
        deadline = time.monotonic() + 10
        while not (entries := [each for each in loaded(run) if each["path"] == str(model)]):
            assert time.monotonic() < deadline
        assert entries[0]["state"] == "loading"
        table = run("load", "--list", "-t").out.decode()
        assert re.search(rf"{model} .* loading", table)
        process.communicate(timeout=10)


# ── and out again ───────────────────────────────────────────────────────────────────────────


def test_models_are_unloaded_by_name_or_all(run: Run, fake_model: FakeModel, home: Path) -> None:
    one, two, three = (fake_model(name) for name in ("one", "two", "three"))
    run("load", one, two, three)
    ended = run("load", "--unload", one)
    assert (ended.status, ended.out, ended.err) == (0, b"", f"myllm: {one}: unloaded\n")
    assert {entry["model"] for entry in loaded(run)} == {str(two), str(three)}
    assert run("load", "--unload", "--all").err.count(": unloaded") == 2
    assert loaded(run) == []
    assert "no model is loaded" in run("load", "--list", "-t").err
    assert len(processes_of(home)) == 1


def test_what_is_not_loaded_cannot_be_unloaded(run: Run, fake_model: FakeModel) -> None:
    one, two = fake_model("one"), fake_model("two")
    assert run("load", "--unload", one).status == 66
    run("load", one)
    ended = run("load", "--unload", two, one)
    assert ended.status == 66
    assert f"{one}: unloaded" in ended.err
    assert f"{two}: not loaded" in ended.err


def test_what_is_not_even_here_is_not_pulled_to_be_unloaded(run: Run, fake_model: FakeModel) -> None:
    run("load", fake_model())
    ended = run("load", "--unload", "minilm")
    assert ended.status == 66
    assert "pulling" not in ended.err
    assert "pull" in ended.err


def test_unloading_waits_for_the_running_answer(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 40, ms_per_token=20)
    run("load", model)
    with running("gen", "hi", "-t", "-m", model) as process:
        assert process.stdout
        first = process.stdout.read(1)
        assert run("load", "--unload", model).status == 0
        assert first + process.stdout.read() == b"x" * 40 + b"\n"


def test_stop_returns_when_the_process_is_gone_and_what_ran_has_ended(
    run: Run, fake_model: FakeModel, home: Path
) -> None:
    model = fake_model(tokens=["x"] * 40, ms_per_token=20)
    run("load", model)
    pid = daemon_pid(home)
    with running("gen", "hi", "-t", "-m", model) as process:
        assert process.stdout
        first = process.stdout.read(1)
        ended = run("load", "--stop")
        assert processes_of(home).keys() <= {process.pid}
        assert first + process.stdout.read() == b"x" * 40 + b"\n"
    assert (ended.status, ended.out) == (0, b"")
    assert ended.err == f"myllm: the daemon, process {pid}, has ended\n"


def test_a_long_wait_for_the_end_is_said(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 150, ms_per_token=20)
    run("load", model)
    with running("gen", "hi", "-t", "-m", model) as process:
        assert process.stdout
        process.stdout.read(1)
        assert run("load", "--stop").err.startswith("myllm: waiting for the daemon, process ")


def test_two_may_stop_it_at_once(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 40, ms_per_token=20)
    run("load", model)
    with running("gen", "hi", "-m", model) as process, running("load", "--stop") as other:
        assert process.stdout
        process.stdout.readline()
        assert run("load", "--stop").status == 0
        assert other.wait(10) == 0


OTHER_VERSION = """
import sys, myllm
myllm.__version__ = "9.9"
sys.argv = ["myllm", {arguments}]
from myllm.__main__ import main
main()
"""


def test_a_daemon_of_another_version_is_stopped_too(run: Run, fake_model: FakeModel) -> None:
    run("load", fake_model())
    code = OTHER_VERSION.format(arguments="'load', '--stop'")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=30)
    assert b"has ended" in ended.stderr


# ── usage ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model"),
        (["--list", "--stop"], "give one of them"),
        (["--list", "m"], "takes no model"),
        (["--stop", "m"], "takes no model"),
        (["--all"], "--unload"),
        (["--all", "m"], "--unload"),
        (["--unload"], "models or --all"),
        (["--unload", "--all", "m"], "models or --all"),
        (["--list", "--pin"], "--pin: it does not go with --list"),
        (["--unload", "m", "--kv-type", "f16"], "--kv-type: it does not go with --unload"),
        (["--keep-alive", "soon", "m"], "expected a duration"),
        (["--keep-alive", "-2", "m"], "expected a duration"),
    ],
)
def test_what_makes_no_sense_is_2_and_starts_nothing(
    run: Run, home: Path, arguments: list[str], said: str
) -> None:
    ended = run("load", *arguments)
    assert (ended.status, ended.out) == (2, b"")
    assert said in ended.err
    assert processes_of(home) == {}


def test_a_model_is_loaded_with_a_template_for_all_who_name_none(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    assert run("load", "--template", "alpaca", model).status == 0
    assert b"### Instruction:\nhi" in run("gen", "-t", "-m", model, "hi").out
    assert b"user\nhi\nassistant" in run("gen", "-t", "-m", model, "--template", "chatml", "hi").out
    assert len(loaded(run)) == 1


def test_a_model_is_not_loaded_with_a_template_that_is_none(run: Run, fake_model: FakeModel) -> None:
    ended = run("load", "--template", "nope", fake_model())
    assert ended.status == 2
    assert "no template 'nope'" in ended.err
    assert loaded(run) == []
