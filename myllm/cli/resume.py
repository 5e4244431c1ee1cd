"""`--resume FILE`: which records an earlier output has answers to, and how to go on after a torn line.

Owns what "done" means: a done record without error whose `index` and `input_hash` are those of the
input line. Error records, and answers that a deadline cut, are done again; of several records with
one index the last counts. Must not know how records are made.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from dataclasses import dataclass, field
from typing import Final

from myllm.cli.console import CHUNK, Streams
from myllm.cli.input_records import LineSplitter, loads
from myllm.errors import BadDataError, IOFailureError, NotFoundError, PermissionDeniedError, UsageError
from myllm.protocol import MAX_MESSAGE

RECORD_START: Final = b'{"index":'
"""How every line of ours begins, by which the torn rest of one is known."""


@dataclass(slots=True)
class Done:
    """Input hashes by index, and what follows the last newline of the file: its place and beginning."""

    hashes: dict[int, str] = field(default_factory=dict)
    tail_offset: int = 0
    tail: bytes = b""
    changed: int = 0
    """Records met whose answer belongs to another input line."""
    skipped: int = 0
    """Records met that need no answer any more."""

    def has(self, index: int, input_hash: str) -> bool:
        """Whether the record, met now, needs no answer any more."""
        known = self.hashes.get(index)
        if known is not None and known != input_hash:
            self.changed += 1
        self.skipped += known == input_hash
        return known == input_hash


def hash_of(line: bytes) -> str:
    """The `input_hash` of a record: 16 hexadecimal digits of the SHA-256 of its line."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def read_done(file: str) -> Done:
    """What `file` has. Lines that are not ours, or torn, are passed over.

    Raises NotFoundError, PermissionDeniedError, IOFailureError.
    """
    done = Done()
    splitter = LineSplitter(MAX_MESSAGE)
    try:
        with open(file, "rb", buffering=0) as stream:
            for chunk in iter(lambda: stream.read(CHUNK), b""):
                for line in splitter.feed(chunk):
                    _take(done, line.data)
            size = stream.tell()
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{file}: no such file to resume; append to it with >> {file}, which also creates it"
        ) from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{file}: permission denied; make it readable to you") from error
    except OSError as error:
        raise IOFailureError(f"{file}: cannot be read: {error.strerror}") from error
    done.tail_offset = size - splitter.pending
    for line in splitter.finish():
        done.tail = line.data
        _take(done, line.data)
    return done


def repair_output(streams: Streams, file: str, done: Done) -> None:
    """Where stdout is `file` itself: takes the torn rest of a record away, so that what comes stands alone.

    A last line that only lacks its newline gets it. Raises UsageError where stdout would overwrite.
    """
    out = os.fstat(streams.stdout)
    known = os.stat(file)  # noqa: PTH116 — beside fstat
    if not os.path.samestat(out, known):
        return
    if not fcntl.fcntl(streams.stdout, fcntl.F_GETFL) & os.O_APPEND:
        raise UsageError(f"--resume {file}: stdout overwrites that very file; append to it with >> {file}")
    if not done.tail:
        return
    if done.tail.startswith(RECORD_START[: len(done.tail)]) and not _whole(done.tail):
        os.ftruncate(streams.stdout, done.tail_offset)
    else:
        streams.write(b"\n")


def _take(done: Done, line: bytes) -> None:
    if not line.startswith(RECORD_START):
        return
    try:
        record = loads(line)
    except BadDataError:
        return
    index, input_hash = record.get("index"), record.get("input_hash")
    if record.get("done") is not True or not isinstance(index, int) or not isinstance(input_hash, str):
        return
    if "error" in record or record.get("finish_reason") == "deadline":
        done.hashes.pop(index, None)
    else:
        done.hashes[index] = input_hash


def _whole(line: bytes) -> bool:
    try:
        loads(line)
    except BadDataError:
        return False
    return True
