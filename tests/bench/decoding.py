"""Decode throughput: one stream against llama-bench, 16 and 64 against llama-batched-bench."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial

from tests.bench.figures import Row, alone, at_least, at_most, compared, interleaved
from tests.bench.ours import BATCH, Engine
from tests.bench.peers import KV_MODES, BatchedRates, batched_rates, decode_rate_alone
from tests.bench.setting import Setting

DECODE_TARGETS = {16: at_least(0.90), 64: at_least(0.93)}
UNIT = "tokens/s"


def single(setting: Setting) -> Iterator[Row]:
    """First to last of `alone` tokens after a prompt of one; llama-bench times as many calls."""
    n_tokens = setting.sizes.alone

    def ours() -> float:
        with closing(Engine(setting.model, setting.threads)) as engine:  # an empty cache, as llama-bench has
            engine.run([engine.random_tokens(1)], 2)  # llama-bench warms up as well
            (done,) = engine.run([engine.random_tokens(1)], n_tokens + 1)
            return 1000 * n_tokens / float(done["timings"]["decode_ms"])

    peer = partial(decode_rate_alone, setting.peers, setting.model, setting.threads, n_tokens)
    pairs = interleaved(ours, peer, setting.n_pairs)
    yield compared(f"decode, 1 stream, {n_tokens} tokens; llama-bench", UNIT, pairs, at_least(0.95))


def sixteen(setting: Setting) -> Iterator[Row]:
    return batched(setting, 16)


def sixty_four(setting: Setting) -> Iterator[Row]:
    return batched(setting, 64)


def batched(setting: Setting, sequences: int) -> Iterator[Row]:
    """`sequences` requests at once, admitted as the engine sees fit, against the better of two KV modes.

    Decode only: ours is the steps without prompt tokens, from one's end to the next one's; theirs is
    `speed_tg`, which has neither sampling nor admission. The rows of the whole count prompts too.
    """
    prompt, generated = setting.sizes.batched_prompt, setting.sizes.batched_answers[sequences]
    whole_pairs: list[tuple[float, float]] = []
    decode_pairs: list[tuple[float, float]] = []
    shares: list[float] = []
    with closing(Engine(setting.model, setting.threads)) as engine:
        _run(engine, sequences, prompt, generated)  # finds its row limit, grows its cache
        peer = partial(
            batched_rates,
            *(setting.peers, setting.model, setting.threads),
            sequences=sequences,
            prompt=prompt,
            generated=generated,
        )
        kv_mode = _better_mode({mode: peer(kv_mode=mode) for mode in KV_MODES})
        for _ in range(setting.n_pairs):
            _run(engine, sequences, prompt, generated)
            theirs = peer(kv_mode=kv_mode)
            decode_pairs.append((engine.decode_rate(), theirs.decode))
            whole_pairs.append((engine.whole_rate(), theirs.whole))
            shares.append(engine.share_outside_decode())
        rows = engine.row_limit
    name = f"{sequences} requests of {prompt}+{generated} tokens; llama-batched-bench {kv_mode}"
    yield compared(f"decode, {name}; ours {rows} rows a step", UNIT, decode_pairs, DECODE_TARGETS[sequences])
    yield compared(f"prefill and decode, {name}", UNIT, whole_pairs)
    target = at_most(5, " %") if sequences == 64 else None
    yield alone(f"time outside llama_decode at {sequences}: Python, C samplers", "%", shares, target)


def _run(engine: Engine, sequences: int, prompt: int, generated: int) -> None:
    engine.run([engine.random_tokens(prompt) for _ in range(sequences)], generated, priority=BATCH)


def _better_mode(trials: dict[str, BatchedRates]) -> str:
    return max(trials, key=lambda mode: trials[mode].decode)
