"""A conversation that goes on in a new process: what was computed before, against computing it again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.bench.commands import WORDS
from tests.bench.figures import Row, alone, at_least, at_most, compared
from tests.bench.setting import Setting

QUESTION = "And what else?"
MEGABYTE = 1e6


def resume(setting: Setting) -> Iterator[Row]:
    """`chat -s` with a history of about `history` tokens, cold, with the snapshots and without any."""
    home = Home(setting)
    home.begin("talk", setting.sizes.history)
    home.turn("talk")  # keeps what is computed
    runs = [(home.turn("talk", snapshots="0"), home.turn("talk")) for _ in range(setting.n_pairs)]
    n_prompt, n_cached = runs[-1][1].prompt_tokens, runs[-1][1].cached_tokens
    name = f"cold turn at {n_prompt:,} tokens, {n_cached:,} read back"
    yield compared(f"{name}: time to first token, without; with", "ms", _each(runs, "ttft_ms"), at_least(20))
    yield compared(f"{name}: whole command, without; with", "s", _each(runs, "seconds"), at_least(6))
    yield from _saving(setting, home)
    yield _shared(setting)


def _saving(setting: Setting, home: Home) -> Iterator[Row]:
    """From the last line to the command's end, where all of the prompt is to be kept and where nothing is."""
    gaps = []
    for number in range(setting.n_pairs):
        home.begin(f"new{number}", setting.sizes.history)
        gaps.append(home.turn(f"new{number}").after_last_line * 1000)
    bare = [home.turn("talk", snapshots="0").after_last_line * 1000 for _ in range(setting.n_pairs)]
    pairs = zip(gaps, bare, strict=True)
    yield alone("keeping all of it: what the user waits longer", "ms", [a - b for a, b in pairs], at_most(50))


def _shared(setting: Setting) -> Row:
    """Ten sessions that begin alike, against one, in bytes on disk."""
    sizes = []
    for n_sessions in (10, 1):
        home = Home(setting, f"shared{n_sessions}")
        history = home.history(setting.sizes.history * 3 // 4)
        for number in range(n_sessions):
            home.begin(f"s{number}", 0, history)
            home.turn(f"s{number}", f"{QUESTION} Of {WORDS[number]}, say.")
        sizes.append(home.size() / MEGABYTE)
    return compared("ten sessions with one beginning; one", "MB", [(sizes[0], sizes[1])], at_most(1.5))


class Turn:
    """What one command did."""

    def __init__(self, event: dict[str, Any], seconds: float, after_last_line: float) -> None:
        self.seconds, self.after_last_line = seconds, after_last_line
        self.ttft_ms: float = event["timings"]["ttft_ms"]
        self.prompt_tokens: int = event["usage"]["prompt_tokens"]
        self.cached_tokens: int = event["usage"]["cached_tokens"]


class Home:
    """A home with sessions in it."""

    def __init__(self, setting: Setting, name: str = "resume") -> None:
        self._setting = setting
        self._folder = setting.work / name
        self._folder.mkdir()
        self._random = random.Random(7)

    def history(self, n_tokens: int) -> str:
        """About so many tokens of prose."""
        return " ".join(self._random.choices(WORDS, k=n_tokens * 3 // 4))

    def begin(self, session: str, n_tokens: int, text: str = "") -> None:
        """A session with one turn in it."""
        messages = [
            {"role": "user", "content": text or self.history(n_tokens)},
            {"role": "assistant", "content": "Yes."},
        ]
        file = self._folder / "messages.jsonl"
        file.write_text("".join(json.dumps(message) + "\n" for message in messages))
        self._run("sessions", "import", file, "--name", session)

    def turn(self, session: str, question: str = QUESTION, snapshots: str = "4G") -> Turn:
        """One more, of which a single token is answered."""
        options = ("--max-tokens", 1, "--threads", self._setting.threads, "--temperature", 0)
        command = ("chat", "--no-daemon", "-n", "-m", self._setting.model, "-s", session, *options, question)
        began = time.monotonic()
        with self._started(*command, MYLLM_SNAPSHOTS_MAX_SIZE=snapshots) as process:
            if process.stdout is None:
                raise ValueError("stdout is a pipe")
            for line in process.stdout:
                last, at = line, time.monotonic()
            process.wait()
            ended = time.monotonic()
        return Turn(json.loads(last), ended - began, ended - at)

    def size(self) -> int:
        """Bytes of what was computed and kept."""
        return sum(file.stat().st_size for file in (self._folder / ".cache/myllm/kv").iterdir())

    def _run(self, *command: Any) -> None:
        with self._started(*command) as process:
            process.communicate()

    @contextmanager
    def _started(self, *command: Any, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
        environment = {**kept, "HOME": str(self._folder), **variables}
        words = [sys.executable, "-m", "myllm", *map(str, command)]
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        ) as process:
            yield process


def _each(runs: list[tuple[Turn, Turn]], figure: str) -> list[tuple[float, float]]:
    return [(getattr(without, figure), getattr(restored, figure)) for without, restored in runs]
