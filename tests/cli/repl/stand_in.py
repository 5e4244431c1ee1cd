"""A stand-in for the Runtime's turns: answers by the prompt's first word, and keeps both messages.

Run as a program, it is the REPL on the streams it is given, with the sessions of the state folder; its
arguments are the session to go on with, if any.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from myllm.cli.console import Streams
from myllm.errors import NotFoundError, UnavailableError
from myllm.paths import state_dir
from myllm.protocol import encode
from myllm.settings import load
from myllm.storage.session_store import SessionStore
from myllm.storage.sessions import SQLiteSessions

PACE = 0.02
"""Seconds a token."""
WINDOW = 2048
CODE = "Run this:\n\n```python\nprint(1)\n```\n\nor this:\n\n```sh\nls -l\n```\n"


def script(prompt: str) -> list[dict[str, Any]]:
    """The token events of an answer."""
    match prompt.split()[:1]:
        case ["count"]:
            return [{"token": f"{number} "} for number in range(1, int(prompt.split()[1]) + 1)]
        case ["think"]:
            return [{"token": "hmm\n", "reasoning": True}, {"token": "\n\n42"}]
        case ["code"]:
            return [{"token": CODE}]
        case ["hang"]:
            return [{"token": "hanging"}]
        case ["escape"]:
            return [{"token": "\x1b]0;owned\x07\x9b31m"}]
        case ["wide"]:
            return [{"token": "word " * 30}]
    lines = prompt.count("\n") + 1
    return [{"token": f"{lines} lines: " if lines > 1 else "echo: "}, {"token": prompt[:60] + prompt[-20:]}]


class StandIn:
    """Has the methods of a client that a turn needs."""

    def __init__(self, store: SessionStore, pace: float = PACE) -> None:
        self._store = store
        self._pace = pace
        self._cancelled = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.closed = False

    def send(self, request: dict[str, Any]) -> None:
        assert request == {"op": "cancel"}
        self._cancelled.set()

    def close(self) -> None:
        self.closed = True

    def stream(self, request: dict[str, Any]) -> Iterator[bytes]:
        self.requests.append(request)
        self._cancelled.clear()
        prompt = request["prompt"]
        if prompt.endswith("die"):
            raise UnavailableError("runtime: the connection ended before the answer did; try again")
        session = request.get("session")
        if session is not None:
            self._store.append(session, "user", prompt)
        if prompt == "fail":
            yield encode({"done": True, "error": NotFoundError("nosuch: no such model").to_wire()}).rstrip()
            return
        yield encode({"loading": 0.5}).rstrip()
        said: dict[bool, str] = {False: "", True: ""}
        for event in script(prompt):
            if self._cancelled.is_set():
                break
            said[event.get("reasoning", False)] += event["token"]
            yield encode({"token": event.pop("token"), "done": False, **event}).rstrip()
            time.sleep(self._pace if prompt != "hang" else 60)
        done = self._done(said[False])
        if session is not None:
            self._store.append(session, "assistant", said[False], reasoning=said[True], answer=done)
        yield encode({"done": True, "full_text": said[False], "session_id": session, **done}).rstrip()

    def _done(self, text: str) -> dict[str, Any]:
        return {
            "model": "stand-in",
            "finish_reason": "cancelled" if self._cancelled.is_set() else "stop",
            "usage": {
                "prompt_tokens": 1000 + len(self.requests),
                "cached_tokens": 0,
                "completion_tokens": len(text.split()),
                "dropped_messages": 0,
                "window": WINDOW,
            },
            "timings": {"tokens_per_second": 50.0, "ttft_ms": 1.0},
        }


def main() -> int:
    """The REPL, as `myllm chat` opens it."""
    from myllm.cli.repl import converse

    store = SQLiteSessions(state_dir())
    session = store.find(sys.argv[1]) if sys.argv[1:] else None
    return converse(Streams(), lambda: StandIn(store), store, load(), session, {})


if __name__ == "__main__":
    sys.exit(main())
