"""`myllm serve --no-http`: the daemon in the foreground, alone on its socket or on one that was passed."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm.client.dial import dial_daemon
from myllm.socket_file import socket_path

from .conftest import MYLLM, Run
from .test_load import OTHER_VERSION, loaded, running

FakeModel = Callable[..., Path]
SERVE = (*MYLLM, "serve", "--no-http")
pytestmark = pytest.mark.usefixtures("daemons")


class Served:
    """A serve that runs, and what it has logged."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        self.log: list[dict[str, Any]] = []
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr
        self.log.extend(orjson.loads(line) for line in self.process.stderr)

    def ends(self) -> int:
        """Its exit status, once it has ended and all it said is in `log`."""
        status = self.process.wait(20)
        self._listener.join(20)
        return status


@contextmanager
def served(*command: str, **options: Any) -> Iterator[Served]:
    """A serve that can be asked something by now; stopped afterwards, if it has not been."""
    command = command or SERVE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        serve = Served(process)
        try:
            deadline = time.monotonic() + 10
            while (client := dial_daemon()) is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            client.close()
            yield serve
        finally:
            process.terminate()
            try:
                serve.ends()
            finally:
                process.kill()


def test_commands_find_it_and_its_log_is_json_lines_on_stderr(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(load_ms=300)
    with served() as serve:
        assert run("load", model).status == 0
        assert run("gen", "a secret", "-m", model).lines[-1]["timings"]["load_ms"] < 100
        assert [entry["model"] for entry in loaded(run)] == [str(model)]
        serve.process.terminate()
        assert serve.ends() == 0
        assert serve.process.stdout
        assert serve.process.stdout.read() == b""
    assert serve.log[0]["event"] == "started"
    assert serve.log[0]["kind"] == "serve"
    assert serve.log[-1]["event"] == "stopped"
    assert {line["op"] for line in serve.log if line["event"] == "request"} == {"load", "gen", "status"}
    assert "secret" not in str(serve.log)


def test_on_sigterm_what_runs_is_answered_and_it_exits_0(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 40, ms_per_token=20)
    with served() as serve, running("gen", "hi", "-t", "-m", model) as process:
        assert process.stdout
        first = process.stdout.read(1)
        serve.process.terminate()
        assert first + process.stdout.read() == b"x" * 40 + b"\n"
        assert process.wait(10) == 0
        assert serve.ends() == 0


def test_a_second_signal_ends_it_at_once(fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x"] * 500, ms_per_token=20)
    with served() as serve, running("gen", "hi", "-t", "-m", model) as process:
        assert process.stdout
        process.stdout.read(1)
        serve.process.terminate()
        while not any(line["event"] == "stopping" for line in serve.log):
            time.sleep(0.01)
        serve.process.terminate()
        assert serve.ends() == -signal.SIGTERM
        assert process.wait(10) == 69


@pytest.mark.parametrize("first", ["serve", "daemon"])
def test_a_second_daemon_is_75_and_the_first_goes_on(run: Run, fake_model: FakeModel, first: str) -> None:
    def second_is_refused() -> None:
        ended = run("serve", "--no-http")
        assert (ended.status, ended.out) == (75, b"")
        assert "another daemon runs" in ended.err
        assert run("load", "--list").status == 0

    if first == "daemon":
        run("load", fake_model())
        second_is_refused()
    else:
        with served() as serve:
            second_is_refused()
            serve.process.terminate()
            assert serve.ends() == 0


def test_load_does_not_stop_it_and_names_its_process(run: Run) -> None:
    with served() as serve:
        ended = run("load", "--stop")
        assert ended.status == 69
        assert str(serve.pid) in ended.err
        assert run("load", "--list").status == 0


def test_of_another_version_it_is_not_replaced_and_commands_run_cold(run: Run, fake_model: FakeModel) -> None:
    code = OTHER_VERSION.format(arguments="'serve', '--no-http'")
    with served(sys.executable, "-c", code) as serve:
        ended = run("load", fake_model())
        assert ended.status == 69
        assert f"process {serve.pid}" in ended.err
        assert "9.9" in ended.err
        answered = run("gen", "hi", "-t", "-m", fake_model())
        assert (answered.status, answered.out) == (0, b"hi\n")
        assert "running without it" in answered.err
        assert serve.process.poll() is None


def test_http_is_refused_in_a_line(run: Run) -> None:
    ended = run("serve")
    assert (ended.status, ended.out) == (2, b"")
    assert "HTTP" in ended.err
    assert ended.err.count("\n") == 1


# ── activated by a service manager ──────────────────────────────────────────────────────────

EXEC_WITH_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does: the socket on descriptor 3, and the pid of the process that shall take it."""


@pytest.fixture
def passed() -> Iterator[socket.socket]:
    """A socket at the daemon's place that somebody else made and keeps."""
    path = Path(socket_path())
    path.parent.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(8)
        yield listener
    path.unlink()


def test_a_passed_socket_is_served_and_stays(
    run: Run, fake_model: FakeModel, passed: socket.socket, daemons: None
) -> None:
    model = fake_model(load_ms=300)
    wrapper = (sys.executable, "-c", EXEC_WITH_SOCKET, str(passed.fileno()), *SERVE)
    with served(*wrapper, pass_fds=[passed.fileno()]) as serve:
        assert run("load", model).status == 0
        assert run("gen", "hi", "-m", model).lines[-1]["timings"]["load_ms"] < 100
        serve.process.terminate()
        assert serve.ends() == 0
    assert Path(socket_path()).is_socket()


def test_who_comes_before_it_has_started_is_answered(
    run: Run, fake_model: FakeModel, passed: socket.socket, daemons: None
) -> None:
    """The manager starts it for the first client, who waits in the backlog meanwhile."""
    with running("gen", "hi", "-t", "-m", fake_model()) as process:
        assert select.select([passed], [], [], 10)[0]
        wrapper = (sys.executable, "-c", EXEC_WITH_SOCKET, str(passed.fileno()), *SERVE)
        with served(*wrapper, pass_fds=[passed.fileno()]) as serve:
            out, err = process.communicate(timeout=20)
            assert (process.returncode, out, err) == (0, b"hi\n", b"")
            serve.process.terminate()
            assert serve.ends() == 0
    assert any(line.get("op") == "gen" for line in serve.log)
