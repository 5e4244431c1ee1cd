"""Our engine, driven in this process: texts in, as `embed` sends them, and when the last vector came.

Must not know what is compared with what.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from myllm.cli.vector_records import GROUP
from myllm.engine import open_engine
from myllm.protocol import Message
from myllm.requests import Arrival, EmbedRequest, LoadOptions
from myllm.worker.frames import windows_of
from myllm.worker.templates import read_model_file

TIMEOUT = 600.0


class Embedder:
    """One loaded model. Its texts go in requests of as many as the command's, all in flight at once."""

    def __init__(self, model: Path, threads: int) -> None:
        self._about = read_model_file(model)
        self._n_requests = self._n_done = self._n_vectors = 0
        self._failed: Message | None = None
        self._finished = threading.Event()
        self._engine = open_engine(model, LoadOptions(threads=threads), self._take, lambda _: None)

    def rate(self, texts: list[str]) -> float:
        """Texts a second, from the first text's tokens to the last vector's event. Raises RuntimeError."""
        groups = [texts[i : i + GROUP] for i in range(0, len(texts), GROUP)]
        self._n_requests, self._n_done, self._n_vectors = len(groups), 0, 0
        self._finished.clear()
        started = time.monotonic()
        for number, group in enumerate(groups):
            request = EmbedRequest(texts=group)
            windows, _ = windows_of(request, self._engine, self._about)
            self._engine.embed(request, windows, Arrival(number, time.monotonic()))
        if not self._finished.wait(TIMEOUT):
            raise TimeoutError(f"the engine did not get there in {TIMEOUT:g} s: {self._engine.status()}")
        seconds = time.monotonic() - started
        if self._failed or self._n_vectors != len(texts):
            raise RuntimeError(f"{self._n_vectors} vectors of {len(texts)} texts; {self._failed}")
        return len(texts) / seconds

    def close(self) -> None:
        self._engine.close()

    def _take(self, events: list[Message]) -> None:
        """Called by the engine's thread."""
        for event in events:
            if "error" in event:
                self._failed = event
            self._n_vectors += "embedding" in event
            self._n_done += event.get("done", False)
        if self._n_done == self._n_requests:
            self._finished.set()
