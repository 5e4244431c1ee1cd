"""What a step may be on the device that takes it: memory, rows and tokens.

Figures of the hardware alone, measured. Must not know models, requests or llama.cpp.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from myllm import hardware

TILE_ROWS: Final = 64
"""From this many query rows on, llama.cpp's CPU flash attention goes through a shared pool in 64×64 tiles
and no longer skips masked cells one by one (ggml-cpu/ops.cpp); measured: 95 against 150 tokens/s."""


class Device(NamedTuple):
    """`memory_bytes` were free when this was made."""

    memory_bytes: int
    max_rows: int
    """Sequences that decode together at most."""
    start_rows: int
    """As many to begin with, until it is measured how many pay off (pace.py)."""
    step_tokens: int
    """Tokens of a step at most."""
    mixed_tokens: int
    """Tokens of a step at most in which sequences decode, these included."""
    embed_tokens: int
    """Tokens embedded between two steps of running sequences, so that these keep about their pace."""


def cpu() -> Device:
    """More tokens than 512 in a step do not prefill faster on a CPU, and delay cancellations."""
    return Device(
        hardware.available_memory(),
        max_rows=TILE_ROWS - 1,
        start_rows=16,
        step_tokens=512,
        mixed_tokens=TILE_ROWS - 1,
        embed_tokens=128,
    )
