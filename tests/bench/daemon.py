"""The daemon: what a warm command costs, many streams through its socket, and a thousand idle clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.commands import N_TOKENS, PROMPT
from tests.bench.figures import Row, alone, at_least, at_most, compared, interleaved
from tests.bench.ours import BATCH, Engine
from tests.bench.peers import completion_command, llm_command
from tests.bench.processes import tree_pss, wall_seconds
from tests.bench.setting import Setting

MEGABYTE = 1e6
STREAMS = 64
WARM_PAIRS = 20
IDLE_LOOKS = 20
LISTENS = 30.0
"""Seconds until a daemon must listen."""


def warm(setting: Setting) -> Iterator[Row]:
    """`myllm gen` through a daemon: nothing but the way there and back, and 8 tokens of the real model."""
    script = setting.work / "echo.fake.json"
    script.write_text('{"tokens": ["Hello", " world"]}')
    with _running(setting) as environment:
        ours = partial(wall_seconds, _gen(script, "--max-tokens", 1, "x"), environment)
        peer = partial(wall_seconds, [sys.executable, "-c", "import click"], environment)
        ours()  # loads it
        pairs = interleaved(ours, peer, max(WARM_PAIRS, setting.n_pairs))
        yield compared(
            "warm `myllm gen --max-tokens 1`, fake engine; `import click`", "s", pairs, at_most(1.5)
        )

        real = _gen(setting.model, "--max-tokens", N_TOKENS, "--temperature", 0, PROMPT)
        ours = partial(wall_seconds, real, environment)
        ours()
        for name, command, target in (
            ("`llm -m SmolLM2`, which answers to the end", llm_command(setting.peers, PROMPT), 1 / 8),
            ("llama-completion", completion_command(setting.peers, setting.model, PROMPT, N_TOKENS), 1 / 2),
        ):
            peer = partial(wall_seconds, command, setting.peers.environment())
            peer()
            pairs = interleaved(ours, peer, setting.n_pairs)
            yield compared(f"warm `myllm gen --max-tokens {N_TOKENS}`; {name}", "s", pairs, at_most(target))


def streams(setting: Setting) -> Iterator[Row]:
    """As many streams at once from one process through the socket, against the engine in this process."""
    sizes = setting.sizes
    with _running(setting) as environment, closing(Engine(setting.model, setting.threads)) as engine:
        _alone(engine, sizes.batched_prompt, 2)
        load = partial(_through_socket, setting, environment, sizes.batched_prompt, sizes.streamed)
        load()
        pairs = interleaved(
            load, partial(_alone, engine, sizes.batched_prompt, sizes.streamed), setting.n_pairs
        )
    name = f"{STREAMS} streams of {sizes.streamed} tokens through the socket; the engine alone"
    yield compared(name, "tokens/s", pairs, at_least(0.95))


def idle(setting: Setting) -> Iterator[Row]:
    """What `status` and memory are with many clients that say nothing."""
    from myllm.client.dial import dial_daemon

    with _running(setting) as environment, _as(environment), closing(_dialled()) as client:
        pid = client.greeting["pid"]
        before = tree_pss(pid)
        others = [dial_daemon() for _ in range(setting.sizes.idle_clients)]
        seconds = []
        for _ in range(IDLE_LOOKS):
            started = time.monotonic()
            list(client.stream({"op": "status"}))
            seconds.append(1000 * (time.monotonic() - started))
        grown = (tree_pss(pid) - before) / MEGABYTE
        for other in others:
            if other:
                other.close()
    name = f"{setting.sizes.idle_clients:,} idle clients"
    yield alone(f"{name}: `status`, the slowest of {IDLE_LOOKS}", "ms", [max(seconds)], at_most(100, " ms"))
    yield alone(f"{name}: more memory of the daemon", "MB", [grown], at_most(50, " MB"))


# ── the daemon ──────────────────────────────────────────────────────────────────────────────


@contextmanager
def _running(setting: Setting) -> Iterator[dict[str, str]]:
    """A daemon of its own in the foreground; the environment in which commands find it."""
    run = setting.work / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(run), "MYLLM_DAEMON": "always"}
    command = [str(_program()), "serve", "--no-http"]
    daemon = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + LISTENS
        while not (run / "myllm" / "daemon.sock").exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the daemon does not listen")
            time.sleep(0.01)
        yield environment
    finally:
        daemon.terminate()
        daemon.wait()


@contextmanager
def _as(environment: dict[str, str]) -> Iterator[None]:
    """This process finds that daemon, too."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _dialled() -> Any:
    from myllm.client.dial import dial_daemon

    client = dial_daemon()
    if client is None:
        raise RuntimeError("the daemon does not answer")
    return client


def _gen(model: Path, *options: Any) -> list[str]:
    return [str(part) for part in (_program(), "gen", "-n", "-o", "jsonl", "-m", model, *options)]


def _program() -> Path:
    return Path(sys.executable).with_name("myllm")


# ── 64 streams ──────────────────────────────────────────────────────────────────────────────


def _alone(engine: Engine, prompt: int, n_tokens: int) -> float:
    """Tokens a second, prompts and answers, of the engine without anything around it."""
    engine.run([engine.random_tokens(prompt) for _ in range(STREAMS)], n_tokens, priority=BATCH)
    return engine.whole_rate()


def _through_socket(setting: Setting, environment: dict[str, str], prompt: int, n_tokens: int) -> float:
    """The same from a process that only asks and reads; it prints its figure."""
    command = [sys.executable, "-m", "tests.bench.load_generator"]
    options = [setting.model, setting.threads, STREAMS, prompt, n_tokens]
    done = subprocess.run(
        [str(part) for part in (*command, *options)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"load generator: exit {done.returncode}: {done.stderr[-500:]}")
    return float(json.loads(done.stdout)["rate"])
