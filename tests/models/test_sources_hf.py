"""`hf:`: files chosen, fetched by huggingface-hub from a fake hub, and used in its cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint
from gguf_maker import Tensor, make_gguf
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from servers import Hub

from myllm.errors import BadDataError, NotFoundError, PermissionDeniedError, UnavailableError, UsageError
from myllm.models.gguf import read_header
from myllm.models.registry import Registry
from myllm.models.sources.hf import RemoteFile, choose, is_safe
from myllm.settings import Settings


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    return make_gguf(tmp_path / "m.gguf").read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The library reads its variables when it is imported, so here its constants are set instead."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server.running():
        yield server


def test_a_pull_uses_the_file_in_the_hubs_cache(hub: Hub, gguf: bytes, tmp_path: Path) -> None:
    hub.files = {"Tiny-Q4_0.gguf": gguf, "README.md": b"# hi"}
    seen: list[tuple[int, int | None]] = []
    registry = Registry(Settings())
    model = registry.pull("hf:owner/repo", lambda done, total: seen.append((done, total)))
    assert (model.name, model.source) == ("Tiny-Q4_0", "hf:owner/repo")
    assert model.path.is_relative_to(tmp_path / "hub")
    assert model.path.read_bytes() == gguf
    assert model.sha256 == hashlib.sha256(gguf).hexdigest()
    assert (len(gguf), len(gguf)) in seen
    assert registry.remove("Tiny-Q4_0").left == (model.path,)
    assert model.path.exists()


def test_a_second_pull_asks_the_hub_nothing(hub: Hub, gguf: bytes) -> None:
    hub.files = {"Tiny-Q4_0.gguf": gguf}
    registry = Registry(Settings())
    first = registry.pull("hf:owner/repo")
    asked = len(hub.requests)
    assert registry.pull("hf:owner/repo") == first
    assert len(hub.requests) == asked


def test_a_hash_that_the_hub_does_not_keep_to_deletes_the_file(hub: Hub, gguf: bytes, tmp_path: Path) -> None:
    hub.files = {"Tiny-Q4_0.gguf": gguf}
    hub.claimed_sha256 = {"Tiny-Q4_0.gguf": "0" * 64}
    with pytest.raises(BadDataError, match="the hub says 0000"):
        Registry(Settings()).pull("hf:owner/repo")
    assert not list((tmp_path / "hub").rglob("*.gguf"))
    assert not [path for path in (tmp_path / "hub").rglob("blobs/*") if path.is_file()]
    assert Registry(Settings()).recorded() == []


def test_a_file_that_is_no_model_is_not_recorded(hub: Hub) -> None:
    hub.files = {"x.gguf": b"text"}
    with pytest.raises(BadDataError):
        Registry(Settings()).pull("hf:owner/repo")
    assert Registry(Settings()).recorded() == []


def test_all_parts_of_a_split_model_come(hub: Hub, tmp_path: Path) -> None:
    for n in (1, 2):
        made = make_gguf(
            tmp_path / "part.gguf", {"split.no": n - 1, "split.count": 2}, [Tensor(f"blk.{n}.weight")]
        )
        hub.files[f"Q8_0/big-Q8_0-0000{n}-of-00002.gguf"] = made.read_bytes()
    registry = Registry(Settings())
    model = registry.pull("hf:owner/repo:Q8_0")
    assert model.name == "big-Q8_0"
    assert model.path.name == "big-Q8_0-00001-of-00002.gguf"
    assert model.path.with_name("big-Q8_0-00002-of-00002.gguf").exists()
    assert model.sha256 == hashlib.sha256(b"".join(hub.files.values())).hexdigest()


def test_an_embedding_models_checkpoint_is_converted_into_the_store(
    hub: Hub, gguf: bytes, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    hub.files = {**files, "onnx/model.onnx": b"x", "../evil": b"x"}
    registry = Registry(Settings())
    model = registry.pull("hf:owner/repo")
    assert (model.name, read_header(model.path).embedding_window) == ("repo", 16)
    assert registry.remove("repo").deleted == (model.path,)
    assert hub.count("GET", "/resolve/.*(onnx|evil)") == 0
    hub.files = {**files, "Tiny-Q4_0.gguf": gguf}
    assert registry.pull("hf:owner/repo").name == "Tiny-Q4_0"
    hub.files = {name: content for name, content in files.items() if name != "modules.json"}
    with pytest.raises(NotFoundError, match="it has no"):
        registry.pull("hf:owner/repo", name="other", sha256="0" * 64)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (404, "RepoNotFound", NotFoundError),
        (401, "RepoNotFound", NotFoundError),
        (403, "GatedRepo", PermissionDeniedError),
        (403, "", PermissionDeniedError),
        (418, "", UnavailableError),
    ],
)
def test_a_refusal_is_told_apart(hub: Hub, status: int, code: str, error: type[Exception]) -> None:
    hub.error = (status, code)
    with pytest.raises(error, match="hf:owner/repo"):
        Registry(Settings()).pull("hf:owner/repo")


def test_a_token_opens_a_private_repository_and_is_on_no_record(
    hub: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files, hub.token = {"x.gguf": gguf}, "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert Registry(Settings()).pull("hf:owner/repo").path.read_bytes() == gguf
    assert "hf_secret" not in (Path(os.environ["XDG_DATA_HOME"]) / "myllm" / "models.json").read_text()


def test_a_hub_that_cannot_be_reached_is_unavailable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="cannot be reached"):
        Registry(Settings()).pull("hf:owner/repo")


def test_names_that_a_hostile_hub_sends_are_passed_over(hub: Hub, gguf: bytes, tmp_path: Path) -> None:
    hub.files = {"good.gguf": gguf}
    hub.extra_names = ["../../evil.gguf", "/etc/evil.gguf", "a\\..\\evil.gguf", "\x1b[2Jevil.gguf"]
    assert Registry(Settings()).pull("hf:owner/repo").name == "good"
    assert not list(tmp_path.rglob("*evil*"))


# ── choosing ────────────────────────────────────────────────────────────────────────────────


def remote(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 1, None) for name in names]


def chosen(names: list[str], quant: str | None = None, file: str | None = None) -> list[str]:
    return [each.name for each in choose(remote(*names), quant, file, "hf:o/r")]


def test_the_only_model_is_taken() -> None:
    assert chosen(["README.md", "x.gguf", "mmproj-x.gguf"]) == ["x.gguf"]


def test_of_several_the_usual_format_is_taken() -> None:
    assert chosen(["x-Q2_K.gguf", "x-Q4_K_M.gguf", "x-Q8_0.gguf"]) == ["x-Q4_K_M.gguf"]
    assert chosen(["x-Q2_K.gguf", "x-Q8_0.gguf"]) == ["x-Q8_0.gguf"]


def test_without_a_usual_format_the_choices_are_named() -> None:
    with pytest.raises(NotFoundError, match=r"several .*: x-Q2_K, x-Q3_K; choose one: hf:o/r/FILE\.gguf"):
        chosen(["x-Q2_K.gguf", "x-Q3_K.gguf"])


def test_a_format_is_matched_whole_and_in_any_case() -> None:
    names = ["x-Q4_K_M.gguf", "x-Q4_K.gguf", "x-iQ4_K.gguf"]
    assert chosen(names, quant="q4_k") == ["x-Q4_K.gguf"]
    with pytest.raises(NotFoundError, match="no such file"):
        chosen(names, quant="K")


def test_a_file_is_taken_by_its_name_alone() -> None:
    assert chosen(["a.gguf", "sub/a.gguf"], file="sub/a.gguf") == ["sub/a.gguf"]
    with pytest.raises(NotFoundError, match="no such file: a"):
        chosen(["a.gguf"], file="b.gguf")


def test_a_repository_without_models_says_where_to_look() -> None:
    with pytest.raises(NotFoundError, match="-GGUF"):
        chosen(["model.safetensors"])


def test_a_missing_part_is_bad_data() -> None:
    with pytest.raises(BadDataError, match="2 of the 3 parts"):
        chosen(["x-00001-of-00003.gguf", "x-00003-of-00003.gguf"])


@given(st.text(max_size=60))
def test_a_safe_name_stays_inside_its_folder(text: str) -> None:
    for name in (text, f"{text}.gguf", f"a/{text}/b.gguf", f"../{text}.gguf"):
        if is_safe(name):
            assert (Path("/top") / name).resolve().is_relative_to("/top")
            assert "\\" not in name
            assert name.isprintable()


@pytest.mark.parametrize(
    "place",
    ["", "owner", "owner/", "/repo", "a/b/c", "a/b/../x.gguf", "../b", "a/b:", "a/b:Q 4", "o/r/x.gguf\n"],
)
def test_only_a_repository_is_asked_for(place: str) -> None:
    with pytest.raises(UsageError):
        Registry(Settings()).pull(f"hf:{place}")
