"""Models found in place: other programs' stores as they lay them out, broken ones too; and the index."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from gguf_maker import Tensor, make_gguf

from myllm.errors import NotFoundError, PermissionDeniedError
from myllm.models import gguf as gguf_module
from myllm.models.discovery import find_models
from myllm.models.registry import Registry
from myllm.settings import Settings


def made(path: Path, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_gguf(path, {"general.name": str(path), **metadata})


def names(settings: Settings | None = None) -> dict[str, str]:
    """Name → source of all that `models list` shows."""
    return {model.name: model.source for model, _ in Registry(settings or Settings()).models()}


def in_hub(hub: Path, repo: str, revision: str, file: str) -> Path:
    """A file as the hub's cache has it: a link in a snapshot to a blob named by its hash."""
    made(content := hub / "content.gguf")
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    top = hub / f"models--{repo.replace('/', '--')}"
    link = top / "snapshots" / revision / file
    for folder in (top / "blobs", link.parent):
        folder.mkdir(parents=True, exist_ok=True)
    content.rename(top / "blobs" / digest)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(top / "blobs" / digest, link.parent))
    return link


# ── each place ──────────────────────────────────────────────────────────────────────────────


def test_nothing_anywhere_is_an_empty_list() -> None:
    assert names() == {}


def test_the_hubs_cache_is_found_by_its_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_hub(home / ".cache/huggingface/hub", "o/usual", "a" * 40, "usual.gguf")
    assert names() == {"usual": "hf-cache"}
    in_hub(home / "elsewhere/hub", "o/home", "a" * 40, "home.gguf")
    monkeypatch.setenv("HF_HOME", str(home / "elsewhere"))
    assert names() == {"home": "hf-cache"}
    in_hub(home / "third", "o/cache", "a" * 40, "cache.gguf")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "third"))
    assert names() == {"cache": "hf-cache"}


def test_a_file_that_two_revisions_share_is_one_model(home: Path) -> None:
    hub = home / ".cache/huggingface/hub"
    first = in_hub(hub, "o/r", "a" * 40, "m.gguf")
    second = hub / "models--o--r/snapshots" / ("b" * 40) / "m.gguf"
    second.parent.mkdir()
    second.symlink_to(first.resolve())
    assert list(names()) == ["m"]


def test_a_blobs_name_is_taken_for_its_hash(home: Path) -> None:
    link = in_hub(home / ".cache/huggingface/hub", "o/r", "a" * 40, "m.gguf")
    registry = Registry(Settings())
    assert registry.resolve("m").sha256 == hashlib.sha256(link.read_bytes()).hexdigest()
    assert registry.verify("m").path == link


def test_llama_cpps_cache_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(home / ".cache/llama.cpp/ggml-org_tiny_tiny-Q8_0.gguf")
    assert names() == {"ggml-org_tiny_tiny-Q8_0": "llama.cpp"}
    made(home / "lc/other.gguf")
    monkeypatch.setenv("LLAMA_CACHE", str(home / "lc"))
    assert names() == {"other": "llama.cpp"}


def test_lm_studios_folders_are_found(home: Path) -> None:
    made(home / ".lmstudio/models/pub/repo/new.gguf")
    made(home / ".cache/lm-studio/models/pub/repo/old.gguf")
    assert names() == {"new": "lm-studio", "old": "lm-studio"}


def ollama(home: Path, name: str, layers: object, root: str = ".ollama/models") -> Path:
    manifest = home / root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return manifest


def ollama_blob(home: Path, text: str, root: str = ".ollama/models") -> dict[str, str]:
    content = made(home / "blob.gguf", **{"general.description": text}).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    blobs = home / root / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (home / "blob.gguf").rename(blobs / f"sha256-{digest}")
    return {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}


def test_ollamas_models_go_by_their_own_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64}
    ollama(home, "registry.ollama.ai/library/llama3/8b", [template, ollama_blob(home, "a")])
    ollama(home, "registry.ollama.ai/someone/mine/latest", [ollama_blob(home, "b")])
    ollama(home, "hf.co/o/r/Q4_K_M", [ollama_blob(home, "c")])
    expected = {"ollama/llama3:8b", "ollama/someone/mine:latest", "ollama/hf.co/o/r:Q4_K_M"}
    assert set(names()) == expected
    model = Registry(Settings()).resolve("ollama/llama3:8b")
    assert model.path.name == f"sha256-{model.sha256}"
    assert Registry(Settings()).verify("ollama/llama3:8b").sha256 == model.sha256
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "nowhere"))
    assert names() == {}


@pytest.mark.parametrize(
    "layers",
    [
        None,
        "x",
        [{}],
        [1],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../../etc/passwd"}],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "A" * 64}],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": 5}],
        [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}],
    ],
)
def test_a_broken_or_hostile_manifest_is_passed_over(home: Path, layers: object) -> None:
    """A digest must be one before it names a file (CVE-2024-37032)."""
    ollama(home, "registry.ollama.ai/library/bad/1", layers)
    ollama(home, "registry.ollama.ai/library/good/1", [ollama_blob(home, "a")])
    assert set(names()) == {"ollama/good:1"}


def test_a_package_that_ships_a_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    made(site / "llm_tiny" / "tiny.gguf")
    info = site / "llm_tiny-1.0.dist-info"
    info.mkdir()
    lines = ["llm_tiny/tiny.gguf,sha256=x,5", '"llm_tiny/no, such.gguf",,', "/etc/passwd.gguf,,"]
    (info / "RECORD").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [str(site), str(tmp_path / "absent"), *sys.path])
    assert names() == {"tiny": "package:llm-tiny"}


def test_the_users_folders_are_found(tmp_path: Path) -> None:
    made(tmp_path / "a" / "deep" / "one.gguf")
    made(tmp_path / "b" / "Two.GGUF")
    settings = Settings(models_paths=(tmp_path / "a", tmp_path / "b", tmp_path / "absent"))
    assert names(settings) == {"one": "path", "Two": "path"}


# ── which one a name means ──────────────────────────────────────────────────────────────────


def test_of_two_with_one_name_the_first_place_keeps_it(home: Path, tmp_path: Path) -> None:
    made(home / ".lmstudio/models/pub/repo/m.gguf")
    made(tmp_path / "mine" / "m.gguf")
    in_hub(home / ".cache/huggingface/hub", "o/r", "a" * 40, "m.gguf")
    settings = Settings(models_paths=(tmp_path / "mine",))
    assert names(settings) == {"m": "path", f"{'a' * 40}/m": "hf-cache", "repo/m": "lm-studio"}
    assert Registry(settings).resolve("repo/m").path.parts[-2:] == ("repo", "m.gguf")


def test_folders_are_put_before_a_name_until_it_is_free(tmp_path: Path) -> None:
    for folder in ("a/x", "b/x", "c/x"):
        made(tmp_path / folder / "model.gguf")
    settings = Settings(models_paths=(tmp_path,))
    assert list(names(settings)) == ["model", "x/model", "c/x/model"]


def test_a_recorded_name_hides_a_found_one(tmp_path: Path) -> None:
    made(tmp_path / "folder" / "m.gguf")
    registry = Registry(Settings(models_paths=(tmp_path / "folder",)))
    other = registry.add(made(tmp_path / "other.gguf"), "m")
    assert registry.resolve("m") == other
    assert [model for model, _ in registry.models()] == [other]


def test_a_recorded_file_is_not_listed_twice(tmp_path: Path) -> None:
    path = made(tmp_path / "m.gguf")
    registry = Registry(Settings(models_paths=(tmp_path,)))
    registry.add(path, "mine")
    assert [model.name for model, _ in registry.models()] == ["mine"]


def test_a_found_model_is_not_removed_and_can_be_given_a_name(tmp_path: Path) -> None:
    path = made(tmp_path / "m.gguf")
    registry = Registry(Settings(models_paths=(tmp_path,)))
    with pytest.raises(PermissionDeniedError, match="MyLLM did not put it"):
        registry.remove("m")
    assert registry.alias("short", "m").path == path
    assert registry.resolve("short").path == path


# ── what is passed over ─────────────────────────────────────────────────────────────────────


def test_what_is_no_model_to_run_is_not_listed(tmp_path: Path) -> None:
    made(tmp_path / "good.gguf")
    made(tmp_path / "mmproj.gguf", **{"general.architecture": "clip"})
    made(tmp_path / "lora.gguf", **{"general.type": "adapter"})
    make_gguf(tmp_path / "vocab.gguf", tensors=[])
    (tmp_path / "text.gguf").write_text("text")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    assert names(Settings(models_paths=(tmp_path,))) == {"good": "path"}


def test_links_that_loop_or_lead_nowhere_break_nothing(tmp_path: Path) -> None:
    made(tmp_path / "good.gguf")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "self.gguf").symlink_to(tmp_path / "self.gguf")
    (tmp_path / "broken.gguf").symlink_to(tmp_path / "absent")
    assert names(Settings(models_paths=(tmp_path,))) == {"good": "path"}


def test_a_folder_that_many_links_lead_to_is_entered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "good.gguf")
    for n in range(5):
        (tmp_path / f"loop-{n}").symlink_to(tmp_path)
    entered: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: entered.append(folder) or scandir(folder))
    assert names(Settings(models_paths=(tmp_path,))) == {"good": "path"}
    assert [folder for folder in entered if str(folder).startswith(str(tmp_path))] == [str(tmp_path)]


def test_a_folder_that_cannot_be_read_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "good.gguf")
    made(tmp_path / "closed" / "hidden.gguf")
    scandir = os.scandir

    def refusing(folder: str) -> object:
        if folder.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)  # a real one would not stop root, who runs some CI
    assert names(Settings(models_paths=(tmp_path,))) == {"good": "path"}


def test_a_split_model_is_listed_once_and_with_its_whole_size(tmp_path: Path) -> None:
    parts = [
        make_gguf(
            tmp_path / f"big-0000{n + 1}-of-00002.gguf",
            {"split.no": n, "split.count": 2},
            [Tensor(f"blk.{n}.weight")],
        )
        for n in range(2)
    ]
    [(model, said)] = Registry(Settings(models_paths=(tmp_path,))).models()
    assert (model.name, model.path) == ("big", parts[0])
    assert said["size_bytes"] == sum(part.stat().st_size for part in parts)


def test_a_digest_that_leads_out_of_the_store_is_no_digest(home: Path) -> None:
    secret = made(home / "secret.gguf")
    (home / ".ollama/models/blobs/sha256-x").mkdir(parents=True)
    digest = "sha256:x/../../../../secret.gguf"
    assert (home / ".ollama/models/blobs" / digest.replace(":", "-")).samefile(secret)
    ollama(home, "registry.ollama.ai/library/evil/1", [{"mediaType": "x.image.model", "digest": digest}])
    assert names() == {}


def test_without_a_home_only_what_is_named_is_searched(tmp_path: Path) -> None:
    made(tmp_path / "m.gguf")
    assert [found.name for found in find_models((tmp_path,), {})] == ["m"]


# ── the index ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose headers are read from now on."""
    opened: list[Path] = []
    read_model = gguf_module.read_model

    def counted(path: Path) -> object:
        opened.append(path)
        return read_model(path)

    monkeypatch.setattr(gguf_module, "read_model", counted)
    return opened


def test_a_header_is_read_once_until_the_file_changes(tmp_path: Path, reads: list[Path]) -> None:
    path = made(tmp_path / "m.gguf")
    (tmp_path / "text.gguf").write_text("text")
    settings = Settings(models_paths=(tmp_path,))
    assert names(settings) == names(settings) == {"m": "path"}
    assert sorted(reads) == [path, tmp_path / "text.gguf"]
    size = path.stat().st_size
    make_gguf(path, {"general.name": str(path), "llama.context_length": 4096})
    assert path.stat().st_size == size
    [(_, said)] = Registry(settings).models()
    assert said["context_length"] == 4096
    path.unlink()
    assert names(settings) == {}


def test_a_broken_index_is_made_again(tmp_path: Path, reads: list[Path]) -> None:
    made(tmp_path / "m.gguf")
    settings = Settings(models_paths=(tmp_path,))
    assert names(settings) == {"m": "path"}
    index = Path(os.environ["XDG_CACHE_HOME"]) / "myllm" / "models-index.json"
    good = index.read_text()
    for content in (
        "",
        "[]",
        "null",
        '{"format": 0}',
        '{"format": 1, "files": [1]}',
        good[:-5],
        good.replace("[", "{"),
    ):
        index.write_text(content)
        assert names(settings) == {"m": "path"}
    assert len(reads) == 8


def test_a_cache_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    made(tmp_path / "m.gguf")
    (cache := Path(os.environ["XDG_CACHE_HOME"])).parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    assert names(Settings(models_paths=(tmp_path,))) == {"m": "path"}


def test_what_has_been_listed_costs_a_look_into_each_folder_and_no_more(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long that takes for 10,000 models is the benchmark's."""
    one = made(tmp_path / "one.gguf").read_bytes()
    folders = {str(tmp_path / "models")}
    for n in range(1000):
        path = tmp_path / "models" / f"publisher-{n % 100}" / f"repo-{n}" / f"model-{n}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one)
        folders |= {str(path.parent), str(path.parent.parent)}
    settings = Settings(models_paths=(tmp_path / "models",))
    assert len(list(Registry(settings).models())) == 1000
    index = Path(os.environ["XDG_CACHE_HOME"]) / "myllm" / "models-index.json"
    written, entered = index.stat(), list[str]()
    reads.clear()
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: entered.append(str(folder)) or scandir(folder))
    assert len(list(Registry(settings).models())) == 1000
    assert reads == []
    assert sorted(folder for folder in entered if folder in folders) == sorted(folders)
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_a_name_found_nowhere_is_not_found_after_the_search(tmp_path: Path) -> None:
    made(tmp_path / "mistral.gguf")
    with pytest.raises(NotFoundError, match="did you mean mistral"):
        Registry(Settings(models_paths=(tmp_path,))).resolve("mistrel")
