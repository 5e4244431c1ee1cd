"""`https:`: resumed where it broke off, checked, and never led astray."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_maker import Tensor, make_gguf
from servers import Origin

from myllm.errors import (
    BadDataError,
    IOFailureError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from myllm.models import store
from myllm.models.registry import Registry
from myllm.settings import Settings


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    """200 kB, so that it can break off at several places."""
    return make_gguf(tmp_path / "m.gguf", tensors=[Tensor(shape=(32, 1600), size=204800)]).read_bytes()


@pytest.fixture
def origin(gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Origin(gguf)
    with server.running():
        yield server


def pull(origin: Origin, path: str = "/files/Tiny-Q4_0.gguf?download=1") -> Path:
    return Registry(Settings()).pull(origin.url + path).path


def files() -> list[Path]:
    return sorted(
        p for p in (Path(os.environ["XDG_DATA_HOME"]) / "myllm" / "models").rglob("*") if p.is_file()
    )


def test_a_pull_brings_the_file_under_its_hash(origin: Origin, gguf: bytes) -> None:
    seen: list[tuple[int, int | None]] = []
    model = Registry(Settings()).pull(
        f"{origin.url}/Tiny-Q4_0.gguf#x", lambda done, total: seen.append((done, total))
    )
    assert model.path.read_bytes() == gguf
    assert (model.name, model.source) == ("Tiny-Q4_0", f"{origin.url}/Tiny-Q4_0.gguf")
    assert model.sha256 == hashlib.sha256(gguf).hexdigest()
    assert seen[0] == (0, len(gguf))
    assert seen[-1] == (len(gguf), len(gguf))
    assert files() == [model.path]


def test_a_pull_that_broke_off_anywhere_resumes(origin: Origin, gguf: bytes) -> None:
    """The connection drops every 64 KiB; what came is not asked for again."""
    origin.cut_after = 65536
    for _ in range(len(gguf) // 65536):
        with pytest.raises(UnavailableError, match="pull again to resume"):
            pull(origin)
        assert not [path for path in files() if path.parent.name == "models"]
    assert pull(origin).read_bytes() == gguf
    ranges = [headers.get("range") for _, _, headers in origin.requests]
    assert ranges == [None, "bytes=65536-", "bytes=131072-", "bytes=196608-"]


def test_a_server_without_ranges_starts_over(origin: Origin, gguf: bytes) -> None:
    origin.cut_after = 1000
    with pytest.raises(UnavailableError):
        pull(origin)
    origin.cut_after, origin.ignore_ranges = None, True
    assert pull(origin).read_bytes() == gguf


def test_a_file_that_changed_meanwhile_starts_over(origin: Origin, tmp_path: Path) -> None:
    origin.cut_after = 1000
    with pytest.raises(UnavailableError):
        pull(origin)
    origin.cut_after, origin.etag = None, '"two"'
    origin.body = make_gguf(tmp_path / "other.gguf", {"general.name": "Other"}).read_bytes()
    assert pull(origin).read_bytes() == origin.body


@pytest.mark.parametrize(
    "lie", ["bytes 0-9/10", "bytes 5000-6000/7000", "junk", "bytes 1000-2000/1000000000"]
)
def test_a_senseless_answer_to_a_range_is_refused_and_nothing_is_kept(origin: Origin, lie: str) -> None:
    origin.cut_after = 1000
    with pytest.raises(UnavailableError):
        pull(origin)
    origin.cut_after, origin.content_range = None, lie
    with pytest.raises(BadDataError):
        pull(origin)
    assert files() == []


def test_without_a_length_the_end_is_where_it_ends(origin: Origin, gguf: bytes) -> None:
    origin.announce_length = False
    assert pull(origin).read_bytes() == gguf


def test_half_a_file_without_a_length_is_seen_by_its_header(origin: Origin, gguf: bytes) -> None:
    origin.announce_length, origin.cut_after = False, len(gguf) // 2
    with pytest.raises(BadDataError):
        pull(origin)
    assert files() == []


def test_a_hash_mismatch_deletes_the_partial(origin: Origin) -> None:
    with pytest.raises(BadDataError, match="should be 1111"):
        Registry(Settings()).pull(f"{origin.url}/x.gguf", sha256="1" * 64)
    assert files() == []


def test_what_is_not_a_model_is_not_kept(origin: Origin) -> None:
    origin.body = b"<html>Please log in</html>"
    with pytest.raises(BadDataError):
        pull(origin)
    assert files() == []


def test_more_than_the_disk_holds_is_refused_before_it_comes(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.Staging, "free_bytes", lambda self: 1000)
    with pytest.raises(IOFailureError, match="the disk has 1,000"):
        pull(origin)
    assert files() == []


def test_stopping_keeps_what_came_and_shows_nothing(origin: Origin, gguf: bytes) -> None:
    def stop(done: int, total: int | None) -> None:
        if done > 65536:
            raise KeyboardInterrupt

    registry = Registry(Settings())
    with pytest.raises(KeyboardInterrupt):
        registry.pull(f"{origin.url}/x.gguf", stop)
    assert list(registry.models()) == []
    assert registry.pull(f"{origin.url}/x.gguf").path.read_bytes() == gguf
    assert origin.requests[-1][2]["range"].startswith("bytes=")


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFoundError), (410, NotFoundError), (401, PermissionDeniedError), (403, PermissionDeniedError)]
    + [(status, UnavailableError) for status in (429, 500, 503)],
)
def test_a_refusal_is_told_apart(origin: Origin, status: int, error: type[Exception]) -> None:
    origin.status = status
    with pytest.raises(error):
        pull(origin)


def test_no_server_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="cannot be reached"):
        Registry(Settings()).pull("http://127.0.0.1:9/x.gguf")


@pytest.mark.parametrize(
    "target", ["http://example.invalid/x.gguf", "ftp://127.0.0.1/x", "https://u:p@127.0.0.1/"]
)
def test_a_redirect_to_a_forbidden_place_is_not_followed(origin: Origin, target: str) -> None:
    origin.redirect = target
    with pytest.raises(PermissionDeniedError, match="a place not allowed"):
        pull(origin, "/redirect.gguf")
    assert len(origin.requests) == 1


def test_a_redirect_to_a_file_of_this_machine_is_not_followed(origin: Origin, tmp_path: Path) -> None:
    origin.redirect = (tmp_path / "m.gguf").as_uri()
    with pytest.raises(UnavailableError):
        pull(origin, "/redirect.gguf")


def test_a_redirect_on_loopback_is_followed(origin: Origin, gguf: bytes) -> None:
    origin.redirect = f"{origin.url}/there.gguf"
    assert pull(origin, "/redirect.gguf").read_bytes() == gguf


@pytest.mark.parametrize(
    "url",
    [
        "http://example.invalid/x.gguf",
        "http://127.0.0.1.example.invalid/x.gguf",
        "http://192.168.0.1/x.gguf",
        "https://user:secret@127.0.0.1/x.gguf",
        "https:///x.gguf",
        "https://[::1/x.gguf",
        "https://host:port/x.gguf",
        "https://host/a b.gguf",
        "https://host/\n.gguf",
    ],
)
def test_only_a_clean_https_address_is_fetched(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        Registry(Settings()).pull(url)
    assert "secret" not in str(raised.value)
