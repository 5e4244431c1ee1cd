"""The model store: hash-named files in the data folder, and the partial downloads beside them.

Owns where model files lie, their modes, that a file appears whole or not at all, and as which errors of
ours the system's come to light. Must not know names or formats, nor of a source more than that it is one.
Layout below the data folder:

    models/<sha256>.gguf                    one model
    models/<sha256>-00001-of-00003.gguf     one part of a split model; the hash is of all parts in order
    models/partial/<key>/                   a download under way; the key is a hash of its source
    models/partial/<key>.lock               held by the process that downloads
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from myllm.errors import (
    BadDataError,
    CannotCreateError,
    IOFailureError,
    MyllmError,
    NotFoundError,
    PermissionDeniedError,
)
from myllm.locks import locked, try_locked
from myllm.paths import make_private

CHUNK: Final = 1024 * 1024
"""Bytes read, hashed and written at a time."""
ABANDONED_AFTER: Final = 7 * 24 * 3600
"""Seconds after which a partial download that nobody resumed is deleted."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWN_FILE = re.compile(r"[0-9a-f]{64}(-\d{5}-of-\d{5})?\.gguf")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)


def checked_digest(digest: str) -> str:
    """`digest` where it is a SHA-256 in lower-case hex; every digest passes here before it names a file."""
    if not _DIGEST.fullmatch(digest):
        raise BadDataError(f"digest {digest!r:.80}: not a SHA-256 of 64 lower-case hex digits")
    return digest


@contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turns what the system says about writing into MyLLM's errors: 73 for no right to, 74 for the rest."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise IOFailureError(f"{what}: the disk is full; free some space and try again") from error
        if error.errno in _FORBIDDEN:
            raise CannotCreateError(
                f"{what}: cannot write ({error.strerror}); set XDG_DATA_HOME to a folder you may write"
            ) from error
        raise IOFailureError(f"{what}: {error.strerror or error}") from error


@contextmanager
def read_errors(what: str) -> Iterator[None]:
    """Turns what the system says about reading into MyLLM's errors: 66, 77, or 74 for the rest."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{what}: no such file; check the path") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{what}: cannot be read; check its permissions") from error
    except OSError as error:
        raise IOFailureError(f"{what}: {error.strerror or error}") from error


def create_private(path: Path) -> int:
    """A descriptor of a new, empty file with mode 0600 whatever the umask. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(paths: Sequence[Path], progress: Callable[[int, int | None], None]) -> str:
    """The SHA-256 over all bytes of `paths` in order; blocks for about a second a gigabyte or two."""
    import hashlib  # here and below: resolving a name passes through this module and is quick

    digest = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    done = 0
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
    return digest.hexdigest()


class Staging:
    """One download's private folder and what is known beforehand about what will be put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def free_bytes(self) -> int:
        """What the disk can still take."""
        import shutil

        return shutil.disk_usage(self.folder).free

    def part(self, number: int, count: int) -> Path:
        """Where part `number` of `count` is to be written; a whole model is part 1 of 1."""
        return self.folder / ("model.gguf" if count == 1 else f"model-{number:05d}-of-{count:05d}.gguf")

    def holds(self, file: Path) -> bool:
        """Whether `file` lies here, and so becomes the store's."""
        return file.is_relative_to(self.folder)

    def clear(self) -> None:
        """Removes everything in it, so that a download starts over."""
        import shutil

        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


class Store:
    """The folder of model files; making one touches nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._partial = root / "partial"

    def path(self, digest: str, part: int = 1, parts: int = 1) -> Path:
        """Where the file of `digest`, or one part of it, lies. Raises BadDataError for a bad digest."""
        suffix = f"-{part:05d}-of-{parts:05d}" if parts > 1 else ""
        return self.root / f"{checked_digest(digest)}{suffix}.gguf"

    def owns(self, path: Path) -> bool:
        """Whether `path` is a file of this store, by its name and folder."""
        return path.parent == self.root and _OWN_FILE.fullmatch(path.name) is not None

    @contextmanager
    def staging(self, source: str, on_wait: Callable[[], None], *, resumes: bool) -> Iterator[Staging]:
        """The folder for a download of `source`, by one process at a time; it is gone after the block.

        It is kept only where `resumes` and the block ended for a reason that says nothing against
        the bytes so far: the network failed, or the user stopped it. Raises CannotCreateError (73),
        IOFailureError (74).
        """
        import hashlib
        import shutil

        key = hashlib.sha256(source.encode()).hexdigest()
        folder = self._partial / key
        with ExitStack() as held:
            with write_errors(str(self.root)):
                make_private(self._partial)
                held.enter_context(locked(self._partial / f"{key}.lock", on_wait))
                self._sweep()
                staging = Staging(make_private(folder))
                if not resumes:
                    staging.clear()
            keep = False
            try:
                yield staging
            except BaseException as error:
                keep = resumes and _says_nothing_against_the_bytes(error)
                raise
            finally:
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)

    def install(self, files: Sequence[Path], digest: str) -> list[Path]:
        """Moves finished files from a staging folder to their hash-named places; the first part last."""
        targets = [self.path(digest, n, len(files)) for n in range(1, len(files) + 1)]
        with write_errors(str(self.root)):
            for file, target in reversed(list(zip(files, targets, strict=True))):
                descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    os.fchmod(descriptor, 0o600)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                file.replace(target)
            sync_folder(self.root)
        return targets

    def remove(self, files: Sequence[Path]) -> None:
        """Deletes files of this store. Raises PermissionDeniedError for any other, deleting nothing."""
        for file in files:
            if not self.owns(file):
                raise PermissionDeniedError(f"{file}: not a file of {self.root}; it was left alone")
        with write_errors(str(self.root)):
            for file in files:
                file.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Deletes what killed downloads left: folders long untouched whose lock is free."""
        import shutil

        for folder in self._partial.iterdir():
            if _DIGEST.fullmatch(folder.name) and _untouched_for(folder) > ABANDONED_AFTER:
                lock = folder.with_name(f"{folder.name}.lock")
                if (descriptor := try_locked(lock)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink(missing_ok=True)
                    os.close(descriptor)


def _untouched_for(folder: Path) -> float:
    """Seconds since anything was put in or taken out; 0 where it is gone meanwhile, or only a link."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return 0.0
    return time.time() - status.st_mtime if stat.S_ISDIR(status.st_mode) else 0.0


def _says_nothing_against_the_bytes(error: BaseException) -> bool:
    return not isinstance(error, MyllmError) or error.exit_status == 69
