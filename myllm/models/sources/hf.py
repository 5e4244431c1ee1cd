"""`hf:OWNER/REPO[:QUANT|/FILE]`: a model of a Hugging Face hub, kept in that hub's own cache; an embedding
model's checkpoint is converted into the store.

Owns choosing files in a repository and mapping the library's errors. Endpoint, token, cache and
proxies are huggingface-hub's business (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, …). File names that a
hub sends are checked here again before they are used: the library has missed that before.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from myllm.errors import (
    BadDataError,
    IOFailureError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from myllm.models.names import name_from
from myllm.models.sources import Fetched, Progress
from myllm.models.sources.parts import check_complete, models_among
from myllm.models.store import CHUNK, Staging, read_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFERRED: Final = ("Q4_K_M", "Q8_0")
"""What is taken, in this order, where a repository has several and the user named none."""
MAX_SHOWN: Final = 12
"""File names in one message."""

_REPO = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PLACE = re.compile(
    rf"(?P<repo>{_REPO}/{_REPO})(:(?P<quant>[A-Za-z0-9._-]+)|/(?P<file>.+))?", re.IGNORECASE | re.DOTALL
)
_NOT_A_MODEL = re.compile(r"(^|/)(mmproj|imatrix)[^/]*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; size in bytes and SHA-256 where the hub says them."""

    name: str
    size: int | None
    sha256: str | None


class HuggingFaceSource:
    """Resuming is the cache's business, so the staging folder stays empty."""

    needs_network = True
    resumes = False

    def check(self, place: str) -> str:
        match = _PLACE.fullmatch(place)
        if match is None or ".." in match["repo"]:
            raise UsageError(
                f"hf:{place!r:.120}: expected hf:OWNER/REPO, OWNER/REPO:QUANT or OWNER/REPO/FILE"
            )
        if match["file"] is not None and not is_safe(match["file"]):
            raise UsageError(f"hf:{place!r:.120}: not the name of a .gguf file in a repository")
        return place

    def state(self, place: str) -> None:
        return None

    def fetch(self, place: str, staging: Staging, progress: Progress) -> Fetched:
        match = _PLACE.fullmatch(place)
        if match is None:
            raise UsageError(f"hf:{place!r:.120}: expected hf:OWNER/REPO")
        from huggingface_hub import HfApi

        progress(0, None)
        api = HfApi(library_name="myllm")
        with _hub_errors(place):
            info = api.model_info(match["repo"], files_metadata=True)
        files = [
            RemoteFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        ]
        if match["quant"] is None and match["file"] is None and (found := checkpoint_among(files)):
            paths = _download(api, match["repo"], info.sha, found, progress)
            _digest(paths, found, progress)
            from myllm.models.sources.checkpoint import convert_folder

            file, *digests = convert_folder(paths[0].parent, staging, progress)
            return Fetched(name_from(match["repo"].rpartition("/")[2]), (file,), *digests)
        chosen = choose(files, match["quant"], match["file"], f"hf:{match['repo']}")
        paths = _download(api, match["repo"], info.sha, chosen, progress)
        return Fetched(name_from(chosen[0].name), tuple(paths), _digest(paths, chosen, progress))


def is_safe(name: str) -> bool:
    """Whether `name` is a plain relative path of a .gguf file: nothing that could leave a folder."""
    pieces = name.split("/")
    return (
        name.lower().endswith(".gguf")
        and len(name) <= 500
        and name.isprintable()
        and "\\" not in name
        and ":" not in name
        and not any(piece in ("", ".", "..") for piece in pieces)
    )


def checkpoint_among(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files of the embedding model's checkpoint that a repository is; [] for none, or beside GGUFs.

    They are asked for by our names for them, and the first lies at the repository's root.
    """
    from myllm.models.bert_checkpoint import FILES, missing_file

    by_name = {file.name: file for file in files}
    if missing_file(by_name) or any(name.lower().endswith(".gguf") for name in by_name):
        return []
    return [by_name[name] for name in FILES if name in by_name]


def choose(files: Sequence[RemoteFile], quant: str | None, file: str | None, repo: str) -> list[RemoteFile]:
    """The files of one model, parts in order. Raises NotFoundError, BadDataError (a part is missing)."""
    by_name = {each.name: each for each in files if is_safe(each.name) and not _NOT_A_MODEL.search(each.name)}
    models = models_among(by_name)
    if not models:
        raise NotFoundError(f"{repo}: it has no .gguf file; look for a repository whose name ends in -GGUF")
    if file is not None:
        stems = [stem for stem, parts in models.items() if file in parts]
    elif quant is not None:
        stems = _with_quant(models, quant)
    else:
        stems = list(models)
        for preferred in PREFERRED if len(stems) > 1 else ():
            stems = _with_quant(models, preferred) or stems
            if len(stems) == 1:
                break
    if len(stems) != 1:
        shown = ", ".join(sorted(stems or models)[:MAX_SHOWN])
        problem = "several models fit" if stems else "no such file"
        raise NotFoundError(f"{repo}: {problem}: {shown}; choose one: {repo}/FILE.gguf")
    check_complete(models[stems[0]], repo)
    return [by_name[name] for name in models[stems[0]]]


def _with_quant(models: Mapping[str, object], quant: str) -> list[str]:
    ends = re.compile(rf"(^|[-./]){re.escape(quant)}$", re.IGNORECASE)
    return [stem for stem in models if ends.search(stem)]


def _download(
    api: HfApi, repo: str, revision: str | None, files: Sequence[RemoteFile], progress: Progress
) -> list[Path]:
    sizes = [file.size for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    before = 0
    paths = []
    for file in files:
        with _hub_errors(f"{repo}/{file.name}"):
            path = api.hf_hub_download(
                repo, file.name, revision=revision, tqdm_class=_bar(progress, before, total)
            )
        paths.append(Path(path))
        before += file.size or 0
    return paths


def _bar(progress: Progress, before: int, total: int | None) -> type[Any]:
    """A class with the part of tqdm's interface that the library uses, telling `progress` instead."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.done = before + int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            progress(self.done, total)

        def update_transfer(self, n: float) -> None:
            """Bytes on the network, which the library counts apart from bytes of the file."""

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """The speed is shown by whoever shows the progress."""

    return Bar


def _digest(paths: Sequence[Path], files: Sequence[RemoteFile], progress: Progress) -> str:
    """The SHA-256 over all parts. Each part must have the hash the hub says, or it is deleted."""
    whole = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    done = 0
    for path, file in zip(paths, files, strict=True):
        part = hashlib.sha256()
        with read_errors(str(path)), path.open("rb") as content:
            while chunk := content.read(CHUNK):
                whole.update(chunk)
                part.update(chunk)
                done += len(chunk)
                progress(done, total)
        if file.sha256 is not None and part.hexdigest() != file.sha256:
            for each in (path.resolve(), path):
                each.unlink(missing_ok=True)
            raise BadDataError(
                f"{file.name}: its SHA-256 is {part.hexdigest()} and the hub says {file.sha256[:64]}; "
                "it was deleted from the cache; pull it again"
            )
    return whole.hexdigest()


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Maps huggingface-hub's exceptions, and those of the HTTP library under it."""
    from huggingface_hub import errors

    what = f"hf:{what}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionDeniedError(
            f"{what}: gated; accept its licence on the hub, and set HF_TOKEN to a token of that account"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFoundError(
            f"{what}: no such repository; check the name, and set HF_TOKEN where it is private"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise UnavailableError(
            f"{what}: the hub cannot be reached; check the network and HF_HUB_OFFLINE"
        ) from error
    except errors.EntryNotFoundError as error:
        raise NotFoundError(f"{what}: no such file in the repository; check the name") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise PermissionDeniedError(f"{what}: the hub refused ({status}); set HF_TOKEN") from error
        raise UnavailableError(f"{what}: the hub answered {status}; try again later") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{what}: not a name a hub can have: {error}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the HTTP library's own: no connection, a timeout
        raise UnavailableError(f"{what}: the hub cannot be reached: {error}; check the network") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise IOFailureError(f"{what}: the disk is full; free some space and try again") from error
        if error.errno is not None:
            raise IOFailureError(f"{what}: {error.strerror}") from error
        raise UnavailableError(f"{what}: {error}") from error


SOURCE = HuggingFaceSource()
