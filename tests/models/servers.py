"""Loopback fakes of the places models come from: a package index, a web origin and a hub.

Each is a real HTTP server on 127.0.0.1, so that pip, urllib and huggingface-hub run as they are.
Faults are attributes that a test sets before it pulls.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Answer:
    """One HTTP answer; `cut_after` bytes of the body the connection is dropped."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    seconds_per_chunk: float = 0.0
    chunk: int = 65536
    announce_length: bool = True


class Server:
    """A server on a free port of 127.0.0.1 that answers with `self.answer`; it keeps what was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.requests.append((self.command, self.path, headers))
                self._send(server.answer(unquote(self.path), headers))

            do_HEAD = do_GET  # noqa: N815 - http.server calls it so

            def _send(self, answer: Answer) -> None:
                self.close_connection = True
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.announce_length and "Content-Length" not in answer.headers:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command == "HEAD":
                    return
                body = answer.body[: answer.cut_after]
                try:
                    for at in range(0, len(body), answer.chunk):
                        self.wfile.write(body[at : at + answer.chunk])
                        if answer.seconds_per_chunk:
                            self.wfile.flush()
                            time.sleep(answer.seconds_per_chunk)
                except OSError:
                    return  # the client went away, as some tests make it do

            def log_message(self, *args: Any) -> None:
                """Says nothing on stderr."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *args: Any) -> None:
                """A client that vanished is part of the tests."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        raise NotImplementedError

    def count(self, method: str, pattern: str) -> int:
        """How many requests with `method` had a path that matches `pattern`."""
        return sum(m == method and re.search(pattern, path) is not None for m, path, _ in self.requests)

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


class PackageIndex(Server):
    """A package index (PEP 503) of the wheels put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.wheels: dict[str, bytes] = {}
        self.seconds_per_chunk = 0.0

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        if match := re.fullmatch(r"/simple/([^/]+)/", path):
            names = [name for name in self.wheels if name.split("-")[0].replace("_", "-") == match[1]]
            links = "".join(f'<a href="/files/{name}">{name}</a>' for name in names)
            body = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
            return Answer(body, 200 if names else 404, {"Content-Type": "text/html"})
        wheel = self.wheels.get(path.removeprefix("/files/"))
        if wheel is None:
            return Answer(status=404)
        return Answer(wheel, seconds_per_chunk=self.seconds_per_chunk)

    def environment(self) -> dict[str, str]:
        """What points pip here and nowhere else."""
        return {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": f"{self.url}/simple",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "1",
        }


class Origin(Server):
    """A web server with one file; it knows ranges and validators unless told to be worse."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.body = body
        self.etag = '"one"'
        self.cut_after: int | None = None
        self.ignore_ranges = False
        self.content_range: str | None = None
        self.status = 200
        self.redirect: str | None = None
        self.announce_length = True
        self.seconds_per_chunk = 0.0

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        if self.redirect is not None and path == "/redirect.gguf":
            return Answer(status=302, headers={"Location": self.redirect})
        if self.status != 200:
            return Answer(b"no", self.status)
        start, status, extra = 0, 200, {"ETag": self.etag}
        wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        if wanted and not self.ignore_ranges and headers.get("if-range") == self.etag:
            start, status = int(wanted[1]), 206
            size = len(self.body)
            extra["Content-Range"] = self.content_range or f"bytes {start}-{size - 1}/{size}"
        return Answer(
            self.body[start:],
            status,
            extra,
            cut_after=self.cut_after,
            announce_length=self.announce_length,
            seconds_per_chunk=self.seconds_per_chunk,
        )


class Hub(Server):
    """The two routes of a Hugging Face hub that a pull uses: a model's description, and its files."""

    revision = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.claimed_sha256: dict[str, str] = {}
        self.extra_names: list[str] = []
        self.error: tuple[int, str] | None = None
        self.token: str | None = None

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return Answer(b"{}", 401, {"X-Error-Code": "RepoNotFound"})
        if self.error is not None:
            return Answer(b"{}", self.error[0], {"X-Error-Code": self.error[1]})
        if path.startswith("/api/models/owner/repo"):
            siblings = [self._sibling(name, content) for name, content in self.files.items()]
            siblings += [{"rfilename": name, "size": 1} for name in self.extra_names]
            about = {"id": "owner/repo", "sha": self.revision, "siblings": siblings}
            return Answer(json.dumps(about).encode(), headers={"Content-Type": "application/json"})
        content = self.files.get(path.partition(f"/resolve/{self.revision}/")[2])
        if content is None:
            return Answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        sha256 = hashlib.sha256(content).hexdigest()
        return Answer(
            content,
            headers={"ETag": f'"{sha256}"', "X-Repo-Commit": self.revision, "X-Linked-Etag": f'"{sha256}"'},
        )

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        sha256 = self.claimed_sha256.get(name, hashlib.sha256(content).hexdigest())
        return {
            "rfilename": name,
            "size": len(content),
            "blobId": "0" * 40,
            "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130},
        }


def wheel_file(
    folder: Path, members: Mapping[str, bytes], name: str = "weights", version: str = "1.0"
) -> Path:
    """A valid wheel at `folder` with `members` besides its own metadata."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
