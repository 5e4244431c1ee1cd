"""`myllm embed` on the real embedding model, as a user runs it, against another implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.model

REFERENCE = Path(__file__).parent / "data" / "minilm_vectors.npz"


def embed(model: Path, *options: object, stdin: bytes) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "myllm", "embed", "-m", str(model), *map(str, options)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_vectors_equal_those_of_sentence_transformers(minilm_path: Path) -> None:
    """200 texts: short, up to 512 tokens, Unicode, emoji, CJK, code, nearly empty."""
    with np.load(REFERENCE) as reference:
        texts, vectors = reference["texts"].tolist(), reference["vectors"].astype(np.float32)
    stdin = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)).encode()
    records = embed(minilm_path, "--input", "jsonl", "--window", 512, "--no-cache", stdin=stdin)
    assert [(r["n"], r["chunk"]) for r in records] == [(n, 0) for n in range(200)]
    ours = np.array([record["embedding"] for record in records], np.float32)
    cosines = (ours * vectors).sum(1) / np.linalg.norm(vectors, axis=1)
    far = {text: cosine for text, cosine in zip(texts, cosines, strict=True) if cosine < 0.9999}
    assert not far


def test_a_document_of_100_kb_is_covered_by_windows_of_at_most_256_tokens(minilm_path: Path) -> None:
    sentence = "The {} th boat went quietly under the old bridge, and nobody on it spoke.\n"
    document = "".join(sentence.format(n) for n in range(1300))
    records = embed(minilm_path, "--no-cache", stdin=document.encode())
    assert [r["start"] for r in records] == [0, *(r["end"] for r in records[:-1])]
    assert records[-1]["end"] == len(document.rstrip("\n")) or records[-1]["end"] == len(document)
    assert max(r["tokens"] for r in records) <= 256
    assert [r["chunk"] for r in records] == list(range(len(records)))
    (pooled,) = embed(minilm_path, "--no-cache", "--pool", "mean", stdin=document[:20_000].encode())
    assert (pooled["start"], len(pooled["embedding"])) == (0, 384)


def test_nearer_texts_come_first(minilm_path: Path) -> None:
    lines = b"stock markets fell\na kitten plays with wool\nthe train is late\n"
    records = embed(minilm_path, "--input", "lines", "--similar-to", "a young cat", "-k", 2, stdin=lines)
    assert records[0]["index"] == 1
    assert records[0]["score"] > records[1]["score"]
