"""What the benchmark of `embed` measures with, without any model."""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.bench.embedding import DIMENSIONS, random_records
from tests.bench.llama_server import LlamaServer, Shape
from tests.bench.sentences import sentences, short_lines


class Answering(BaseHTTPRequestHandler):
    """Answers as llama-server does, a vector a text but for texts that say `lost`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        answer = json.dumps({"data": [{"embedding": ""} for text in asked["input"] if text != "lost"]})
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server that notes what it is asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as running:
        running.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_server_is_asked_for_every_text_once_in_requests_of_the_shape(server: ThreadingHTTPServer) -> None:
    texts = sentences(10)
    assert LlamaServer(server.server_port).rate(texts, Shape(4, 2, "float")) > 0
    asked = server.asked  # type: ignore[attr-defined]
    assert sorted(text for request in asked for text in request["input"]) == sorted(texts)
    assert sorted(len(request["input"]) for request in asked) == [2, 4, 4]
    assert {request["encoding_format"] for request in asked} == {"float"}


def test_a_vector_that_is_missing_is_no_figure(server: ThreadingHTTPServer) -> None:
    with pytest.raises(RuntimeError, match="1 vectors of 2 texts"):
        LlamaServer(server.server_port).rate(["found", "lost"], Shape(1, 1))


def test_texts_are_the_same_each_time_and_no_two_alike() -> None:
    """Two alike would be computed once, by us and not by the peers."""
    assert sentences(1000) == sentences(1000)
    assert len(set(sentences(1000))) == 1000
    assert len(set(short_lines(100_000))) == 100_000


def test_stored_vectors_are_records_of_norm_1() -> None:
    (record,) = map(json.loads, random_records(1))
    vector = np.frombuffer(b64decode(record["embedding"]), "<f4")
    assert len(vector) == record["dimensions"] == DIMENSIONS
    assert np.linalg.norm(vector) == pytest.approx(1)
