"""A worker that is gone: what it had said before is heard, whatever is noticed first."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

from myllm.protocol import Message, encode, hello
from myllm.runtime.reply import Unheard
from myllm.runtime.worker import Worker
from myllm.spawning import WorkerProcess


def test_tokens_before_the_end_are_heard_though_writing_to_it_failed_first() -> None:
    lines: list[Message] = []

    class Heard(Unheard):
        def line(self, line: bytes, start: int) -> None:
            lines.append({"line": line[start:]})

        def done(self, event: Message) -> None:
            lines.append(event)
            over.set()

    over = asyncio.Event()

    async def run() -> None:
        ours, theirs = socket.socketpair()
        words, theirs_words = os.pipe()
        os.close(theirs_words)
        os.set_blocking(words, False)
        ended = subprocess.Popen([sys.executable, "-c", ""])
        worker = await Worker.attach(WorkerProcess(ended.pid, ours, words))
        worker.submit({"op": "gen"}, 0, Heard())
        theirs.sendall(encode(hello("test")) + b'{"id":1,"token":"a","done":false}\n')
        theirs.close()
        worker.submit({"op": "gen"}, 0, Unheard())  # this write fails
        await over.wait()
        await worker.close()
        ended.returncode = 0  # the worker's burial has reaped it

    asyncio.run(run())
    assert lines[0] == {"line": b'"token":"a","done":false}'}
    assert lines[1]["error"]["code"] == "worker_crashed"
