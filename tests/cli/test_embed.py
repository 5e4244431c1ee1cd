"""`embed` against a scripted Runtime that speaks the wire contract over a socketpair."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest

from myllm.cli import myllm
from myllm.cli.progress import Progress
from myllm.cli.similar import Nearest
from myllm.client.client import Client
from myllm.errors import ContextOverflowError, MyllmError, NotFoundError, UnavailableError
from myllm.paths import cache_dir
from myllm.protocol import MessageReader, encode, hello
from myllm.requests import EmbedRequest, Request

from .conftest import Run as RunCommand

Captured = Any


def vector_of(text: str) -> list[float]:
    raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:4]]
    norm = sum(x * x for x in raw) ** 0.5
    return [x / norm for x in raw]


def encoded(text: str) -> str:
    return base64.b64encode(struct.pack("<4f", *vector_of(text))).decode()


def serve(connection: socket.socket, requests: list[dict[str, Any]]) -> None:
    """Answers until the client is gone, which may be at any moment, as for any server."""
    with suppress(ConnectionError):
        answer(connection, requests)


def answer(connection: socket.socket, requests: list[dict[str, Any]]) -> None:
    """A window is 100 characters here; items are answered last first."""
    reader = MessageReader()
    connection.sendall(encode(hello("test")))
    while data := connection.recv(65536):
        for message in reader.feed(data):
            if message.get("op") != "embed":
                continue
            requests.append(message)
            request_id = message.pop("id", None)
            request = asked(message)
            for item, text in reversed(list(enumerate(request.texts))):
                for event in items(request, text):
                    connection.sendall(encode({"id": request_id, "item": item, **event}))
            done = {"done": True, "model": "m", "dimensions": 4, "usage": {"cached_texts": 1}}
            connection.sendall(encode({"id": request_id, **done}))


def asked(message: dict[str, Any]) -> EmbedRequest:
    """What a message asks of a model, parsed as the Runtime does."""
    request = Request.parse(message).asked
    assert isinstance(request, EmbedRequest)
    return request


def items(request: EmbedRequest, text: str) -> Iterator[dict[str, Any]]:
    if len(text) > 100 and request.on_overflow == "error":
        yield {"error": ContextOverflowError("text: too long").to_wire()}
        return
    for chunk, start in enumerate(range(0, max(len(text), 1), 100)):
        part = text[start : start + 100]
        where = {"chunk": chunk, "start": start, "end": start + len(part), "tokens": 3}
        yield {**where, "embedding": encoded(part), "cached": False}


@pytest.fixture
def requests() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def connections() -> list[socket.socket]:
    return []


@pytest.fixture
def embed(
    monkeypatch: pytest.MonkeyPatch,
    captured: Callable[..., Captured],
    requests: list[dict[str, Any]],
    connections: list[socket.socket],
) -> Callable[..., tuple[int | MyllmError, list[dict[str, Any]], str]]:
    """Runs `myllm embed`: exit status or error, records, stderr."""

    def connect(settings: object, note: object, *, spare: bool = True) -> Client:
        ours, theirs = socket.socketpair()
        connections.append(theirs)
        server = threading.Thread(target=serve, args=(theirs, requests), daemon=True)
        server.start()

        def close() -> None:
            server.join(5)
            theirs.close()

        return Client(ours, close)

    monkeypatch.setattr("myllm.client.connect", connect)

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int | MyllmError, list[dict[str, Any]], str]:
        taken = captured(stdin)
        try:
            status = myllm.main(
                ["embed", *map(str, arguments)], "myllm", standalone_mode=False, obj=taken.streams
            )
        except MyllmError as error:
            status = error
        return status, [orjson.loads(line) for line in taken.out.splitlines()], taken.err

    return run


Embed = Callable[..., tuple[Any, list[dict[str, Any]], str]]


def test_stdin_is_one_document(embed: Embed) -> None:
    status, (record,), _ = embed(stdin=b"hello\n")
    assert status == 0
    numbers = record.pop("embedding")
    assert numbers == pytest.approx(vector_of("hello\n"), abs=1e-6)
    assert record == {
        "index": 0,
        "chunk": 0,
        "start": 0,
        "end": 6,
        "tokens": 3,
        "dimensions": 4,
        "model": "minilm",
        "cached": False,
    }


def test_records_hold_the_model_s_name_as_the_runtime_has_it_and_else_as_it_was_asked_for(
    embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (record,), _ = embed("-m", "my-alias", stdin=b"hello")
    assert record["model"] == "my-alias"
    unnamed = items
    monkeypatch.setattr(
        f"{__name__}.items", lambda *about: ({**event, "model": "minilm"} for event in unnamed(*about))
    )
    lines = b'{"text":"a","model":"mine"}\n' + b'{"text":"b"}\n' * 99
    _, records, _ = embed("-m", "my-alias", stdin=lines)
    assert {record["model"] for record in records} == {"minilm"}


def test_a_long_document_is_a_record_a_window(embed: Embed) -> None:
    _, records, _ = embed(stdin=b"x" * 250)
    assert [(r["index"], r["chunk"], r["start"], r["end"]) for r in records] == [
        (0, 0, 0, 100),
        (0, 1, 100, 200),
        (0, 2, 200, 250),
    ]


def test_records_keep_order_and_their_own_keys(embed: Embed, requests: list[dict[str, Any]]) -> None:
    lines = b"".join(b'{"text":"t%d","n":%d,"embedding":[1],"model":"x"}\n' % (n, n) for n in range(500))
    status, records, _ = embed(stdin=lines)
    assert status == 0
    assert [record["n"] for record in records] == list(range(500))
    assert [record["index"] for record in records] == list(range(500))
    assert {record["model"] for record in records} == {"minilm"}
    assert max(len(request["texts"]) for request in requests) == 64


def test_more_lines_than_may_be_held(embed: Embed) -> None:
    status, records, _ = embed("--input", "lines", stdin=b"line\n" * 5000)
    assert status == 0
    assert len(records) == 5000


def test_a_bad_line_is_one_error_record(embed: Embed) -> None:
    status, records, err = embed("--input", "jsonl", stdin=b'{"text":"a"}\nno\n{"text":"b"}\n')
    assert status == 1
    assert [record.get("error", {}).get("code") for record in records] == [None, "bad_data", None]
    assert "1 of 3 texts failed" in err


def test_a_lone_text_over_the_window_is_refused(embed: Embed) -> None:
    error, (record,), _ = embed("--on-overflow", "error", stdin=b"x" * 200)
    assert error.exit_status == 67
    assert record["error"]["code"] == "context_overflow"


def test_an_error_line_of_the_command_before_passes_on(embed: Embed) -> None:
    lines = b'{"token":"x","done":false}\n{"done":true,"error":{"code":"deadline","message":"late"}}\n'
    error, (record,), _ = embed(stdin=lines)
    assert record["error"] == {"code": "deadline", "message": "late"}
    assert error.code == "deadline"


def test_a_worker_that_dies_while_it_embeds_is_69_with_its_last_words(
    run: RunCommand, fake_model: Callable[..., Path]
) -> None:
    fault = {"kind": "abort", "at": "vector", "after_tokens": 2, "words": "GGML_ASSERT failed"}
    ended = run("embed", "-m", fake_model(fault=fault), "--window", 4, stdin=b"a b c. " * 400)
    assert ended.status == 69
    assert "GGML_ASSERT failed" in ended.err


def test_texts_that_a_dying_worker_leaves_are_error_records_and_the_others_have_vectors(
    run: RunCommand, fake_model: Callable[..., Path]
) -> None:
    fault = {"kind": "kill", "at": "vector", "after_tokens": 20, "words": "oh no"}
    lines = b"".join(b"line %d\n" % number for number in range(300))
    ended = run("embed", "-m", fake_model(fault=fault), "--input", "lines", stdin=lines)
    assert [record["index"] for record in ended.lines] == list(range(300))
    n_embedded = sum("embedding" in record for record in ended.lines)
    assert 0 < n_embedded < 300
    assert (ended.status, f"{300 - n_embedded} of 300 texts failed" in ended.err) == (1, True)
    assert "oh no" in ended.lines[-1]["error"]["message"]


def test_a_worker_that_dies_before_any_vector_is_69(run: RunCommand, fake_model: Callable[..., Path]) -> None:
    model = fake_model(fault={"kind": "kill", "at": "vector", "words": "oh no"})
    ended = run("embed", "-m", model, "--input", "lines", stdin=b"a\nb\nc\n")
    assert (ended.status, ended.err.count("\n"), "oh no" in ended.err) == (69, 1, True)
    assert [record["error"]["code"] for record in ended.lines] == ["worker_crashed"] * 3


def test_what_lets_no_text_be_embedded_ends_a_run_only_where_none_has_been(
    embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(connection: socket.socket, requests: list[dict[str, Any]]) -> None:
        """The first request for the texts that begin with "good" is answered, all others fail."""
        connection.sendall(encode(hello("test")))
        reader = MessageReader()
        while data := connection.recv(65536):
            for message in reader.feed(data):
                if "op" not in message:
                    continue
                request_id = message.pop("id", None)
                request = asked(message)
                for item in range(len(request.texts)):
                    if request.texts[0] == "good" and request_id == 0:
                        event = {"item": item, "chunk": 0, "start": 0, "end": 4, "tokens": 3, "cached": False}
                        connection.sendall(encode({"id": 0, **event, "embedding": encoded("good")}))
                failed = {"error": UnavailableError("no memory").to_wire()}
                connection.sendall(encode({"id": request_id, "done": True, **failed}))

    monkeypatch.setattr(f"{__name__}.answer", answer)
    error, records, _ = embed("--input", "lines", stdin=b"evil\n" * 100)
    assert (error.code, records) == ("unavailable", [])
    status, records, _ = embed("--input", "lines", stdin=b"good\n" * 100)
    assert status == 1
    assert [("error" in record) for record in records] == [False] * 64 + [True] * 36


def test_files_are_documents_with_their_path(embed: Embed, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    _, records, _ = embed(tmp_path / "a", tmp_path / "b")
    assert [(r["index"], r["path"]) for r in records] == [(0, f"{tmp_path}/a"), (1, f"{tmp_path}/b")]


def test_a_file_that_is_not_there(embed: Embed, tmp_path: Path) -> None:
    error, _, _ = embed(tmp_path / "missing")
    assert isinstance(error, NotFoundError)


@pytest.mark.parametrize("notation", ["base64", "hex"])
def test_other_notations_hold_the_same_numbers(embed: Embed, notation: str) -> None:
    _, (record,), _ = embed("--format", notation, stdin=b"hello")
    text = record["embedding"]
    raw = base64.b64decode(text) if notation == "base64" else bytes.fromhex(text)
    assert struct.unpack("<4f", raw) == pytest.approx(vector_of("hello"), abs=1e-6)
    assert record["dimensions"] == 4


def test_npy_is_a_matrix_with_its_records_beside_it(embed: Embed, tmp_path: Path) -> None:
    import numpy as np

    out = tmp_path / "v.npy"
    _, records, _ = embed("--input", "lines", "--format", "npy", "--out", out, stdin=b"a\nb\nc\n")
    assert np.load(out) == pytest.approx(np.array([vector_of(text) for text in "abc"]), abs=1e-6)
    assert [record["row"] for record in records] == [0, 1, 2]


def test_fewer_dimensions_have_norm_one(embed: Embed) -> None:
    _, (record,), _ = embed("--dimensions", 2, stdin=b"hello")
    assert len(record["embedding"]) == record["dimensions"] == 2
    assert sum(x * x for x in record["embedding"]) == pytest.approx(1)
    error, *_ = embed("--dimensions", 5, stdin=b"hello")
    assert error.exit_status == 2


def test_the_nearest_of_texts_and_of_stored_vectors(embed: Embed) -> None:
    lines = b"".join(b'{"text":"t%d","n":%d}\n' % (n, n) for n in range(50))
    expected = sorted(
        range(50), key=lambda n: -sum(a * b for a, b in zip(vector_of("t7"), vector_of(f"t{n}"), strict=True))
    )[:3]
    assert expected[0] == 7
    _, from_texts, _ = embed("--similar-to", "t7", "-k", 3, stdin=lines)
    assert [record["n"] for record in from_texts] == expected
    assert from_texts[0]["score"] == pytest.approx(1, abs=1e-5)
    for notation in ("json", "base64", "hex"):
        _, records, _ = embed("--format", notation, stdin=lines)
        stored = b"".join(orjson.dumps(record) + b"\n" for record in records)
        _, from_vectors, _ = embed("--similar-to", "t7", "-k", 3, stdin=stored)
        assert [record["n"] for record in from_vectors] == expected
        assert "embedding" not in from_vectors[0]


def test_the_text_looked_for_goes_the_same_connection_as_the_others(
    embed: Embed, requests: list[dict[str, Any]], connections: list[socket.socket]
) -> None:
    status, records, said = embed("--similar-to", "t3", "--input", "lines", stdin=b"t1\nt2\nt3\n")
    assert (status, records[0]["index"], said) == (0, 2, "")
    assert [request["texts"] for request in requests] == [["t3"], ["t1", "t2", "t3"]]
    assert len(connections) == 1


def test_the_nearest_of_several_files_say_which_they_come_from(embed: Embed, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(f"text of {file.name}")
    _, records, _ = embed("--similar-to", "text of b", *files)
    assert [(r["index"], r["path"]) for r in records] == [(1, str(files[1])), (0, str(files[0]))]
    assert records[0]["end"] == 9


def test_the_nearest_of_several_files_of_vectors_keep_the_paths_of_their_texts(
    embed: Embed, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("a")
    with_path, without, broken = (tmp_path / name for name in ("with", "without", "broken"))
    for file, arguments in ((with_path, [text]), (without, [])):
        _, (record,), _ = embed(*arguments, stdin=b"b")
        file.write_bytes(orjson.dumps(record))
    broken.write_text('{"embedding": "?"}')
    status, (failed, *found), _ = embed("--similar-to", "b", with_path, without, broken)
    assert (status, failed["path"], failed["index"]) == (1, str(broken), 2)
    assert [record["path"] for record in found] == [str(without), str(text)]


def test_a_text_looked_for_that_is_too_long_is_an_error(embed: Embed) -> None:
    error, records, _ = embed("--similar-to", "x" * 101, stdin=b"a")
    assert (error.code, records) == ("bad_data", [])
    error, records, _ = embed("--similar-to", "x" * 101, "--on-overflow", "error", stdin=b"a")
    assert (error.code, records) == ("context_overflow", [])


def test_vectors_of_another_length_are_error_records(embed: Embed) -> None:
    stored = b'{"embedding":[1,0,0,0]}\n{"embedding":[1,0]}\n'
    status, records, _ = embed("--similar-to", "x", stdin=stored)
    assert status == 1
    assert [("error" in record, "score" in record) for record in records] == [(True, False), (False, True)]


def test_blocks_do_not_change_the_nearest() -> None:
    import numpy as np

    vectors = np.random.default_rng(1).normal(size=(5000, 8)).astype(np.float32)
    nearest = Nearest(vectors[3] / np.linalg.norm(vectors[3]), 5)
    for number, vector in enumerate(vectors):
        nearest.offer(vector, b"%d" % number)
    cosines = vectors @ vectors[3] / np.linalg.norm(vectors, axis=1)
    assert [int(line) for _, line in nearest.best()] == np.argsort(-cosines)[:5].tolist()


def test_a_conversation_is_its_lines_and_one_that_is_none_is_an_error(embed: Embed) -> None:
    sound = orjson.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]})
    broken = orjson.dumps({"messages": [{"role": "user", "content": ["a"]}], "n": 2})
    status, (first, second), _ = embed("--input", "jsonl", stdin=sound + b"\n" + broken)
    assert (status, first["end"]) == (1, 3)
    assert (second["n"], second["error"]["code"]) == (2, "bad_data")
    assert "messages[0]" in second["error"]["message"]


def test_an_empty_text_has_a_vector_and_is_mentioned(embed: Embed) -> None:
    stdin = b'{"text": ""}\n{"text": "a"}\n{"text": ""}\n'
    status, records, said = embed("--input", "jsonl", stdin=stdin)
    assert (status, [record["end"] for record in records]) == (0, [0, 1, 0])
    assert "2 empty texts" in said
    assert "empty" not in embed(stdin=b"a")[2]


@pytest.fixture
def advances(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int | None]]:
    """What progress is told: texts, bytes, all bytes."""
    told: list[tuple[int, int, int | None]] = []
    monkeypatch.setattr(Progress, "texts", lambda self, n, n_bytes, total: told.append((n, n_bytes, total)))
    return told


def test_progress_goes_by_bytes_of_texts_and_by_windows_of_a_long_one(
    embed: Embed, tmp_path: Path, advances: list[tuple[int, int, int | None]]
) -> None:
    embed("--input", "lines", stdin=b"one\ntwo\n" * 99)
    assert advances[-1] == (198, 792, 792)
    assert sorted(n_bytes for _, n_bytes, _ in advances) == [n_bytes for _, n_bytes, _ in advances]
    advances.clear()
    for name in "ab":
        (tmp_path / name).write_text("é" * 200)
    embed(tmp_path / "a", tmp_path / "b")
    assert {n_bytes for _, n_bytes, _ in advances} >= {200, 400, 600, 800}
    assert advances[-1] == (2, 800, 800)


def test_progress_of_what_has_no_size_goes_by_texts(
    embed: Embed, tmp_path: Path, advances: list[tuple[int, int, int | None]]
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    (tmp_path / "file").write_text("text")
    writer = threading.Thread(target=pipe.write_text, args=("text",))
    writer.start()
    embed(tmp_path / "file", pipe)
    writer.join()
    assert advances[-1] == (2, 8, None)


def on_a_small_disk(folder: Path, n_bytes: int) -> list[str]:
    """A command that runs another with `folder` on a disk of `n_bytes`; where namespaces are not to be had,
    with that limit on every file it writes, which is a write error, too."""
    mount = 'mount -t tmpfs -o mode=0700,size="$1" tmpfs "$0" && shift && exec "$@"'
    small = ["unshare", "-Urm", "sh", "-c", mount, str(folder), str(n_bytes)]
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*small, "true"], check=True, capture_output=True)
        return small
    return with_small_files(folder, n_bytes)


def with_small_files(folder: Path, n_bytes: int) -> list[str]:
    limit = (
        "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); "
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", limit, str(n_bytes)]


@pytest.mark.parametrize("limited", [on_a_small_disk, with_small_files])
@pytest.mark.parametrize("n_bytes", [4096, 65_536, 262_144], ids=["empty", "begun", "half written"])
def test_vectors_come_out_where_the_disk_is_too_full_to_keep_them(
    run: RunCommand,
    fake_model: Callable[..., Path],
    limited: Callable[[Path, int], list[str]],
    n_bytes: int,
) -> None:
    (folder := cache_dir()).mkdir(mode=0o700, parents=True)
    lines = b"".join(b"line %d\n" % number for number in range(400))
    ended = run(
        *("embed", "-m", fake_model(dimensions=384), "--input", "lines", "--format", "base64"),
        stdin=lines,
        under=limited(folder, n_bytes),
    )
    assert ended.status == 0
    assert [record["index"] for record in ended.lines if "embedding" in record] == list(range(400))
    (note,) = ended.err.splitlines()
    assert re.search(
        r"embedding cache: .* (full|I/O error); (going on without it|nothing more is kept)", note
    )
