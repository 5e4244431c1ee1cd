"""The daemon's socket: one claims it, nothing of others is touched or trusted, and its path always fits."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from myllm import socket_file
from myllm.client.dial import dial
from myllm.daemon.claim import Claim, claim
from myllm.errors import CannotCreateError, ConfigError, MyllmError, PermissionDeniedError, TryAgainError
from myllm.socket_file import peer_uid, socket_path

STRANGER = 4242
"""A user id that is neither ours nor root's."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a daemon would listen, in a folder that does not exist yet."""
    return str(tmp_path / "run" / "daemon.sock")


@pytest.fixture
def owned() -> Iterator[Callable[[str], Claim]]:
    """`claim`, released after the test."""
    with ExitStack() as stack:

        def take(path: str) -> Claim:
            claimed = claim(path)
            stack.callback(claimed.release)
            return claimed

        yield take


def private(path: str) -> Path:
    """The file `path`, its folder made as a daemon makes it."""
    folder = Path(path).parent
    folder.mkdir(0o700)
    return Path(path)


def bound(path: str) -> socket.socket:
    """A socket in the file system that nobody listens on."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    return made


def as_stranger(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Lets `path` look like another user's; as root, the real one does not bind us."""
    real = os.lstat

    def lstat(name: str) -> os.stat_result:
        found = real(name)
        fields = list(found)
        if os.fspath(name) == path:
            fields[4] = STRANGER
        return os.stat_result(fields)

    monkeypatch.setattr(os, "lstat", lstat)


# ── where it is ─────────────────────────────────────────────────────────────────────────────


def test_the_socket_is_in_the_runtime_folder() -> None:
    assert socket_path({"XDG_RUNTIME_DIR": "/run/user/1"}) == "/run/user/1/myllm/daemon.sock"
    assert socket_path({"HOME": "/home/me"}) == "/home/me/.local/state/myllm/run/daemon.sock"


def test_without_a_home_there_is_no_made_up_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_123)
    with pytest.raises(ConfigError, match="set HOME"):
        socket_path({})


@pytest.mark.parametrize("char", ["x", "é"])
def test_a_path_is_shortened_where_its_bytes_pass_100(monkeypatch: pytest.MonkeyPatch, char: str) -> None:
    monkeypatch.setattr(socket_file, "SESSION_FOLDERS", "/nowhere")
    around = len("/" + "/myllm/daemon.sock")
    fits = "/" + char * ((100 - around) // len(char.encode()))
    assert socket_path({"XDG_RUNTIME_DIR": fits}) == f"{fits}/myllm/daemon.sock"
    short = socket_path({"XDG_RUNTIME_DIR": fits + char})
    assert short.startswith(f"/tmp/myllm-{os.getuid()}/")
    assert short.endswith(".sock")
    assert len(short) < 60


def test_each_long_folder_has_its_own_short_name_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_file, "SESSION_FOLDERS", "/nowhere")
    paths = [socket_path({"XDG_RUNTIME_DIR": "/" + char * 200}) for char in "aab"]
    assert paths[0] == paths[1] != paths[2]


@pytest.mark.parametrize(("mode", "taken"), [(0o700, True), (0o777, False)])
def test_a_short_name_is_in_the_sessions_folder_where_that_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, taken: bool
) -> None:
    monkeypatch.setattr(socket_file, "SESSION_FOLDERS", str(tmp_path))
    session = tmp_path / str(os.getuid())
    session.mkdir()
    session.chmod(mode)
    short = socket_path({"XDG_RUNTIME_DIR": "/" + "x" * 200})
    assert short.startswith(f"{session}/myllm/") is taken


def test_a_shortened_path_can_be_listened_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: Callable[[str], Claim]
) -> None:
    monkeypatch.setattr(socket_file, "SESSION_FOLDERS", "/nowhere")
    monkeypatch.setattr(socket_file, "SHORT_FOLDER", str(tmp_path))
    path = socket_path({"XDG_RUNTIME_DIR": str(tmp_path / ("x" * 120))})
    with owned(path).listen(), closing(dialled(path)):
        assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700


def test_nothing_slow_is_imported_to_dial() -> None:
    code = (
        "import sys; from myllm.client.dial import dial; from myllm.socket_file import socket_path; "
        "assert dial(socket_path(), 1) is None; print(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pathlib", "hashlib", "ctypes", "fcntl", "struct", "tempfile"} & set(ended.stdout.split())


# ── dialling ────────────────────────────────────────────────────────────────────────────────


def dialled(path: str, timeout: float = 1.0) -> socket.socket:
    connection = dial(path, timeout)
    assert connection is not None
    return connection


def test_a_dialled_connection_reaches_who_listens(path: str, owned: Callable[[str], Claim]) -> None:
    with owned(path).listen() as listener, closing(dialled(path)) as ours:
        theirs, _ = listener.accept()
        with theirs:
            theirs.sendall(b"hello")
            assert ours.recv(5) == b"hello"
            assert ours.gettimeout() is None
            assert peer_uid(ours) == peer_uid(theirs) == os.getuid()


def test_nobody_is_reached_where_nobody_listens(path: str) -> None:
    assert dial(path, 1.0) is None  # no folder
    private(path)
    assert dial(path, 1.0) is None  # no socket
    with bound(path):
        assert dial(path, 1.0) is None  # refused
    assert dial(path + "/below", 1.0) is None


def test_a_full_backlog_is_waited_for_and_then_told(path: str) -> None:
    private(path)
    with bound(path) as listener, ExitStack() as others:
        listener.listen(0)
        others.enter_context(closing(dialled(path)))
        before = time.monotonic()
        with pytest.raises(TryAgainError, match="too busy") as error:
            dial(path, 0.2)
        assert 0.2 <= time.monotonic() - before < 5
        assert error.value.exit_status == 75
        acceptor = threading.Timer(0.1, lambda: listener.accept()[0].close())
        acceptor.start()
        others.enter_context(closing(dialled(path, 10.0)))
        acceptor.join()


@pytest.mark.parametrize("what", ["file", "folder", "symlink", "dangling", "fifo"])
def test_what_is_no_socket_is_not_dialled(path: str, what: str) -> None:
    with (
        plant(path, what),
        pytest.raises(PermissionDeniedError, match=r"daemon\.sock: it is not a socket") as e,
    ):
        dial(path, 1.0)
    assert e.value.exit_status == 77


def test_a_strangers_socket_is_not_dialled(
    path: str, owned: Callable[[str], Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    with owned(path).listen() as listener:
        as_stranger(monkeypatch, path)
        with pytest.raises(PermissionDeniedError, match="not a socket of yours"):
            dial(path, 1.0)
        assert not connections(listener)


def test_a_strangers_or_open_folder_is_not_trusted(
    path: str, owned: Callable[[str], Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(path).parent
    with owned(path).listen() as listener:
        for mode in (0o770, 0o707):
            folder.chmod(mode)
            with pytest.raises(PermissionDeniedError, match="their own socket"):
                dial(path, 1.0)
        folder.chmod(0o1777)  # as /tmp: nobody can replace what is ours
        dialled(path).close()
        listener.accept()[0].close()
        folder.chmod(0o700)
        as_stranger(monkeypatch, str(folder))
        with pytest.raises(PermissionDeniedError, match="their own socket"):
            dial(path, 1.0)
        assert not connections(listener)


def test_a_symlinked_folder_is_not_trusted(path: str, tmp_path: Path, owned: Callable[[str], Claim]) -> None:
    with owned(path).listen():
        (tmp_path / "link").symlink_to(Path(path).parent)
        with pytest.raises(PermissionDeniedError, match="their own socket"):
            dial(str(tmp_path / "link" / "daemon.sock"), 1.0)


def test_a_strangers_process_behind_our_socket_is_hung_up_on(
    path: str, owned: Callable[[str], Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("myllm.client.dial.peer_uid", lambda connection: STRANGER)
    with owned(path).listen() as listener:
        with pytest.raises(PermissionDeniedError, match="another user's process"):
            dial(path, 1.0)
        theirs, _ = listener.accept()
        with theirs:
            assert theirs.recv(1) == b""


def test_the_kernel_says_who_really_listens(tmp_path: Path) -> None:
    """A child with another user id, where it can have one (as root): we are told that, and hang up."""
    path = str(tmp_path / "theirs.sock")
    code = (
        f"import os, socket; s = socket.socket(socket.AF_UNIX); s.bind({path!r})\n"
        f"os.getuid() or os.setuid({STRANGER}); s.listen(); print('ready', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            assert peer_uid(raw) == (os.getuid() or STRANGER)
        if os.getuid() == 0:
            with pytest.raises(PermissionDeniedError, match="another user's process"):
                dial(path, 1.0)
        child.communicate("\n")


def test_a_peer_that_the_kernel_cannot_name_is_refused() -> None:
    with socket.socket(socket.AF_UNIX) as closed:
        closed.close()
        with pytest.raises(PermissionDeniedError, match="does not say who"):
            peer_uid(closed)


def test_the_peers_uid_is_read_as_macos_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mac:
        def getsockopt(self, level: int, option: int, length: int) -> bytes:
            assert (level, option, length) == (0, 1, 76)
            return b"".join(n.to_bytes(4, sys.byteorder) for n in (0, 501)) + bytes(68)

    monkeypatch.setattr(sys, "platform", "darwin")
    assert peer_uid(Mac()) == 501  # type: ignore[arg-type]


# ── claiming ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_a_claim_makes_is_private_whatever_the_umask(
    path: str, owned: Callable[[str], Claim], umask: int
) -> None:
    before = os.umask(umask)
    try:
        with owned(path).listen():
            pass
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    files = [Path(path).parent, Path(path), Path(path + ".lock")]
    assert [stat.S_IMODE(file.lstat().st_mode) for file in files] == [0o700, 0o600, 0o600]


def test_a_second_claim_is_refused_until_the_first_is_released(
    path: str, owned: Callable[[str], Claim]
) -> None:
    first = owned(path)
    with pytest.raises(TryAgainError, match="another daemon") as error:
        owned(path)
    assert error.value.exit_status == 75
    first.release()
    owned(path)


def test_release_removes_the_socket_and_can_be_repeated(path: str, owned: Callable[[str], Claim]) -> None:
    claimed = owned(path)
    with claimed.listen():
        claimed.release()
        claimed.release()
    assert [file.name for file in Path(path).parent.iterdir()] == ["daemon.sock.lock"]


def test_release_leaves_anothers_socket_at_the_path(path: str, owned: Callable[[str], Claim]) -> None:
    claimed = owned(path)
    with claimed.listen():
        Path(path).unlink()
        with bound(path):
            claimed.release()
            assert Path(path).is_socket()


def test_release_leaves_a_socket_that_was_passed_to_us(path: str, owned: Callable[[str], Claim]) -> None:
    private(path)
    with bound(path) as passed:
        passed.listen()
        owned(path).release()
        dialled(path).close()


@pytest.mark.parametrize("listening", [True, False])
def test_a_socket_without_the_lock_is_replaced_only_where_nobody_listens(
    path: str, owned: Callable[[str], Claim], listening: bool
) -> None:
    private(path)
    with bound(path) as there:
        if not listening:
            with owned(path).listen(), closing(dialled(path)):
                return
        there.listen(0)
        for _ in range(3):  # its backlog fills up, and it is still somebody's
            with pytest.raises(TryAgainError, match="another process listens"):
                claim_and_listen(path)
        with pytest.raises(TryAgainError):
            dialled(path, 0)


def test_a_daemon_killed_with_kill_9_leaves_nothing_to_clean(
    path: str, owned: Callable[[str], Claim]
) -> None:
    code = f"from myllm.daemon.claim import claim; c = claim({path!r}); s = c.listen(); print(1); input()"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(TryAgainError):
            owned(path)
        dialled(path).close()
        child.kill()
    assert Path(path).is_socket()
    with owned(path).listen(), closing(dialled(path)):
        pass


def test_a_claim_is_not_inherited_by_a_program_that_is_started(
    path: str, owned: Callable[[str], Claim]
) -> None:
    first = owned(path)
    with subprocess.Popen(
        [sys.executable, "-c", "input(print('runs', flush=True))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()  # from here on it is the other program, which has only what it inherits
        first.release()
        owned(path)
        child.communicate(b"\n")


def test_a_killed_daemons_socket_may_answer_a_little_longer(path: str, owned: Callable[[str], Claim]) -> None:
    private(path)
    with bound(path) as dying, ExitStack() as stack:
        dying.listen()
        death = threading.Timer(0.1, dying.close)
        death.start()
        stack.callback(death.join)
        stack.enter_context(owned(path).listen())
        dialled(path).close()


# ── planted objects ─────────────────────────────────────────────────────────────────────────


def plant(path: str, what: str) -> ExitStack:
    """Puts `what` at the path; the stack closes what must stay open meanwhile."""
    stack, file = ExitStack(), private(path)
    other = file.parent.parent / "other"
    match what:
        case "file":
            file.write_text("precious")
        case "folder":
            file.mkdir()
        case "symlink":  # to a socket where somebody listens
            stack.enter_context(bound(str(other))).listen()
            file.symlink_to(other)
        case "dangling":
            file.symlink_to(other)
        case "fifo":
            os.mkfifo(file)
        case "stranger" | "stale":
            stack.enter_context(bound(path))
        case "datagram":
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(path)
    return stack


PLANTED = ["file", "folder", "symlink", "dangling", "fifo", "stranger", "datagram"]


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_object_is_refused_and_left_untouched(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with plant(path, what):
        before = Path(path).lstat()
        if what == "stranger":
            as_stranger(monkeypatch, path)
        with pytest.raises(PermissionDeniedError, match=r"daemon\.sock: .*move it away") as error:
            claim_and_listen(path)
        assert error.value.exit_status == 77
        monkeypatch.undo()
        after = Path(path).lstat()
        assert (after.st_ino, after.st_mode, after.st_mtime) == (
            before.st_ino,
            before.st_mode,
            before.st_mtime,
        )
        assert what != "file" or Path(path).read_text() == "precious"
        assert (tmp_path / "other").exists() == (what == "symlink")
    claim(path).release()  # and the lock was given back


def claim_and_listen(path: str) -> None:
    claimed = claim(path)
    try:
        claimed.listen().close()
    finally:
        claimed.release()


@pytest.mark.parametrize("what", ["file", "symlink", "stranger", "group", "others"])
def test_a_folder_that_is_not_ours_alone_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = Path(path).parent
    if what == "file":
        folder.write_text("")
    elif what == "symlink":
        (tmp_path / "real").mkdir(0o700)
        folder.symlink_to(tmp_path / "real")
    else:
        folder.mkdir()
        folder.chmod({"group": 0o720, "others": 0o702}.get(what, 0o700))
    if what == "stranger":
        as_stranger(monkeypatch, str(folder))
    with pytest.raises(PermissionDeniedError, match=r"run: (it is not a folder of yours|others may write)"):
        claim(path)
    monkeypatch.undo()
    assert not folder.is_dir() or not any(folder.iterdir())


@pytest.mark.parametrize("what", ["file", "folder", "symlink", "fifo", "stranger"])
def test_a_lock_that_is_not_a_file_of_ours_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    lock, target = Path(private(path).with_name("daemon.sock.lock")), tmp_path / "target"
    match what:
        case "file":  # of ours: taken as it is
            lock.write_text("old")
            claim(path).release()
            assert lock.read_text() == "old"
            return
        case "folder":
            lock.mkdir()
        case "symlink":
            lock.symlink_to(target)
        case "fifo":
            os.mkfifo(lock)
        case "stranger":
            lock.touch()
            folder_uid = os.getuid()
            monkeypatch.setattr(os, "fstat", stranger_fstat(os.fstat, folder_uid))
    with pytest.raises(PermissionDeniedError, match=r"daemon\.sock\.lock: it is not a file of yours"):
        claim(path)
    assert not target.exists()


def stranger_fstat(real: Callable[[int], os.stat_result], ours: int) -> Callable[[int], os.stat_result]:
    def fstat(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[4] = STRANGER if fields[4] == ours else fields[4]
        return os.stat_result(fields)

    return fstat


def test_a_folder_that_cannot_be_made_or_written_is_told(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: Callable[[str], Claim]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError, match="cannot be created") as error:
        claim(str(tmp_path / "file" / "run" / "daemon.sock"))
    assert error.value.exit_status == 73
    private(path)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system")

    claimed = owned(path)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(CannotCreateError, match="Read-only file system"):
        claimed.listen()
    claimed.release()
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CannotCreateError, match="Read-only file system"):
        claim(path)


MODES = """
import os, sys, pathlib, myllm.locks
from myllm.errors import MyllmError
from myllm.client.dial import dial
from myllm.daemon.claim import claim
os.chdir({folder!r})
if os.getuid() == 0:
    os.chown("mine", {stranger}, 0)
    os.setuid({stranger})
try:
    print({call})
except MyllmError as error:
    print(error.exit_status, error)
"""


@pytest.mark.parametrize(
    ("mode", "call", "told"),
    [
        (0o500, "claim('mine/daemon.sock')", "73 mine/daemon.sock.lock: Permission denied; "),
        (0o500, "claim('mine/run/daemon.sock')", "73 mine/run: cannot be created: Permission denied; "),
        (0o700, "claim('/daemon.sock')", "77 /: it is not a folder of yours; "),  # root's
        (0o000, "dial('mine/daemon.sock', 1)", "None"),  # after `su`: a cold command runs
    ],
)
def test_modes_of_folders_bind_who_is_not_root(tmp_path: Path, mode: int, call: str, told: str) -> None:
    """In a child that gives up being root, whom no mode binds; its paths start at a folder it may enter."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(mode)
    code = MODES.format(folder=str(tmp_path), stranger=STRANGER, call=call)
    tmp_path.chmod(0o755)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (tmp_path / "mine").chmod(0o700)
    assert ended.stdout.startswith(told)


# ── races ───────────────────────────────────────────────────────────────────────────────────


def connections(listener: socket.socket) -> int:
    """How many connections wait to be accepted; accepts them."""
    listener.setblocking(False)
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def compete(path: str, start: threading.Barrier, decided: threading.Barrier) -> int | type[MyllmError]:
    """One starter: how many reached it where it won, else the error it lost with."""
    start.wait()
    try:
        claimed = claim(path)
    except MyllmError as error:
        decided.wait()
        return type(error)
    with claimed.listen() as listener:
        decided.wait()
        dialled(path).close()
        claimed.release()
        return connections(listener)


def test_of_eight_threads_exactly_one_listens(path: str) -> None:
    """Each time beside a dead daemon's socket, which a careless loser would take the winner's for."""
    private(path)
    start, decided = threading.Barrier(8, timeout=30), threading.Barrier(8, timeout=30)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            bound(path).close()
            ended = [threads.submit(compete, path, start, decided) for _ in range(8)]
            results = [each.result() for each in ended]
            assert sorted(results, key=str) == [1] + [TryAgainError] * 7
            assert not Path(path).exists()


RACER = """
import os, sys
from myllm.errors import TryAgainError
from myllm.daemon.claim import claim
path, wins = sys.argv[1], 0
while wins < 20:
    try:
        claimed = claim(path)
    except TryAgainError:
        continue
    with claimed.listen():
        os.close(os.open(path + ".held", os.O_CREAT | os.O_EXCL))  # fails where another has it, too
        os.unlink(path + ".held")
        wins += 1
        if wins % 2:
            claimed.release()
        else:
            os.close(claimed._lock)  # as when it is killed: its socket stays, and answers a little longer
"""


def test_of_eight_processes_never_two_listen(path: str) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, path], stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    assert [racer.communicate()[1] for racer in racers] == [""] * 8
    assert [racer.returncode for racer in racers] == [0] * 8
