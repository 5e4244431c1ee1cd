"""What comes from the cache and what a backend computes look the same to who asked."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path
from typing import Any

from myllm import events
from myllm.models.registry import Model
from myllm.protocol import Message
from myllm.requests import EmbedRequest
from myllm.runtime.cached_embeddings import Embeddings
from myllm.runtime.call import Call
from myllm.runtime.reply import Reply

VECTOR = b64encode(bytes(8)).decode()


class Heard:
    def __init__(self) -> None:
        self.events: list[Message] = []
        self.over = asyncio.Event()

    def event(self, event: Message) -> None:
        self.events.append(event)

    def line(self, line: bytes, start: int) -> None: ...

    def done(self, event: Message) -> None:
        self.events.append(event)
        self.over.set()


def test_every_vector_names_the_model_as_it_was_resolved(tmp_path: Path) -> None:
    (path := tmp_path / "model.gguf").write_bytes(b"GGUF")
    model = Model("minilm", path, "file")
    computed: list[list[str]] = []

    async def ask(embeddings: Embeddings, *texts: str) -> list[Any]:
        heard = Heard()
        call = Call(heard, lambda call: None)

        async def submit(missing: list[str], reply: Reply) -> None:
            computed.append(missing)
            for item, text in enumerate(missing):
                reply.event(events.vector(item, 0, (0, len(text), 1), VECTOR, cached=False))
            reply.done(events.embedded(2, len(missing)))

        await embeddings.answer(EmbedRequest(texts=list(texts)), call, model, submit)
        async with asyncio.timeout(20):
            await heard.over.wait()
        *items, done = heard.events
        assert [item["model"] for item in items] == ["minilm"] * len(texts)
        return [[item["item"], item["cached"]] for item in sorted(items, key=lambda e: e["item"])] + [
            done["usage"]
        ]

    async def run() -> None:
        embeddings = Embeddings()
        try:
            assert await ask(embeddings, "a", "b", "a") == [
                *([0, False], [1, False], [2, False]),
                {"prompt_tokens": 2, "cached_texts": 0},
            ]
            *items, usage = await ask(embeddings, "a", "c")
            assert items == [[0, True], [1, False]]
            assert usage == {"prompt_tokens": 1, "cached_texts": 1}
        finally:
            await embeddings.close()

    asyncio.run(run())
    assert computed == [["a", "b"], ["c"]]
