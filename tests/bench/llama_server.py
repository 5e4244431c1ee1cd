"""llama-server's `/v1/embeddings`: how it is started, asked in several shapes, and measured.

Must not know what it is compared with.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tests.bench.peers import Peers

HOST: Final = "127.0.0.1"
START_TIMEOUT: Final = 60.0
ANSWER_TIMEOUT: Final = 600.0
LONGEST: Final = 256
"""Tokens that a text has at most, a slot's share of the server's context."""


class Flags(NamedTuple):
    """What the server is started with."""

    batch: int
    """Tokens that it computes at once, `-b` and `-ub`; no text may be longer."""
    parallel: int
    """Texts that it has in work at once."""
    flash: str = "auto"

    def __str__(self) -> str:
        return f"-ub {self.batch} -np {self.parallel} -fa {self.flash}"


class Shape(NamedTuple):
    """How it is asked: texts a request, requests at the same time, and the notation of vectors."""

    texts: int
    connections: int
    encoding: str = "base64"

    def __str__(self) -> str:
        return f"{self.texts} texts × {self.connections}, {self.encoding}"


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A server that runs."""

    port: int

    def rate(self, texts: list[str], shape: Shape) -> float:
        """Texts a second, from the first request to the last answer. Raises RuntimeError."""
        groups = (texts[i : i + shape.texts] for i in range(0, len(texts), shape.texts))
        bodies = [json.dumps({"input": group, "encoding_format": shape.encoding}) for group in groups]
        left = iter(bodies)  # shared: each connection takes the next one when it has an answer
        with ThreadPoolExecutor(shape.connections) as executor:
            started = time.monotonic()
            answers = [executor.submit(self._answers, left) for _ in range(shape.connections)]
            parts = [part.result() for part in answers]
            seconds = time.monotonic() - started
        n_vectors = sum(len(json.loads(answer)["data"]) for part in parts for answer in part)
        if n_vectors != len(texts):
            raise RuntimeError(f"llama-server: {n_vectors} vectors of {len(texts)} texts")
        return len(texts) / seconds

    def _answers(self, bodies: Iterator[str]) -> list[bytes]:
        """The answers to one connection, unread: the server is not to wait for our JSON."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_TIMEOUT)
        answers = []
        for body in bodies:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answers.append(response.read())
            if response.status != http.client.OK:
                raise RuntimeError(f"llama-server: {response.status}: {answers[-1][:500]!r}")
        connection.close()
        return answers


@contextmanager
def serving(peers: Peers, model: Path, threads: int, flags: Flags) -> Iterator[LlamaServer]:
    """A server for the length of a block. Raises PeersMissingError, RuntimeError where it does not start."""
    port = _free_port()
    command = [
        *(peers.llama("llama-server"), "-m", model, "-t", threads, "--host", HOST, "--port", port),
        *("--embedding", "-b", flags.batch, "-ub", flags.batch, "-np", flags.parallel),
        *("-fa", flags.flash, "-c", flags.parallel * LONGEST, "--log-disable"),
    ]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=peers.environment(),
    )
    try:
        _await(process, port)
        yield LlamaServer(port)
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port: int = taken.getsockname()[1]
        return port


def _await(process: subprocess.Popen[bytes], port: int) -> None:
    """Returns when the model is loaded."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end and process.poll() is None:
        connection = http.client.HTTPConnection(HOST, port, timeout=START_TIMEOUT)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        except ConnectionError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(f"llama-server: not ready, exit status {process.poll()}: {process.args!r}")
