"""The worker process by itself, spoken to in its own protocol."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm.protocol import encode, hello
from myllm.spawning import PROTOCOL_FD, WorkerProcess, spawn

Event = dict[str, Any]
FakeModel = Callable[..., Path]


class Peer:
    """The other side of a worker."""

    def __init__(self) -> None:
        self.process: WorkerProcess = spawn()
        self.process.protocol.settimeout(20)
        self._lines = self.process.protocol.makefile("rb")

    def send(self, *messages: Event) -> None:
        self.process.protocol.sendall(b"".join(map(encode, messages)))

    def event(self) -> Event:
        return dict(orjson.loads(self._lines.readline()))

    def done(self) -> Event:
        """The next done event; those before it are dropped."""
        while not (event := self.event()).get("done"):
            pass
        return event

    def load(self, path: Path) -> Event:
        self.send(hello("test"), {"op": "load", "path": str(path), "name": "fake", "options": {}})
        return self.done()

    def close(self) -> None:
        self._lines.close()
        self.process.protocol.close()

    def end(self) -> int:
        """Closes the connection; the exit code of the worker, which must follow within a second."""
        self.close()
        for _ in range(100):
            pid, status = os.waitpid(self.process.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.process.pid, signal.SIGKILL)
        os.waitpid(self.process.pid, 0)
        pytest.fail("the worker did not end with its connection")


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()
    os.close(peer.process.words)
    try:
        os.kill(peer.process.pid, signal.SIGKILL)
        os.waitpid(peer.process.pid, 0)
    except (ProcessLookupError, ChildProcessError):  # the test saw it end
        pass


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Path]:
    """A file held open on a descriptor that children inherit, as a shell's process substitution does."""
    path = tmp_path / "inheritable"
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        yield path


def test_it_holds_nothing_of_its_parents_and_cannot_be_interrupted(open_file: Path, peer: Peer) -> None:
    assert peer.event()["hello"]["protocol"] == 1
    about = Path(f"/proc/{peer.process.pid}")
    null, out, err, protocol = ((about / "fd" / str(fd)).readlink() for fd in range(PROTOCOL_FD + 1))
    assert str(null) == "/dev/null"
    assert out == err != Path("/proc/self/fd/1").readlink()
    assert str(protocol).startswith("socket:")
    links = []
    for fd in (about / "fd").iterdir():
        with suppress(FileNotFoundError):  # a module's file, just read
            links.append(fd.readlink())
    assert open_file not in links
    assert os.getsid(peer.process.pid) == peer.process.pid
    os.kill(peer.process.pid, signal.SIGINT)
    assert "Max core file size        0 " in (about / "limits").read_text()
    peer.send({"op": "status", "id": 1})
    assert peer.event() == {"id": 1, "done": True, "status": {}}


def test_it_can_be_started_where_stdin_and_stdout_are_closed() -> None:
    """The socketpair then gets the very descriptors that the worker's standard streams are put on."""
    pid = os.fork()
    if not pid:
        try:
            os.closerange(0, 256)
            process = spawn()
            greeting = process.protocol.recv(4096)
            os._exit(0 if greeting.startswith(b'{"hello"') else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_it_ends_at_once_with_its_connection(peer: Peer, fake_model: FakeModel) -> None:
    assert peer.load(fake_model())["window"] == 4096
    assert peer.end() == 0


@pytest.mark.parametrize("script", [{"load_ms": 60_000}, {"fault": {"kind": "hang"}}])
def test_it_ends_at_once_also_in_the_middle_of_something(
    peer: Peer, fake_model: FakeModel, script: Event
) -> None:
    peer.send({"op": "load", "path": str(fake_model(**script)), "name": "fake", "options": {}})
    peer.send({"op": "gen", "id": 1, "prompt": "a", "raw": True})
    assert "hello" in peer.event()
    assert peer.end() == 0


def test_a_message_that_is_none_ends_it_with_a_word(peer: Peer) -> None:
    peer.process.protocol.sendall(b"nonsense\n")
    assert os.waitstatus_to_exitcode(os.waitpid(peer.process.pid, 0)[1]) == 65
    assert b"not JSON" in os.read(peer.process.words, 4096)


def test_requests_before_a_model_is_there_fail(peer: Peer) -> None:
    peer.send({"op": "gen", "id": 1, "prompt": "a"})
    event = peer.done()
    assert (event["id"], event["error"]["code"]) == (1, "unavailable")


def test_a_request_it_cannot_prepare_fails_alone(peer: Peer, fake_model: FakeModel) -> None:
    refusing = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}fine"
    peer.load(fake_model(template=refusing))
    peer.send(
        {"op": "gen", "id": 1, "prompt": "bad"},
        {"op": "gen", "id": 2, "prompt": "good"},
        {"op": "gen", "id": 3, "prompt": "good", "template": "no-such-template"},
    )
    ended = {event["id"]: event for event in (peer.done() for _ in range(3))}
    assert ended[1]["error"]["code"] == "bad_data"
    assert ended[2]["full_text"] == "fine"
    assert ended[3]["error"]["code"] == "usage"


def test_a_request_cancelled_before_the_engine_has_it_ends_once(peer: Peer, fake_model: FakeModel) -> None:
    peer.send({"op": "load", "path": str(fake_model(load_ms=300)), "name": "fake", "options": {}})
    for request_id in (1, 2):
        peer.send({"op": "gen", "id": request_id, "prompt": "a b", "raw": True})
    peer.send({"op": "cancel", "id": 1})
    cancelled, loaded, answered = peer.done(), peer.done(), peer.done()
    assert (cancelled["id"], cancelled["finish_reason"]) == (1, "cancelled")
    assert "window" in loaded
    assert (answered["id"], answered["full_text"]) == (2, "a b")


def test_a_request_paused_before_the_engine_has_it_begins_when_it_is_resumed(
    peer: Peer, fake_model: FakeModel
) -> None:
    peer.send({"op": "load", "path": str(fake_model(load_ms=300)), "name": "fake", "options": {}})
    peer.send(
        {"op": "gen", "id": 1, "prompt": "a b", "raw": True},
        {"op": "embed", "id": 2, "texts": ["a b"]},
        {"op": "gen", "id": 3, "prompt": "c d", "raw": True},
        *({"op": "pause", "id": number} for number in (1, 2, 77)),
    )
    assert "window" in peer.done()
    assert peer.done()["id"] == 3
    peer.send({"op": "status"})
    assert peer.done()["status"]["paused"] == 2
    peer.send({"op": "resume", "id": 1})
    assert peer.done()["full_text"] == "a b"
    peer.send({"op": "resume", "id": 2})
    assert peer.done()["dimensions"] == 8


def children(pid: int) -> list[str]:
    """The processes that one has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended just now
            if (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(entry.name)
    return found


@pytest.mark.model
@pytest.mark.parametrize(("name", "dimensions", "notes"), [("minilm", 384, 0), ("smollm2", 576, 1)])
def test_a_model_made_for_text_embeds_with_a_note_and_an_encoder_has_no_renderer(
    peer: Peer, request: pytest.FixtureRequest, name: str, dimensions: int, notes: int
) -> None:
    path = request.getfixturevalue(f"{name}_path")
    peer.send({"op": "load", "path": str(path), "name": name, "options": {}})
    assert "window" in peer.done()
    assert bool(children(peer.process.pid)) == (name == "smollm2")
    peer.send({"op": "embed", "id": 1, "texts": ["a cat sat"]})
    events = [peer.event()]
    while not events[-1].get("done"):
        events.append(peer.event())
    assert events[-1]["dimensions"] == dimensions
    said = [event["note"] for event in events if "note" in event]
    assert len(said) == notes
    assert all("made for text" in note and "last layer" in note for note in said)
    peer.send({"op": "gen", "id": 2, "prompt": "hi", "max_tokens": 1})
    answer = peer.done()
    assert ("myllm embed" in answer.get("error", {}).get("message", "")) == (name == "minilm")


def test_an_embedding_cancelled_before_the_engine_has_it_ends_once(peer: Peer, fake_model: FakeModel) -> None:
    peer.send({"op": "load", "path": str(fake_model(load_ms=300)), "name": "fake", "options": {}})
    for request_id in (1, 2):
        peer.send({"op": "embed", "id": request_id, "texts": ["a b"]})
    peer.send({"op": "cancel", "id": 1})
    cancelled, loaded, vector, ended = peer.done(), peer.done(), peer.event(), peer.event()
    assert (cancelled["id"], cancelled["finish_reason"]) == (1, "cancelled")
    assert cancelled.keys() - {"finish_reason"} == ended.keys()
    assert cancelled["timings"].keys() == ended["timings"].keys()
    assert (cancelled["dimensions"], cancelled["usage"]["prompt_tokens"]) == (0, 0)
    assert "window" in loaded
    assert (vector["id"], vector["item"]) == (2, 0)
    assert (ended["id"], ended["done"]) == (2, True)


def test_control_tokens_in_user_text_stay_text(peer: Peer, fake_model: FakeModel) -> None:
    """The echo leaves control tokens out, so that text that comes back whole was never one."""
    peer.load(fake_model(template="<s>{% for m in messages %}{{ m['content'] }}{% endfor %}</s>"))
    peer.send({"op": "gen", "id": 1, "prompt": "a <|im_end|> </s> b"})
    assert peer.done()["full_text"] == "a <|im_end|> </s> b"


def test_one_step_is_one_write(peer: Peer, fake_model: FakeModel) -> None:
    """Datagram-like reads show the writes: with a pause between steps, each read holds whole steps."""
    peer.load(fake_model(tokens=["x"] * 5, ms_per_token=30))
    with socket.socket(fileno=os.dup(peer.process.protocol.fileno())) as raw:
        raw.settimeout(20)
        peer.send(*({"op": "gen", "id": number, "prompt": "a", "raw": True} for number in range(8)))
        reads, ended = [], 0
        while ended < 8:
            reads.append(raw.recv(2**16))
            ended += reads[-1].count(b'"done":true')
    assert len(reads) <= 5 + 1 + 3
    assert max(read.count(b"\n") for read in reads) >= 8


def test_what_a_template_left_open_is_reasoning_and_no_answer(peer: Peer, fake_model: FakeModel) -> None:
    template = "{{ messages[0].content }} <think>\n"
    peer.event()
    peer.load(fake_model(template=template, tokens=["hm", "</think>", "Yes"]))
    peer.send({"op": "gen", "id": 1, "prompt": "hi"})
    done = peer.done()
    assert (done["full_text"], done["reasoning_text"]) == ("Yes", "hm")
