"""Embedding models in llama.cpp: an encoder, a generation model, and what is refused."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from myllm.cli.documents import Input
from myllm.cli.documents import all_texts as documents
from myllm.engine import llama
from myllm.engine.engine import BatchingEngine
from myllm.engine.llama_embedder import N_TOKENS, LlamaEmbedder
from myllm.engine.llama_runner import LlamaRunner
from myllm.engine.text_vectors import normalised
from myllm.errors import BadDataError, MyllmError
from myllm.prompts.windows import cut
from myllm.requests import Arrival, EmbedRequest, GenRequest, LoadOptions
from myllm.worker.frames import windows_of
from myllm.worker.intake import DEEP_STACK
from myllm.worker.templates import read_model_file

pytestmark = pytest.mark.model
WORDS = "the river runs under an old bridge where music, light and 7 quiet boats meet; naïve 漢字 😀"
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def opened(path: Path) -> llama.Model:
    llama.start()
    return llama.Model(path, gpu_layers=0, progress=lambda part: None)


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Iterator[llama.Model]:
    model = opened(minilm_path)
    yield model
    model.close()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[llama.Model]:
    model = opened(smollm2_path)
    yield model
    model.close()


def vectors(model: llama.Model, windows: list[list[int]], *, longest: int = 64) -> Vectors:
    embedder = LlamaEmbedder(model, longest, 2)
    (made,) = computed(embedder, [windows])
    embedder.close()
    return np.stack([normalised(vector) for vector in made])


def computed(embedder: LlamaEmbedder, batches: list[list[list[int]]]) -> list[Vectors]:
    """The vectors of each batch, all begun at once."""
    embedder.start(dict(enumerate(batches)))
    results = dict(embedder.result() for _ in batches)
    vectors = [results[number] for number in range(len(batches))]
    assert not [error for error in vectors if isinstance(error, MyllmError)]
    return vectors  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_a_packed_batch_gives_what_each_window_gives_alone(name: str, request: pytest.FixtureRequest) -> None:
    model: llama.Model = request.getfixturevalue(name)
    texts = ["a cat", "the quick brown fox jumps over the lazy dog", "x", "to be or not to be " * 4]
    windows = [model.tokenizer.encode(text, special=False) for text in texts]
    packed = vectors(model, windows)
    alone = np.concatenate([vectors(model, [window]) for window in windows])
    assert (packed * alone).sum(1) == pytest.approx(np.ones(4), abs=1e-4)
    assert float(packed[0] @ packed[1]) < 0.999


def test_batches_side_by_side_give_what_each_gives_alone(minilm: llama.Model) -> None:
    batches = [[[1000 + i] * (3 + i) for i in range(k, k + 5)] for k in (0, 5, 10)]
    embedder = LlamaEmbedder(minilm, 64, 3)
    side_by_side = computed(embedder, batches)
    alone = [computed(embedder, [batch])[0] for batch in batches]
    embedder.close()
    assert embedder.n_ahead == 4
    for one, other in zip(side_by_side, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert not np.allclose(one[0], one[1], atol=1e-2)


def test_a_generation_models_logits_are_kept_for_one_batch_only(smollm2: llama.Model) -> None:
    embedder = LlamaEmbedder(smollm2, 64, 4)
    assert embedder.n_ahead == 1
    embedder.close()


def test_the_longest_window_of_an_encoder_is_embedded(minilm: llama.Model) -> None:
    assert minilm.n_ctx_train == 512
    assert vectors(minilm, [[1000] * 512], longest=512).shape == (1, 384)


@pytest.mark.parametrize("n_tokens", [N_TOKENS + 1, 600, 1000])
def test_a_window_of_any_length_is_embedded(smollm2: llama.Model, n_tokens: int) -> None:
    assert vectors(smollm2, [[1000] * n_tokens], longest=n_tokens).shape == (1, 576)


def test_a_model_that_ranks_is_refused(minilm: llama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "pooling", 4)
    with pytest.raises(BadDataError, match="ranks texts"):
        LlamaEmbedder(minilm, 64, 2)


def test_a_model_with_an_encoder_apart_is_refused(
    minilm: llama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "has_encoder", True)
    with pytest.raises(BadDataError, match="encoder apart"):
        LlamaRunner(minilm, LoadOptions(), {})


def test_an_encoder_refuses_to_write_and_names_embed(minilm_path: Path) -> None:
    emitted: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
    engine = BatchingEngine(LlamaRunner(opened(minilm_path), LoadOptions(), {}), emitted.put)
    engine.submit(GenRequest(prompt="hi"), [101, 102], Arrival(1, time.monotonic()))
    (done,) = emitted.get(timeout=10)
    assert done["error"]["code"] == "bad_data"
    assert "myllm embed" in done["error"]["message"]
    engine.close()


# ── windows with real tokenizers ────────────────────────────────────────────────────────────


def with_a_deep_stack(work: Callable[[], None]) -> None:
    """As the worker's intake does it: llama.cpp's tokenizer recurses on long runs."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    before = threading.stack_size(DEEP_STACK)
    thread = threading.Thread(target=run)
    thread.start()
    threading.stack_size(before)
    thread.join()
    if failures:
        raise failures[0]


def prose(n_chars: int) -> str:
    rng = random.Random(5)
    words = WORDS.split()
    parts: list[str] = []
    while n_chars > 0:
        end = rng.choice([". ", "!\n", "\n\n"])
        parts.append(" ".join(rng.choices(words, k=rng.randint(3, 30))) + end)
        n_chars -= len(parts[-1].encode())
    return "".join(parts)


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
@pytest.mark.parametrize("kind", ["prose", "one line", "one word", "one accent"])
def test_three_megabytes_are_tiled_by_windows_within_the_limit_in_seconds(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name).tokenizer
    text = {
        "prose": lambda: prose(3_000_000),
        "one line": lambda: prose(3_000_000).replace("\n", " ").replace(". ", " "),
        "one word": lambda: "abcdefghij" * 10_000,
        "one accent": lambda: "a" + "\u0301" * 100_000,
    }[kind]()

    def check() -> None:
        started = time.monotonic()
        windows = list(cut(text, 254, 0, lambda part: tokenizer.encode(part, special=False)))
        assert time.monotonic() - started < 30
        assert [w.start for w in windows] == [0, *(w.end for w in windows[:-1])]
        assert windows[-1].end == len(text)
        assert max(len(w.tokens) for w in windows) <= 254
        if kind == "prose":
            assert sum(text[w.end - 1] in "\n " for w in windows) > 0.99 * len(windows)

    with_a_deep_stack(check)


def mixed(n_bytes: int) -> str:
    """Prose in several scripts, lines of many kilobytes, runs without a space, characters of several."""
    rng = random.Random(7)
    scripts = [
        "река течёт под мостом",
        "川は古い橋の下を流れる。",
        "نهر تحت الجسر",
        "강이 흐른다",
        WORDS,
        "zwölf Boxkämpfer",
    ]
    kinds: list[Callable[[], str]] = [
        lambda: (
            " ".join(rng.choices(scripts, k=rng.randint(1, 12))) + rng.choice([". ", "!\r\n", "\n\n", "。"])
        ),
        lambda: " ".join(rng.choices(WORDS.split(), k=3_000)) + "\n",
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789+/", k=rng.randint(100, 9_000))),
        lambda: "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(100, 2_000))),
        lambda: (
            rng.choice(["e\u0301", "👨\u200d👩\u200d👧", "👍🏽", "\ufeff", "\u00a0", "\0", "\t"])
            * rng.randint(1, 300)
        ),
    ]
    parts: list[str] = []
    while n_bytes > 0:
        parts.append(rng.choices(kinds, [400, 2, 3, 3, 3])[0]())
        n_bytes -= len(parts[-1].encode())
    return "".join(parts)


def test_a_file_of_three_megabytes_is_covered_by_windows_within_the_limit_that_point_at_their_text(
    minilm: llama.Model, minilm_path: Path, tmp_path: Path
) -> None:
    """From the file's bytes to what the engine is given, and no further: nothing is embedded."""
    file = tmp_path / "text"
    file.write_bytes(mixed(3_000_000).encode())
    (read,) = documents([Input("text", {}, [file.read_bytes()])], "text", None, lambda: None)
    assert read.text == file.read_bytes().decode()
    text, tokenizer = read.text, minilm.tokenizer
    engine: Any = SimpleNamespace(tokenizer=tokenizer, embed_window=minilm.n_ctx_train)

    def check() -> None:
        request = EmbedRequest(texts=[text])
        (windows,), failures = windows_of(request, engine, read_model_file(minilm_path))
        assert not failures
        assert [w.start for w in windows] == [0, *(w.end for w in windows[:-1])]
        assert windows[-1].end == len(text)
        assert 200 < max(len(w.tokens) for w in windows) <= 256
        for window in windows[::7]:  # each would take as long again
            first, *between, last = window.tokens
            assert (first, last) == (tokenizer.bos, tokenizer.closing)
            assert between == tokenizer.encode(text[window.start : window.end], special=False)

    with_a_deep_stack(check)
