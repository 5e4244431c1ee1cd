"""Commands from a cold start: one answer against llama-completion and `llm`, a batch, a list."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.figures import Row, alone, at_most, compared, interleaved
from tests.bench.peers import completion_command, llm_command
from tests.bench.processes import wall_seconds, watched
from tests.bench.setting import Setting
from tests.models.gguf_maker import make_gguf

PROMPT = "Say hi"
N_TOKENS = 8
MEGABYTE = 1e6
WORDS = ("alpha", "river", "seven", "quickly", "under", "garden", "because", "music", "table", "nobody")


def cold(setting: Setting) -> Iterator[Row]:
    """`myllm gen --max-tokens 8`, chat template and all, against each peer's own natural call."""
    ours = partial(wall_seconds, _gen(setting, "-n", "--max-tokens", N_TOKENS, "--temperature", 0, PROMPT))
    completion = partial(
        wall_seconds,
        completion_command(setting.peers, setting.model, PROMPT, N_TOKENS),
        setting.peers.environment(),
    )
    llm = partial(wall_seconds, llm_command(setting.peers, PROMPT), setting.peers.environment())
    for measure in (ours, completion, llm):
        measure()  # files into the page cache
    runs = max(setting.n_pairs, setting.sizes.cold_runs)
    name = f"cold `myllm gen --max-tokens {N_TOKENS}`"
    pairs = interleaved(ours, completion, runs)
    yield compared(f"{name}; llama-completion -n {N_TOKENS}", "s", pairs, at_most(1.6))
    pairs = interleaved(ours, llm, runs)
    yield compared(f"{name}; `llm -m SmolLM2`, which answers to the end", "s", pairs, at_most(0.5))
    peaks = [_peak(setting, "--max-tokens", N_TOKENS, "--temperature", 0) for _ in range(runs)]
    yield alone(f"{name}: PSS of all its processes", "MB", peaks, at_most(400, " MB"))


def _peak(setting: Setting, *options: Any) -> float:
    stdin = setting.work / "prompt.txt"
    stdin.write_text(PROMPT)
    seen = watched(_gen(setting, *options), stdin, setting.work / "answer.jsonl")
    return seen.peak_pss / MEGABYTE


def batch(setting: Setting) -> Iterator[Row]:
    """`--batch` over prompts of mixed lengths; every record is checked, once a run."""
    stdin, stdout = setting.work / "prompts.jsonl", setting.work / "answers.jsonl"
    prompts = _mixed_prompts(setting)
    stdin.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    seen = watched(_gen(setting, "--batch", "--max-tokens", 32, "--temperature", 0), stdin, stdout)
    records = [json.loads(line) for line in stdout.read_bytes().splitlines()]
    n_tokens = _checked_tokens(prompts, records)
    name = f"`myllm gen --batch`, {len(prompts)} prompts, {n_tokens:,} tokens in and out, all records right"
    yield alone(f"{name}: PSS of all its processes", "MB", [seen.peak_pss / MEGABYTE], at_most(600, " MB"))
    yield alone(f"{name}: whole command", "s", [seen.seconds])
    yield alone(f"{name}: whole command", "tokens/s", [n_tokens / seen.seconds])


def listed(setting: Setting) -> Iterator[Row]:
    """`myllm models list` of many models in a folder of the user's, all of which it has seen before."""
    top, count = setting.work / "models", setting.sizes.models
    for n in range(count):
        folder = top / f"publisher-{n % 100}" / f"repo-{n}"
        folder.mkdir(parents=True)
        make_gguf(folder / f"model-{n}.gguf")
    environment = {**os.environ, "HOME": str(setting.work), "MYLLM_MODELS_PATHS": str(top)}
    environment |= {"XDG_CACHE_HOME": str(setting.work / "cache")}
    ours = partial(wall_seconds, [str(_program()), "models", "list"], environment)
    ours()  # reads them all, once
    runs = [ours() for _ in range(setting.n_pairs)]
    yield alone(f"`myllm models list`, {count:,} models listed before", "s", runs, at_most(1, " s"))


def _mixed_prompts(setting: Setting) -> list[dict[str, Any]]:
    """Mostly short prompts and a few long ones among them, each with a key of its own."""
    sizes, source = setting.sizes, random.Random(2)
    long_ones = set(source.sample(range(sizes.records), sizes.long_records))
    return [
        {
            "key": f"k{i}",
            "prompt": _text(source, sizes.long_record if i in long_ones else source.randint(5, 60)),
        }
        for i in range(sizes.records)
    ]


def _text(source: random.Random, n_words: int) -> str:
    return " ".join(source.choices(WORDS, k=n_words)) + "?"


def _checked_tokens(prompts: list[dict[str, Any]], records: list[dict[str, Any]]) -> int:
    """Prompt and generated tokens of all records. Raises ValueError where one is not as it should be."""
    if [r["index"] for r in records] != list(range(len(prompts))):
        raise ValueError("batch: records are missing, twice there, or not in order")
    if [r.get("key") for r in records] != [p["key"] for p in prompts]:
        raise ValueError("batch: keys are not those of the input")
    if wrong := [r for r in records if not r["done"] or "error" in r]:
        raise ValueError(f"batch: {len(wrong)} records failed: {wrong[0]}")
    return sum(r["usage"]["prompt_tokens"] + r["usage"]["completion_tokens"] for r in records)


def _gen(setting: Setting, *options: Any) -> list[str]:
    """`myllm gen` as installed beside this Python."""
    loading = ("-m", setting.model, "--threads", setting.threads)
    return [str(part) for part in (_program(), "gen", *loading, *options)]


def _program() -> Path:
    return Path(sys.executable).with_name("myllm")
