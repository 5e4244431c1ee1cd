"""`embed`: texts a second against llama-server and sentence-transformers; cache, memory, `--similar-to`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np

from tests.bench import llama_server, transformers_peer
from tests.bench.figures import Row, alone, at_least, at_most, compared, interleaved
from tests.bench.llama_server import Flags, Shape
from tests.bench.our_embedder import Embedder
from tests.bench.processes import wall_seconds, watched
from tests.bench.sentences import sentences, short_lines
from tests.bench.setting import Setting, model_file

MODEL = "minilm"
DIMENSIONS = 384
UNIT = "texts/s"
MEGABYTE = 1e6
FLAGS = (Flags(256, 16), Flags(256, 16, "off"), Flags(512, 16), Flags(512, 64), Flags(2048, 64))
"""More tokens a batch only cost: each is compared with all of its batch."""
SHAPES = (Shape(1, 8), Shape(1, 16), Shape(16, 2), Shape(64, 1), Shape(64, 2), Shape(64, 4), Shape(256, 2))
BATCH_SIZES = (16, 32, 64)


def embed(setting: Setting) -> Iterator[Row]:
    """All of it, on the default embedding model."""
    model = model_file(MODEL)
    texts = sentences(setting.sizes.sentences)
    with closing(Embedder(model, setting.threads)) as ours:
        ours.rate(texts)  # makes its contexts
        yield _against_llama_server(setting, model, ours, texts)
        if setting.transformers:
            yield _against_transformers(setting, setting.transformers, ours, texts)
        else:
            print(
                "bench: no sentence-transformers: give --transformers; see tests/bench/README.md",
                file=sys.stderr,
            )
    yield _cached(setting, model, texts)
    yield _memory(setting, model)
    yield from _similar(setting, model)


# ── throughput, start-up and loading left out ───────────────────────────────────────────────────


def _against_llama_server(setting: Setting, model: Path, ours: Embedder, texts: list[str]) -> Row:
    flags, shape = _best_asked(setting, model, texts[: setting.sizes.calibration])
    with llama_server.serving(setting.peers, model, setting.threads, flags) as server:
        server.rate(texts, shape)
        pairs = interleaved(lambda: ours.rate(texts), lambda: server.rate(texts, shape), setting.n_pairs)
    name = f"embed {len(texts):,} sentences; llama-server {flags}, {shape}"
    return compared(name, UNIT, pairs, at_least(1.1))


def _best_asked(setting: Setting, model: Path, texts: list[str]) -> tuple[Flags, Shape]:
    """The flags and the shape in which llama-server is fastest, each tried once; base64 or numbers last."""
    rates: dict[tuple[Flags, Shape], float] = {}
    for flags in FLAGS:
        with llama_server.serving(setting.peers, model, setting.threads, flags) as server:
            server.rate(texts, SHAPES[0])  # warms up
            rates |= {(flags, shape): server.rate(texts, shape) for shape in SHAPES}
    flags, shape = max(rates, key=rates.__getitem__)
    with llama_server.serving(setting.peers, model, setting.threads, flags) as server:
        server.rate(texts, shape)
        shapes = [shape._replace(encoding=encoding) for encoding in ("base64", "float")]
        return flags, max(shapes, key=lambda shape: server.rate(texts, shape))


def _against_transformers(setting: Setting, environment: Path, ours: Embedder, texts: list[str]) -> Row:
    with transformers_peer.encoding(environment, setting.work, setting.threads) as peer:
        trial = texts[: setting.sizes.calibration]
        peer.rate(trial, BATCH_SIZES[0])  # warms up
        best = max(BATCH_SIZES, key=lambda size: peer.rate(trial, size))
        pairs = interleaved(lambda: ours.rate(texts), lambda: peer.rate(texts, best), setting.n_pairs)
    name = f"embed {len(texts):,} sentences; sentence-transformers, float32, batches of {best}"
    return compared(name, UNIT, pairs, at_least(1.5))


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def _cached(setting: Setting, model: Path, texts: list[str]) -> Row:
    """The same lines twice. From each run its start-up is taken off: from the second one what a single
    line takes that is cached, from the first what one takes that has to be embedded, loading included.
    """
    many, one = _lines(setting, "many.txt", texts), _lines(setting, "one.txt", texts[:1])
    runs = max(setting.n_pairs, setting.sizes.cold_runs)
    pairs = []
    for _ in range(setting.n_pairs):
        home = setting.work / "cache"
        environment = {**os.environ, "XDG_CACHE_HOME": str(home)}

        def seconds(stdin: Path, *options: str, environment: dict[str, str] = environment) -> float:
            return wall_seconds(_command(setting, model, "--input", "lines", *options), environment, stdin)

        cold_start = median(seconds(one, "--no-cache") for _ in range(runs))
        first = seconds(many) - cold_start
        again, start = zip(*interleaved(lambda: seconds(many), lambda: seconds(one), runs), strict=True)
        second = median(again) - median(start)
        shutil.rmtree(home)
        pairs.append((len(texts) / second, len(texts) / first))
    name = f"`myllm embed` of the same {len(texts):,} again, start-up taken off; the first time"
    return compared(name, UNIT, pairs, at_least(50))


def _memory(setting: Setting, model: Path) -> Row:
    few, many = (_peak(setting, model, count) for count in setting.sizes.lines)
    name = "`myllm embed`, {1:,} lines: PSS of all its processes; {0:,} lines".format(*setting.sizes.lines)
    return compared(name, "MB", [(many, few)], at_most(1.1))


def _peak(setting: Setting, model: Path, count: int) -> float:
    """Raises ValueError where records are missing."""
    stdin, stdout = _lines(setting, "lines.txt", short_lines(count)), setting.work / "records.jsonl"
    command = _command(setting, model, "--input", "lines", "--no-cache", "--format", "base64")
    seen = watched(command, stdin, stdout)
    with stdout.open("rb") as records:
        n_records = sum(1 for _ in records)
    stdout.unlink()
    if n_records != count:
        raise ValueError(f"embed: {n_records} records of {count} lines")
    return seen.peak_pss / MEGABYTE


def _similar(setting: Setting, model: Path) -> Iterator[Row]:
    """The whole command, its own start and the query's embedding included."""
    count = setting.sizes.vectors
    stdin = _lines(setting, "vectors.jsonl", random_records(count))
    command = _command(setting, model, "--similar-to", "a narrow bridge", "-k", "10", "--no-cache")
    stdout = setting.work / "nearest.jsonl"
    seen = []
    for _ in range(setting.n_pairs):
        seen.append(watched(command, stdin, stdout))
        if len(stdout.read_bytes().splitlines()) != min(count, 10):
            raise ValueError("embed: --similar-to did not write 10 records")
    stdin.unlink()
    name = f"`myllm embed --similar-to` over {count:,} stored vectors"
    yield alone(f"{name}: whole command", "s", [each.seconds for each in seen], at_most(15, " s"))
    peaks = [each.peak_pss / MEGABYTE for each in seen]
    yield alone(f"{name}: PSS of all its processes", "MB", peaks, at_most(250, " MB"))


def random_records(count: int) -> Iterator[str]:
    """Records as `embed --format base64` writes them, their vectors random and of norm 1."""
    source = np.random.default_rng(7)
    for index in range(count):
        vector = source.standard_normal(DIMENSIONS).astype("<f4")
        vector /= np.linalg.norm(vector)
        encoded = b64encode(vector.tobytes()).decode()
        yield json.dumps(
            {"index": index, "chunk": 0, "start": 0, "end": 30, "tokens": 9, "embedding": encoded}
            | {"cached": False, "model": MODEL, "dimensions": DIMENSIONS}
        )


def _lines(setting: Setting, name: str, lines: Iterable[str]) -> Path:
    path = setting.work / name
    with path.open("w") as opened:
        opened.writelines(f"{line}\n" for line in lines)
    return path


def _command(setting: Setting, model: Path, *options: str) -> list[str]:
    """`myllm embed` as installed beside this Python."""
    program = Path(sys.executable).with_name("myllm")
    return [str(program), "embed", "-m", str(model), "--threads", str(setting.threads), *options]
