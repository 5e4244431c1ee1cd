"""Who may be the daemon, and what is found at its place: one of many starters, nothing of strangers."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from myllm.client import connect, start
from myllm.errors import CannotCreateError, MyllmError, PermissionDeniedError
from myllm.settings import load
from myllm.socket_file import socket_path

from .conftest import Launch
from .rig import MYLLM, Daemon, children, gen, numbered, processes, times, until

FakeModel = Callable[..., Path]
STRANGER = 4242
"""A user id that is neither ours nor root's."""

# ── many starters ───────────────────────────────────────────────────────────────────────────

STARTER = """
import sys
import orjson
from myllm.client import start
sys.stdin.read()
client = start.daemon()
line = list(client.stream({"op": "gen", "model": sys.argv[1], "prompt": "served"}))[-1]
print(client.greeting["pid"], orjson.loads(line)["full_text"])
"""


@times(2, 50)
def test_of_eight_starters_one_daemon_comes_and_serves_them_all(fake_model: FakeModel, count: int) -> None:
    model = fake_model()
    for _ in range(count):
        command = [sys.executable, "-c", STARTER, str(model)]
        starters = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(8)]
        for starter in starters:
            assert starter.stdin is not None
            starter.stdin.close()
        said = []
        for starter in starters:
            assert starter.stdout is not None
            said.append(starter.stdout.read())
            starter.stdout.close()
            assert starter.wait(30) == 0
        pids = {line.split()[0] for line in said}
        assert [line.split()[1] for line in said] == ["served"] * 8
        (pid,) = map(int, pids)

        until(lambda pid=pid: processes() == {pid} | children(pid))  # the others have given up
        os.kill(pid, signal.SIGTERM)
        until(lambda: not processes())
        assert not os.path.lexists(socket_path())


SERVE = """
import sys
from myllm.errors import MyllmError
from myllm.logs import open_log
from myllm.daemon import daemon
from myllm.settings import load
try:
    sys.exit(daemon.run(load(), open_log(None), kind="serve", ready=lambda: print("ready", flush=True)))
except MyllmError as error:
    print(error)
    sys.exit(error.exit_status)
"""


def test_whoever_wants_to_be_a_second_one_is_told_to_try_again(daemon: Daemon) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SERVE], capture_output=True, text=True, check=False, timeout=30
    )
    assert ended.returncode == 75
    assert "another daemon" in ended.stdout
    assert daemon.status()


# ── what is at its place ────────────────────────────────────────────────────────────────────


def place() -> Path:
    """The socket's path, its folder made."""
    path = Path(socket_path())
    path.parent.mkdir(0o700, parents=True)
    return path


def refused(path: Path, *, by_start: bool = True) -> None:
    """Neither a command nor a starter takes what is there, and it is left as it is."""
    before = os.lstat(path)
    with pytest.raises(PermissionDeniedError, match="move it away"):
        connect(load())
    if by_start:
        with pytest.raises(PermissionDeniedError, match="move it away"):
            start.daemon()
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)
    ended = subprocess.run([*MYLLM, "gen", "-n", "x"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (77, "")
    assert str(path.name) in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_regular_file_is_refused_and_left_alone() -> None:
    path = place()
    path.write_text("somebody's")
    refused(path)
    assert path.read_text() == "somebody's"


def test_a_folder_is_refused_and_left_alone() -> None:
    path = place()
    path.mkdir()
    refused(path)


def test_a_symlink_is_refused_even_to_a_live_socket(tmp_path: Path) -> None:
    path = place()
    with socket.socket(socket.AF_UNIX) as elsewhere:
        elsewhere.bind(str(tmp_path / "s"))
        elsewhere.listen()
        path.symlink_to(tmp_path / "s")
        refused(path)
        assert path.is_symlink()
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_a_dangling_symlink_is_refused_and_nothing_is_made_where_it_points(tmp_path: Path) -> None:
    path = place()
    path.symlink_to(tmp_path / "s")
    refused(path)
    assert not (tmp_path / "s").exists()


def test_a_folder_that_others_may_write_in_is_refused() -> None:
    path = place()
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(path))
        planted.listen()
        path.parent.chmod(0o777)
        with pytest.raises(PermissionDeniedError, match="other users"):
            connect(load())
        with pytest.raises(PermissionDeniedError, match="other users"):
            start.daemon()
        assert stat.S_ISSOCK(os.lstat(path).st_mode)


@pytest.mark.parametrize("name", ["daemon.sock", ""])
def test_a_strangers_socket_or_folder_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = place()
    real = os.lstat

    def lstat(asked: str | Path) -> os.stat_result:
        found = list(real(asked))
        if os.fspath(asked) == str(path if name else path.parent):
            found[4] = STRANGER
        return os.stat_result(found)

    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(path))
        planted.listen()
        monkeypatch.setattr(os, "lstat", lstat)
        for attempt in (lambda: connect(load()), start.daemon):
            with pytest.raises(PermissionDeniedError):
                attempt()
        assert stat.S_ISSOCK(real(path).st_mode)


def test_a_strangers_process_behind_our_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = place()
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(path))
        planted.listen()
        monkeypatch.setattr("myllm.client.dial.peer_uid", lambda connection: STRANGER)
        for attempt in (lambda: connect(load()), start.daemon):
            with pytest.raises(PermissionDeniedError, match="another user's process"):
                attempt()


def test_the_daemon_closes_the_connection_of_a_stranger(launch: Launch) -> None:
    flag = Path(os.environ["HOME"]) / "strangers"
    prelude = f"""
import pathlib, myllm.daemon.door as daemon
real, flag = daemon.peer_uid, pathlib.Path({str(flag)!r})
daemon.peer_uid = lambda connection: {STRANGER} if flag.exists() else real(connection)
"""
    daemon = launch(prelude)
    flag.touch()
    with daemon.raw() as connection:
        assert connection.recv(100) == b""
    flag.unlink()
    assert daemon.status()


def test_a_stale_socket_is_replaced_by_starters_and_passed_over_by_commands(
    launch: Launch, fake_model: FakeModel
) -> None:
    path = place()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    model = fake_model(tokens=numbered(2))
    with connect(load()) as client:
        assert "pid" not in client.greeting
        assert orjson.loads(list(client.stream(gen(model)))[-1])["full_text"] == " 0 1"
    assert os.path.lexists(path), "only a daemon, under its lock, removes it"
    assert launch().done(gen(model))["full_text"] == " 0 1"


# ── its folder ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("folder", ["/proc", "/dev/null", "missing/run"])
def test_a_command_runs_without_a_runtime_folder(
    monkeypatch: pytest.MonkeyPatch, home: Path, fake_model: FakeModel, folder: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / folder))  # an absolute one stays what it is
    model = fake_model(tokens=["fine"])
    command = [*MYLLM, "gen", "-n", "-t", "-m", str(model), "x"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "fine"), ended.stderr
    assert not (home / "missing").exists(), "a command makes no folder"


@pytest.mark.parametrize("folder", ["/proc", "/dev/null"])
def test_a_daemon_says_that_its_folder_cannot_be_made(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    with pytest.raises(CannotCreateError, match=folder):
        start.daemon()


def test_a_daemon_makes_its_folder_private(
    monkeypatch: pytest.MonkeyPatch, home: Path, launch: Launch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "missing" / "run"))
    before = os.umask(0)
    try:
        daemon = launch()
    finally:
        os.umask(before)
    for folder in (home / "missing", home / "missing" / "run", Path(daemon.path).parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_daemon_whose_settings_are_wrong_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYLLM_QUEUE", "many")
    with pytest.raises(MyllmError, match="MYLLM_QUEUE"):
        start.daemon()
