"""What one request does to others: a long prompt among running streams, and a prefix that many share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from statistics import median, quantiles
from typing import NamedTuple

from tests.bench.figures import Row, at_most, compared
from tests.bench.ours import Engine
from tests.bench.setting import Setting

STREAMS = 16
ENDLESS = 4000
"""Tokens no stream gets to before it is cancelled."""
TAIL = 20
"""Tokens after a shared prefix."""


class Meeting(NamedTuple):
    """Gaps between tokens of the running streams, in seconds, and the newcomer's TTFT in ms."""

    usual: float
    p95: float
    worst: float
    ttft: float


def pace(setting: Setting) -> Iterator[Row]:
    """16 running streams when a long prompt arrives, and the same prompt on the idle engine."""
    n_prompt = setting.sizes.long_prompt
    with closing(Engine(setting.model, setting.threads)) as engine:
        streams = [_story(engine, number, n) for number, n in enumerate(_depths(setting))]
        _meet(engine, streams, setting)  # warms up: cache grown, paces known
        meetings, idle = [], []
        for _ in range(setting.n_pairs):
            meetings.append(_meet(engine, streams, setting))
            (done,) = engine.run([engine.random_tokens(n_prompt)], 1)
            idle.append(float(done["timings"]["ttft_ms"]))
    among = f"a {n_prompt:,}-token prompt among {STREAMS} streams"
    p95 = [(1000 * m.p95, 1000 * m.usual) for m in meetings]
    worst = [(1000 * m.worst, 1000 * m.usual) for m in meetings]
    ttft = [(m.ttft, alone_ms) for m, alone_ms in zip(meetings, idle, strict=True)]
    yield compared(f"{among}: p95 gap; usual gap", "ms", p95, at_most(5, " ×"))
    yield compared(f"{among}: worst gap; usual gap", "ms", worst, at_most(8, " ×"))
    yield compared(f"{among}: its TTFT; on the idle engine", "ms", ttft, at_most(2.5, " ×"))


def _meet(engine: Engine, streams: list[list[int]], setting: Setting) -> Meeting:
    engine.clear()
    running = [engine.submit(prompt, ENDLESS) for prompt in streams]
    engine.wait_until(lambda: all(engine.arrivals[i] for i in running))
    all_run = time.monotonic()
    steps = setting.sizes.usual_steps
    engine.wait_until(lambda: all(_later(engine.arrivals[i], all_run) > steps for i in running))
    arrived = time.monotonic()
    newcomer = engine.submit(engine.random_tokens(setting.sizes.long_prompt), 1)
    engine.wait_for([newcomer])
    first_token = engine.arrivals[newcomer][0] if engine.arrivals[newcomer] else time.monotonic()
    engine.cancel(running)
    engine.wait_for(running)
    usual = median(_gaps(engine, running, all_run, arrived))
    beside = _gaps(engine, running, arrived, first_token)
    ttft = float(engine.done[newcomer]["timings"]["ttft_ms"])
    return Meeting(usual, quantiles(beside, n=20, method="inclusive")[-1], max(beside), ttft)


def _gaps(engine: Engine, request_ids: list[int], start: float, end: float) -> list[float]:
    """Gaps between the tokens of each request that ended from `start` to `end`."""
    return [
        after - before
        for request_id in request_ids
        for before, after in pairwise(engine.arrivals[request_id])
        if start < after <= end
    ]


def _later(moments: list[float], start: float) -> int:
    return sum(moment > start for moment in moments)


def _depths(setting: Setting) -> list[int]:
    shortest, longest = setting.sizes.depths
    return [shortest + (longest - shortest) * i // (STREAMS - 1) for i in range(STREAMS)]


def _story(engine: Engine, number: int, n_tokens: int) -> list[int]:
    """English, which a model continues in whole characters, so that each token is an event."""
    lines = (f"{number + i}. Then somebody else told story {number}." for i in range(n_tokens // 8 + 1))
    return engine.encode(" ".join(lines))[:n_tokens]


def prefix(setting: Setting) -> Iterator[Row]:
    """16 prompts at once: with one beginning, and with none in common."""
    length = setting.sizes.prefix
    with closing(Engine(setting.model, setting.threads)) as engine:
        engine.run([engine.random_tokens(length)], 1)
        pairs = []
        for _ in range(setting.n_pairs):
            beginning = engine.random_tokens(length)
            shared = _median_ttft(engine, [beginning + engine.random_tokens(TAIL) for _ in range(STREAMS)])
            apart = _median_ttft(engine, [engine.random_tokens(length + TAIL) for _ in range(STREAMS)])
            pairs.append((shared, apart))
    name = f"{STREAMS} prompts at once, {length:,} tokens of each in common: TTFT p50; nothing in common"
    yield compared(name, "ms", pairs, at_most(0.2))  # 5 times better


def _median_ttft(engine: Engine, prompts: list[list[int]]) -> float:
    """In ms. Ends all as soon as the median is known, which saves half the time."""
    engine.clear()
    submitted = time.monotonic()
    request_ids = [engine.submit(prompt, 8) for prompt in prompts]
    needed = len(prompts) // 2 + 1
    engine.wait_until(lambda: sum(bool(engine.arrivals[i]) for i in request_ids) >= needed)
    firsts = [engine.arrivals[i][0] if engine.arrivals[i] else math.inf for i in request_ids]
    engine.cancel(request_ids)
    engine.wait_for(request_ids)
    return 1000 * (median(firsts) - submitted)
