"""Every command does the same with a daemon and without: output, messages and exit status."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import myllm.client
from myllm.cli import myllm as root
from myllm.protocol import Message, encode
from myllm.socket_file import socket_path

from .conftest import Captured, Ended, Run, processes_of

FakeModel = Callable[..., Path]
VARYING = ("timings", "seed")
RECORDS = b'{"id":"a","prompt":"one"}\n{"prompt":"two","max_tokens":1}\nno JSON\n{"prompt":"x","seed":"y"}\n'
LINES = b"one\ntwo two\n\nthree\n"
COMMANDS: dict[str, tuple[tuple[str, ...], bytes | None]] = {
    "gen as JSONL": (("gen", "-m", "ECHO", "a b c", "--seed", "7"), None),
    "gen as text": (("gen", "-t", "-m", "ECHO", "Sum up."), b"The text.\n"),
    "gen with all kinds of parameters": (
        (
            "gen",
            "-m",
            "ECHO",
            "a b c",
            "--max-tokens",
            "2",
            "--logprobs",
            "1",
            "--system",
            "s",
            "--top-k",
            "1",
        ),
        None,
    ),
    "count": (("gen", "--count", "-t", "-m", "ECHO", "one two"), None),
    "count as JSONL": (("gen", "--count", "-m", "ECHO", "one two", "--context", "9"), None),
    "batch": (("gen", "--batch", "-m", "ECHO"), RECORDS),
    "batch with tokens": (("gen", "--batch", "--stream", "-m", "ECHO"), b'{"prompt":"one two"}\n'),
    "batch as text": (("gen", "--batch", "-t", "-m", "ECHO"), RECORDS),
    "batch of counts": (("gen", "--batch", "--count", "-m", "ECHO"), RECORDS),
    "map": (("gen", "--map", "<{}>", "-t", "-m", "ECHO"), LINES),
    "embed lines": (("embed", "--input", "lines", "-m", "ECHO", "--no-cache"), LINES),
    "embed a document": (("embed", "-m", "ECHO", "--window", "8", "--no-cache"), b"word " * 30),
    "embed a long text that must not be cut": (
        ("embed", "-m", "ECHO", "--window", "8", "--on-overflow", "error"),
        b"word " * 30,
    ),
    "similar": (("embed", "-m", "ECHO", "--no-cache", "--input", "lines", "--similar-to", "two"), LINES),
    "no such model": (("gen", "-m", "nosuch", "hi"), None),
    "no such model as text": (("gen", "-t", "-m", "nosuch", "hi"), None),
    "no such file": (("gen", "-m", "./nosuch.gguf", "hi"), None),
    "no such model in a batch": (("gen", "--batch", "-m", "nosuch"), RECORDS),
    "no such model to embed": (("embed", "-m", "nosuch"), LINES),
    "a prompt over the window": (("gen", "-m", "NARROW"), b" word" * 100),
    "a prompt that is cut": (("gen", "-t", "-m", "NARROW", "--on-overflow", "head"), b" word" * 100),
    "a worker that dies": (("gen", "-m", "DYING", "hi"), None),
    "a worker that dies, as text": (("gen", "-t", "-m", "DYING TOO", "hi"), None),
    "a worker that dies while it loads, in a batch": (("gen", "--batch", "-m", "DYING EARLY"), RECORDS),
    "a value out of range": (("gen", "-m", "ECHO", "hi", "--top-p", "7"), None),
    "not UTF-8": (("gen", "-m", "ECHO"), b"caf\xe9"),
}


def neutral(ended: Ended) -> tuple[int, list[Any] | bytes, str]:
    """What of a run must not depend on who computed it."""
    out: list[Any] | bytes = ended.out
    if ended.out.startswith(b"{"):
        out = [{key: value for key, value in line.items() if key not in VARYING} for line in ended.lines]
        for usage in [line["usage"] for line in out if "usage" in line]:
            usage.pop("cached_tokens", None)  # a daemon may have met the beginning of a prompt before
    return ended.status, out, ended.err


@pytest.fixture
def models(fake_model: FakeModel) -> dict[str, str]:
    fault = {"kind": "abort", "after_tokens": 2, "words": "GGML_ASSERT failed"}
    made = {
        "ECHO": fake_model("echo"),
        "NARROW": fake_model("narrow", window=16),
        "DYING": fake_model("dying", tokens=["a", "b", "c"], fault=fault),
        "DYING TOO": fake_model("dying_too", tokens=["a", "b", "c"], fault=fault),
        "DYING EARLY": fake_model("dying_early", fault={**fault, "at": "load"}),
    }  # a model that dies three times is refused for a while: one for each
    return {name: str(path) for name, path in made.items()}


@pytest.mark.usefixtures("daemons")
def test_every_command_does_the_same_warm_and_cold(
    run: Run, models: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_of_them() -> dict[str, Any]:
        return {
            what: neutral(run(*(models.get(word, word) for word in words), stdin=stdin))
            for what, (words, stdin) in COMMANDS.items()
        }

    cold = all_of_them()
    assert not any("daemon.daemon" in command for command in processes_of(home).values())
    assert {ended[0] for ended in cold.values()} == {0, 1, 2, 65, 66, 67, 69}
    run("load", models["ECHO"])
    monkeypatch.setenv("MYLLM_DAEMON", "always")
    warm = all_of_them()
    assert warm == cold


@pytest.mark.usefixtures("daemons")
def test_the_model_configured_here_is_used_whatever_the_daemon_was_started_with(
    run: Run, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("load", fake_model("one", tokens=["one"]))
    two = fake_model("two", tokens=["two"])
    monkeypatch.setenv("MYLLM_MODEL", f"./{two.name}")
    assert run("gen", "-t", "hi", cwd=two.parent).out == b"two\n"


@pytest.mark.usefixtures("daemons")
@pytest.mark.parametrize("how", ["flag", "variable"])
def test_without_the_daemon_a_command_loads_by_itself(
    run: Run, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = fake_model(load_ms=400)
    run("load", model)
    flags = ["--no-daemon"] if how == "flag" else []
    if how == "variable":
        monkeypatch.setenv("MYLLM_DAEMON", "never")
    assert run("gen", "hi", "-m", model, *flags).lines[-1]["timings"]["load_ms"] >= 400
    assert run("embed", "-m", model, *flags, stdin=b"hi").status == 0
    (entry,) = run("load", "--list").lines
    assert entry["cached"] == entry["busy"] == 0


@pytest.mark.parametrize("words", [["gen", "hi"], ["gen", "--batch"], ["embed"]])
def test_where_a_daemon_is_a_must_its_absence_is_69(
    run: Run, fake_model: FakeModel, home: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("MYLLM_DAEMON", "always")
    ended = run(*words, "-m", fake_model(), stdin=b"text\n")
    assert (ended.status, ended.out) == (69, b"")
    assert "myllm load" in ended.err
    assert processes_of(home) == {}


def test_a_socket_that_a_daemon_left_is_passed_over_without_a_word(run: Run, fake_model: FakeModel) -> None:
    path = Path(socket_path())
    path.parent.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    ended = run("gen", "-t", "hi", "-m", fake_model())
    assert (ended.status, ended.out, ended.err) == (0, b"hi\n", "")
    assert path.is_socket()


# ── who comes first ─────────────────────────────────────────────────────────────────────────


class Recorder:
    """A connection on which every request has an empty answer."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self._sent = threading.Semaphore(0)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sent.release()

    def send(self, request: Message) -> None:
        self.requests.append(request)
        self._sent.release()

    def batches(self) -> Any:
        answered = 0
        while self._sent.acquire() and answered < len(self.requests):
            yield [self._answer(self.requests[answered])]
            answered += 1

    def stream(self, request: Message) -> Any:
        self.requests.append(request)
        yield self._answer(request)

    @staticmethod
    def _answer(request: Message) -> bytes:
        done = {"done": True, "full_text": "", "finish_reason": "stop", "usage": {}}
        return encode({"id": request["id"], **done} if "id" in request else done).rstrip()


@pytest.mark.parametrize(
    ("words", "priority"),
    [
        (["gen", "hi", "-n"], 0),
        (["gen", "hi", "-n", "--nice", "5"], 5),
        (["gen", "--batch"], 1),
        (["gen", "--map", "<{}>"], 1),
        (["gen", "--batch", "--nice", "0"], 0),
        (["gen", "--map", "<{}>", "--nice", "19"], 19),
    ],
)
def test_nice_says_who_comes_first_and_many_are_patient_by_themselves(
    captured: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch, words: list[str], priority: int
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(myllm.client, "connect", lambda settings, note, **how: recorder)
    with root.make_context("myllm", words, obj=captured(b"one\n").streams) as context:
        assert root.invoke(context) == 0
    assert [request.get("priority", 0) for request in recorder.requests] == [priority]


@pytest.mark.parametrize("words", [["gen", "hi"], ["embed"]])
def test_nice_goes_from_0_to_19(run: Run, fake_model: FakeModel, words: list[str]) -> None:
    for value, status in (("19", 0), ("20", 2), ("-1", 2)):
        assert run(*words, "--nice", value, "-m", fake_model(), stdin=b"x").status == status
