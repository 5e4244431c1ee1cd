"""Models found in place: the stores of other programs, installed packages, and the user's folders.

Owns where those lie, how each is laid out, and what a model found there is called. Reads names,
sizes, packages' lists of their files and Ollama's small manifests; must not open a model file, copy or
change anything. What
cannot be read is passed over: a broken store of another program never breaks a list.

The order of `places` is the order of precedence: where two files claim one name, the first keeps
it and the next is called by its folder too (`folder/name`).
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from myllm.errors import UsageError
from myllm.models.names import name_from

MAX_DEPTH: Final = 8
"""Folders below a place that are looked into; the deepest layout known (a hub's) needs six."""
MAX_MANIFEST: Final = 1024 * 1024
"""Bytes of an Ollama manifest; real ones have about a thousand."""

_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_FIRST_PART = re.compile(r"-00001-of-\d{5}\.gguf$", re.IGNORECASE)
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Found:
    """A file that may be a model, not opened yet; `sha256` where its store names files by it."""

    name: str
    path: str
    source: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A folder to walk for .gguf files, and what to call its kind."""

    folder: Path
    source: str


def find_models(own: Sequence[Path], environ: Mapping[str, str] = os.environ) -> list[Found]:
    """Every model file of the places, each file once, names unique; `own` is `models.paths`."""
    named: dict[str, Found] = {}
    seen: set[tuple[int, int]] = set()
    for found, status in _everything(own, environ):
        if (status.st_dev, status.st_ino) in seen:
            continue  # two revisions of a hub's repository, or a link: one file is one model
        seen.add((status.st_dev, status.st_ino))
        name = _unique(found, named)
        named[name] = found if name == found.name else replace(found, name=name)
    return list(named.values())


def places(own: Sequence[Path], environ: Mapping[str, str]) -> list[Place]:
    """The folders walked for .gguf files, most important first."""
    home = Path(environ["HOME"]) if environ.get("HOME") else None
    cache = _folder(environ, "XDG_CACHE_HOME") or (home and home / ".cache")
    hub = _folder(environ, "HF_HUB_CACHE") or _folder(environ, "HUGGINGFACE_HUB_CACHE")
    if hub is None and (base := _folder(environ, "HF_HOME") or (cache and cache / "huggingface")):
        hub = base / "hub"
    llama = _folder(environ, "LLAMA_CACHE") or (cache and cache / "llama.cpp")
    found = [Place(folder.expanduser(), "path") for folder in own]
    found += [Place(hub, "hf-cache")] if hub else []
    found += [Place(llama, "llama.cpp")] if llama else []
    if home:
        found += [Place(home / "Library/Caches/llama.cpp", "llama.cpp")]
        found += [
            Place(home / folder / "models", "lm-studio") for folder in (".lmstudio", ".cache/lm-studio")
        ]
    return found


def _everything(own: Sequence[Path], environ: Mapping[str, str]) -> Iterator[tuple[Found, os.stat_result]]:
    for place in places(own, environ):
        for path, status in _walk(place.folder):
            yield _found(path, place.source), status
    for path, package in _packaged():
        if packaged := _file_status(path):
            yield _found(path, f"package:{package}"), packaged
    yield from _ollama(environ)


def _walk(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The .gguf files below `top`, in order of their paths; each folder once, so links cannot loop."""
    folders = [(os.fspath(top), 0)]
    entered: set[tuple[int, int]] = set()
    while folders:
        folder, depth = folders.pop()
        try:
            here = os.stat(folder)  # noqa: PTH116 - Path objects would cost half of a long walk
            if (here.st_dev, here.st_ino) in entered:
                continue
            entered.add((here.st_dev, here.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            continue
        below = []
        for entry in entries:
            try:
                if entry.name.lower().endswith(".gguf"):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode) and not _LATER_PART.search(entry.name):
                        yield entry.path, status
                elif depth < MAX_DEPTH and entry.is_dir():
                    below.append((entry.path, depth + 1))
            except OSError:
                continue
        folders += reversed(below)


def _packaged() -> Iterator[tuple[str, str]]:
    """The .gguf files that installed Python packages list in their RECORD, with the package's name."""
    for folder in dict.fromkeys(sys.path):
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".dist-info"))
        except OSError:
            continue
        for name in names:
            try:
                record = Path(folder, name, "RECORD").read_bytes()
            except OSError:
                continue
            if b".gguf" not in record:
                continue
            for line in record.decode(errors="replace").splitlines():
                member = line.rsplit(",", 2)[0].strip('"')
                if member.lower().endswith(".gguf") and not _LATER_PART.search(member):
                    yield str(Path(folder, member)), name.partition("-")[0].replace("_", "-")


def _ollama(environ: Mapping[str, str]) -> Iterator[tuple[Found, os.stat_result]]:
    """What Ollama's manifests call models; the digests they name are checked before they name a file."""
    home = _folder(environ, "HOME")
    top = _folder(environ, "OLLAMA_MODELS") or (home and home / ".ollama/models")
    if top is None:
        return
    for manifest in sorted(top.glob("manifests/*/*/*/*")):
        digest = _model_layer(manifest)
        status = _file_status(blob := f"{top}/blobs/sha256-{digest}") if digest else None
        if digest and status:
            host, namespace, model, tag = manifest.parts[-4:]
            parts = [host] if host != "registry.ollama.ai" else []
            parts += [namespace] if namespace != "library" or parts else []
            name = "/".join(["ollama", *parts, f"{model}:{tag}"])
            yield Found(name, blob, "ollama", digest), status


def _model_layer(manifest: Path) -> str | None:
    import orjson

    try:
        with manifest.open("rb") as file:
            layers = orjson.loads(file.read(MAX_MANIFEST))["layers"]
        digests = [layer["digest"] for layer in layers if str(layer["mediaType"]).endswith(".image.model")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(digests) != 1 or not isinstance(digests[0], str):
        return None
    digest = digests[0].removeprefix("sha256:")
    return digest if _BLOB.fullmatch(digest) else None


def _found(path: str, source: str) -> Found:
    try:
        name = name_from(path)
    except UsageError:  # a file name of nothing but signs; its folders' names will be put before it
        name = "model"
    sha256 = None
    if source == "hf-cache" and not _FIRST_PART.search(path) and os.path.islink(path):  # noqa: PTH114
        blob = os.path.basename(os.readlink(path))  # noqa: PTH115, PTH119 - a blob is named by its hash
        sha256 = blob if _BLOB.fullmatch(blob) else None
    return Found(name, path, source, sha256)


def _unique(found: Found, taken: Mapping[str, Found]) -> str:
    name = found.name
    if name not in taken:
        return name
    folders = iter(Path(found.path).parent.parts[::-1])
    while name in taken:
        folder = next(folders, None)
        if folder is None:  # not for one path twice, as each file comes once
            return found.path
        name = f"{re.sub(r'[^A-Za-z0-9._+@-]+', '-', folder)}/{name}"
    return name


def _file_status(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - see _walk
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _folder(environ: Mapping[str, str], variable: str) -> Path | None:
    value = environ.get(variable)
    return Path(value).expanduser() if value else None
