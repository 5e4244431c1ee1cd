"""What a load will take, before it is tried, and what a process takes now. Bytes; blocking.

Must not know workers or policies.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from myllm.engine import is_fake
from myllm.requests import LoadOptions

PROCESS_BYTES: Final = 96 * 1024 * 1024
"""A worker without weights and cache, about."""
USUAL_CONTEXT: Final = 4096
"""Tokens that are reckoned with where no window was asked for: the cache grows by need."""


def rough_estimate(path: Path, options: LoadOptions) -> int:
    """From the file's size alone, in no time: for a lone command, whose model is most likely to fit."""
    try:
        return path.stat().st_size + PROCESS_BYTES
    except OSError:  # the load will say what is the matter
        return PROCESS_BYTES


def careful_estimate(path: Path, options: LoadOptions) -> int:
    """From the header: weights, cache and buffers. Raises BadDataError, NotFoundError."""
    if is_fake(path):
        from myllm.engine.fake_script import Script

        return Script.read(path).memory_bytes
    from myllm.models.gguf import read_model

    header = read_model(path)
    context = options.context or min(header.context_length or USUAL_CONTEXT, USUAL_CONTEXT)
    return header.memory_estimate(context, options.kv_type or "f16")


def resident_bytes(pid: int | None) -> int:
    """What the process has in memory, pages that it shares with others too; 0 where there is none, or
    nobody can tell."""
    if pid is None:
        return 0
    if sys.platform == "darwin":
        import subprocess

        said = subprocess.run(["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=False)
        return int(said.stdout or 0) * 1024
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
