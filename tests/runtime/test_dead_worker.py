"""A worker that is gone: what it had said before is heard, whatever is noticed first."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

from myllm.protocol import encode, hello
from myllm.runtime.call import Call
from myllm.runtime.worker import Worker
from myllm.spawning import WorkerProcess


def test_tokens_before_the_end_are_heard_though_writing_to_it_failed_first() -> None:
    lines: list[bytes] = []

    async def run() -> None:
        ours, theirs = socket.socketpair()
        words, theirs_words = os.pipe()
        os.close(theirs_words)
        os.set_blocking(words, False)
        ended = subprocess.Popen([sys.executable, "-c", ""])
        worker = await Worker.attach(WorkerProcess(ended.pid, ours, words))
        over = asyncio.Event()
        worker.submit({"op": "gen"}, Call(None, lines.append, lambda call: over.set()))
        theirs.sendall(encode(hello("test")) + b'{"id":1,"token":"a","done":false}\n')
        theirs.close()
        worker.submit({"op": "gen"}, Call(None, lambda line: None, lambda call: None))  # this write fails
        await over.wait()
        await worker.close()
        ended.returncode = 0  # the worker's burial has reaped it

    asyncio.run(run())
    assert lines[0] == b'{"token":"a","done":false}\n'
    assert b"worker_crashed" in lines[1]
