"""The log: lines that programs read, nothing in them that users wrote, and no failure of its own."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from myllm import logs
from myllm.errors import UnavailableError
from myllm.logs import Log, open_log, redact


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the log will be; its folder does not exist yet."""
    return tmp_path / "state" / "daemon.log"


@pytest.fixture
def log(file: Path) -> Iterator[Log]:
    opened = open_log(file)
    yield opened
    opened.close()


def lines_of(file: Path) -> list[dict[str, Any]]:
    data = file.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


# ── a line ──────────────────────────────────────────────────────────────────────────────────


def test_a_line_says_when_how_grave_what_and_its_fields(log: Log, file: Path) -> None:
    log.write("request ends", request=17, model="smollm2", seconds=0.25, cached=None, ok=True)
    log.write("worker died", level="error", why=UnavailableError("worker: gone; try again"), path=file)
    first, second = lines_of(file)
    assert list(first) == ["time", "level", "event", "request", "model", "seconds", "cached", "ok"]
    assert list(first.values())[1:] == ["info", "request ends", 17, "smollm2", 0.25, None, True]
    assert first["time"].endswith("Z")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    assert second["level"] == "error"
    assert (second["why"], second["path"]) == ("worker: gone; try again", str(file))


def test_a_field_cannot_take_a_lines_own_names(log: Log, file: Path) -> None:
    log.write("started", **{"time": 1, "event": "forged"})
    assert lines_of(file)[0]["event"] == "started"
    assert lines_of(file)[0]["time"] != 1


def test_any_value_becomes_json(log: Log, file: Path) -> None:
    log.write(
        "odd", nan=float("nan"), data=b"secret", many=[1, (2.5, {"x": {3}})], lone="\udcff", what=object
    )
    (line,) = lines_of(file)
    assert (line["nan"], line["data"], line["many"]) == (None, "6 bytes", [1, [2.5, {"x": [3]}]])
    assert (line["lone"], line["what"]) == ("\udcff", "<class 'object'>")


def test_no_control_character_reaches_the_file(log: Log, file: Path) -> None:
    hostile = "".join(map(chr, range(0xA0))) + "\u2028\u202e\x1b]52;c;x\x07"
    log.write("a\nb", name=hostile, **{"key\n\x7f": [hostile]})
    data = file.read_bytes()
    assert all(0x20 <= byte < 0x7F for byte in data[:-1])
    (line,) = lines_of(file)
    assert (line["event"], line["name"], line["key\n\x7f"]) == ("a\nb", hostile, [hostile])


def test_of_a_long_text_only_the_length_is_written(log: Log, file: Path) -> None:
    log.write("bad line", why="x" * 4000, then="x" * 4001, hostile=":/" * 10_000_000)
    (line,) = lines_of(file)
    assert (line["why"], line["then"]) == ("x" * 4000, "4001 characters")
    assert line["hostile"] == "20000000 characters"


# ── what is left out ────────────────────────────────────────────────────────────────────────

CANARY = "canary"


@pytest.mark.parametrize("name", [*sorted(logs.NEVER), "Prompt", "FULL_TEXT"])
def test_what_users_and_models_wrote_is_left_out_at_any_depth(log: Log, file: Path, name: str) -> None:
    log.write("request", **{name: CANARY}, kept={"a": [{name: [CANARY], "n": 1}]})
    assert CANARY not in file.read_text()
    assert lines_of(file)[0]["kept"] == {"a": [{"n": 1}]}


@pytest.mark.parametrize("name", ["prompt", "messages", "text", "texts", "full_text"])
def test_these_names_are_among_them(name: str) -> None:
    assert name in logs.NEVER


SECRETS = [
    ("token hf_canaryCANARY0123 refused", "token hf_*** refused"),
    ("HF_TOKEN=hf_canaryCANARY0123", "HF_TOKEN=hf_***"),
    ("key sk-proj-canary_canary-1, sk-canary2", "key sk-***, sk-***"),
    (repr("line\nsk-canary12"), "'line\\nsk-***'"),
    ("Authorization: Bearer canary.canary/=", "Authorization: Bearer ***"),
    ("get https://canary:canary@example.com/m.gguf failed", "get https://***@example.com/m.gguf failed"),
    ("https://canary:c@na/ry", "https://***@na/ry"),
    ("https://example.com/m?X-Amz-Signature=canary&b='canary' x", "https://example.com/m?*** x"),
    ("https://example.com/cb#access_token=canary", "https://example.com/cb#***"),
    ("https://canary@a/b?canary http://canary:canary@b?canary", "https://***@a/b?*** http://***@b?***"),
    ("https://example.com?mail=canary@example.com", "https://***@example.com"),
]


@pytest.mark.parametrize(("planted", "shown"), SECRETS)
def test_a_secret_is_hidden_and_the_rest_kept(planted: str, shown: str) -> None:
    assert redact(planted) == shown


@pytest.mark.parametrize("planted", [planted for planted, _ in SECRETS])
def test_a_secret_is_hidden_wherever_it_stands(log: Log, file: Path, planted: str) -> None:
    log.write(
        planted, plain=planted, error=OSError(planted), many=[{"deep": (planted,)}], path=Path("x", planted)
    )
    log.write("key", **{planted: 1})
    assert "canary" not in file.read_text().lower()


@pytest.mark.parametrize(
    "text",
    [
        "task-scheduler",
        "disk-cache-full",
        "hf_hub_download",
        "hf:owner/repo:Q4_K_M",
        "me@example.com",
        "what? x#y",
    ],
)
def test_what_is_no_secret_is_kept(text: str) -> None:
    assert redact(text) == text


# ── the file ────────────────────────────────────────────────────────────────────────────────


def old(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}.{number}")


def test_the_file_is_rotated_and_three_old_ones_are_kept(
    log: Log, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    umask = os.umask(0)
    try:
        for number in range(100):
            log.write("event", number=number)
    finally:
        os.umask(umask)
    files = [old(file, 3), old(file, 2), old(file, 1), file]
    assert sorted(file.parent.iterdir()) == sorted(files)
    numbers = [line["number"] for each in files for line in lines_of(each)]
    assert numbers == list(range(numbers[0], 100))
    assert len(numbers) > 30
    assert all(each.stat().st_size <= 1000 for each in files)
    assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(("size", "rotated"), [(5 * 2**20 - 1, True), (5 * 2**20 - 1000, False)])
def test_a_file_that_is_there_is_continued_up_to_5_mib(
    log: Log, file: Path, size: int, rotated: bool
) -> None:
    file.parent.mkdir()
    file.write_text("{}\n".rjust(size))
    file.chmod(0o644)
    log.write("started")
    assert old(file, 1).exists() is rotated
    assert file.stat().st_size == (0 if rotated else size) + len(file.read_bytes().splitlines()[-1]) + 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_line_longer_than_a_file_gets_one_of_its_own(
    log: Log, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 10)
    log.write("one")
    log.write("two")
    assert [lines_of(each)[0]["event"] for each in (old(file, 1), file)] == ["one", "two"]
    assert not old(file, 2).exists()


def test_nothing_is_made_before_the_first_event(log: Log, file: Path) -> None:
    assert not file.parent.exists()
    log.write("started")
    log.close()
    log.write("still there")
    assert len(lines_of(file)) == 2


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_no_line_of_many_threads_is_lost_or_torn_by_a_rotation(
    log: Log, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 50_000)

    def work(thread: int) -> None:
        for number in range(100):
            log.write("event", thread=thread, number=number, filler="x" * 100)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted(file.parent.iterdir())
    lines = [(line["thread"], line["number"]) for each in files for line in lines_of(each)]
    assert sorted(lines) == [(thread, number) for thread in range(8) for number in range(100)]
    assert len(files) == 4
    assert all(each.stat().st_size <= 50_000 for each in files)
    assert capsys.readouterr().err == ""


# ── trouble ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["symlink", "dangling", "fifo", "folder"])
def test_what_is_no_file_of_its_own_is_not_written(
    log: Log, file: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.parent.mkdir()
    target = tmp_path / "target"
    with ExitStack() as stack:
        match what:
            case "symlink":
                target.write_text("precious")
                file.symlink_to(target)
            case "dangling":
                file.symlink_to(target)
            case "fifo":  # with a reader, so that it can be opened
                os.mkfifo(file)
                stack.callback(os.close, os.open(file, os.O_RDONLY | os.O_NONBLOCK))
            case "folder":
                file.mkdir()
        log.write("one")
        log.write("two")
    assert capsys.readouterr().err.count(f"myllm: {file}: the log cannot be written: ") == 1
    assert not target.exists() or target.read_text() == "precious"
    assert target.exists() == (what == "symlink")


def test_a_symlink_among_the_old_files_is_replaced_and_not_followed(
    log: Log, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 10)
    file.parent.mkdir()
    (tmp_path / "target").write_text("precious")
    old(file, 1).symlink_to(tmp_path / "target")
    log.write("one")
    log.write("two")
    assert not old(file, 1).is_symlink()
    assert (tmp_path / "target").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_told_once_and_tried_again(
    log: Log, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.parent.write_text("in the way")
    log.write("one")
    log.write("two")
    assert capsys.readouterr().err.count("\n") == 1
    file.parent.unlink()
    log.write("three")
    assert [line["event"] for line in lines_of(file)] == ["three"]


FULL = """
import resource, signal, sys
from pathlib import Path
from myllm.logs import open_log
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = open_log(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for number in range(30):
    log.write("event", number=number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write("room again")
"""


def test_a_full_disk_costs_lines_and_nothing_else(file: Path) -> None:
    """The kernel refuses to write beyond 1,000 bytes, in the middle of a line; then it does not any more."""
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=True
    )
    assert ended.stderr == f"myllm: {file}: the log cannot be written: File too large; make room for it\n"
    *events, last = lines_of(file)
    assert [event["number"] for event in events] == list(range(len(events)))
    assert 5 < len(events) < 30
    assert last["event"] == "room again"


def test_a_failing_log_leaves_no_descriptor_open(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    before = set(Path("/proc/self/fd").iterdir())
    log = open_log(file)
    for _ in range(10):
        log.write("event")
    assert set(Path("/proc/self/fd").iterdir()) == before
    os.close(reader)


# ── stderr ──────────────────────────────────────────────────────────────────────────────────


def test_without_a_file_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(None)
    log.write("started", request=1)
    log.close()
    captured = capsys.readouterr()
    assert json.loads(captured.err)["request"] == 1
    assert captured.err.endswith("\n")
    assert captured.out == ""


class Broken(io.StringIO):
    """A stream that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", ["closed", "none", "broken"])
def test_a_stderr_that_is_gone_is_no_failure(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"closed": closed, "none": None, "broken": Broken()}[stream])
    open_log(None).write("started")
