"""The service manager is told, its watchdog kept, its socket taken, with real sockets and a real exec."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from myllm.daemon import service_manager as service
from myllm.daemon.service_manager import notify, watchdog_interval


@pytest.fixture(autouse=True)
def no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables of a manager that may have started the tests."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", *service.LISTEN_VARIABLES):
        monkeypatch.delenv(name, raising=False)


# ── notify ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A manager's datagram socket, named in NOTIFY_SOCKET."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@myllm-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(address.replace("@", "\0", 1) if request.param == "abstract" else address)
        there.settimeout(5)
        yield there


def test_a_message_is_one_datagram(manager: socket.socket) -> None:
    notify("READY=1\nSTATUS=2 models, ünïcode \udcff")
    notify("WATCHDOG=1")
    assert manager.recv(1000) == "READY=1\nSTATUS=2 models, ünïcode ?".encode()
    assert manager.recv(1000) == b"WATCHDOG=1"


def test_a_manager_that_does_not_read_costs_a_moment_only(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PATIENCE", 0.001)
    for _ in range(600):  # more more than a queue holds (net.unix.max_dgram_qlen)
        notify("STATUS=still here")
    assert manager.recv(1000) == b"STATUS=still here"


@pytest.mark.parametrize("address", [None, "", "/nowhere/at/all", "@nobody", "vsock:2:1", "/" + "x" * 200])
def test_without_a_manager_nothing_happens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


# ── watchdog ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("microseconds", "interval"),
    [
        ("30000000", 15.0),
        ("1", 5e-7),
        ("0", None),
        ("", None),
        ("-5", None),
        ("1e6", None),
        ("²", None),
        ("soon", None),
    ],
)
def test_the_watchdog_is_answered_twice_as_often_as_it_asks(
    microseconds: str, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    assert watchdog_interval() == interval
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval() == interval


def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert watchdog_interval() is None


# ── activation ──────────────────────────────────────────────────────────────────────────────

SERVER = """
import os, subprocess, sys
from myllm.errors import ConfigError
from myllm.daemon.service_manager import activated
try:
    listener = activated()
except ConfigError as error:
    print(error)
    listener = None
else:
    print(listener and (listener.fileno(), os.get_inheritable(3), os.get_blocking(3)))
print([name for name in os.environ if name.startswith("LISTEN_")], flush=True)
if listener:
    connection, _ = listener.accept()
    connection.sendall(b"served")
"""
NONE_LEFT = "[]"


MANAGER = """
import os, sys
descriptor, pid, count, server = sys.argv[1:]
os.dup2(int(descriptor), 3) if int(descriptor) >= 0 else os.closerange(3, 10)
os.environ |= {"LISTEN_PID": pid or str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "x"}
os.execv(sys.executable, [sys.executable, "-c", server])
"""


def start(descriptor: int, pid: str = "", count: str = "1") -> subprocess.Popen[str]:
    """The server as a manager starts it: `descriptor` (-1: none) as 3, and its own id in LISTEN_PID."""
    return subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(descriptor), pid, count, SERVER],
        stdout=subprocess.PIPE,
        pass_fds=() if descriptor < 0 else (descriptor,),
        text=True,
    )


def said(server: subprocess.Popen[str]) -> list[str]:
    output, _ = server.communicate(timeout=30)
    assert server.returncode == 0
    return output.splitlines()


def test_a_passed_socket_is_listened_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        listener.setblocking(False)  # as NonBlocking= does
        server = start(listener.fileno())
        client.settimeout(30)
        client.connect(str(tmp_path / "socket"))
        assert client.recv(10) == b"served"
        assert said(server) == ["(3, False, True)", NONE_LEFT]


@pytest.mark.parametrize("pid", ["1", "mine"])
def test_a_socket_passed_to_another_process_is_left_alone(tmp_path: Path, pid: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        assert said(start(listener.fileno(), pid)) == ["None", NONE_LEFT]


@pytest.mark.parametrize("count", ["0", "2", "", "one"])
def test_anything_but_one_socket_is_refused(tmp_path: Path, count: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        error, left = said(start(listener.fileno(), count=count))
    assert error.startswith("LISTEN_FDS: expected 1 socket, not ")
    assert left == NONE_LEFT


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("closed", "it is none: Bad file descriptor"),
        ("file", "it is none: Socket operation on non-socket"),
        ("tcp", "it is no Unix stream socket"),
        ("datagram", "it is no Unix stream socket"),
        ("connected", "nobody can connect to it"),
    ],
)
def test_what_is_no_listening_unix_socket_is_refused(tmp_path: Path, what: str, why: str) -> None:
    with ExitStack() as stack:
        descriptor = -1
        if what == "file":
            descriptor = stack.enter_context(open(tmp_path / "file", "w")).fileno()
        elif what == "tcp":
            descriptor = stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()
        elif what == "datagram":
            descriptor = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).fileno()
        elif what == "connected":
            pair = [stack.enter_context(end) for end in socket.socketpair()]
            descriptor = pair[0].fileno()
        error, left = said(start(descriptor))
    assert error.startswith(f"passed socket: {why}; ")
    assert left == NONE_LEFT
