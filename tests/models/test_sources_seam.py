"""What every model source promises; a new one is added to `EXAMPLES` and must pass the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_maker import make_gguf

from myllm.errors import MyllmError, NotFoundError, UsageError
from myllm.models.registry import Registry
from myllm.models.sources import PREFIXES, find_source
from myllm.models.store import Staging
from myllm.settings import Settings

EXAMPLES = {
    "pypi": "pypi:package==1.0#file.gguf",
    "hf": "hf:owner/repo:Q4_K_M",
    "https": "https://example.invalid/m.gguf",
    "http": "http://127.0.0.1:9/m.gguf",
    "file": "file:/nowhere/m.gguf",
    "copy": "copy:/nowhere/m.gguf",
}


def test_every_prefix_has_an_example() -> None:
    assert EXAMPLES.keys() == PREFIXES.keys()


@pytest.mark.parametrize("text", EXAMPLES.values())
def test_the_canonical_spelling_stands_for_itself(text: str) -> None:
    found = find_source(text)
    assert found is not None
    source, place, canonical = found
    again = find_source(canonical)
    assert again is not None
    assert again[1:] == (place, canonical)
    assert source.check(place) == place


@pytest.mark.parametrize("text", EXAMPLES.values())
def test_offline_a_source_that_needs_the_network_is_not_asked(text: str) -> None:
    found = find_source(text)
    assert found is not None
    with pytest.raises(NotFoundError) as raised:
        Registry(Settings(offline=True)).pull(text)
    assert ("MYLLM_OFFLINE" in str(raised.value)) is found[0].needs_network


@pytest.mark.parametrize("prefix", ["file", "copy"])
def test_what_progress_raises_or_the_place_lacks_passes_through(prefix: str, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "staging")
    staging.folder.mkdir()
    found = find_source(f"{prefix}:{make_gguf(tmp_path / 'm.gguf')}")
    assert found is not None
    fetched = found[0].fetch(found[1], staging, lambda done, total: None)
    assert fetched.name == "m"
    assert staging.holds(fetched.files[0]) is (prefix == "copy")
    with pytest.raises(MyllmError):
        found[0].fetch(str(tmp_path / "absent.gguf"), staging, lambda done, total: None)


@pytest.mark.parametrize("prefix", ["pypi", "hf", "https", "http"])
@pytest.mark.parametrize("place", ["", "\n", "../..", "a\0b", "-x"])
def test_a_place_that_cannot_be_one_is_refused_before_anything_is_asked(prefix: str, place: str) -> None:
    with pytest.raises(UsageError):
        find_source(f"{prefix}:{place}")


def test_a_name_without_a_prefix_is_no_source() -> None:
    for text in ("smollm2", "unknown:x", "ollama/llama3:8b", ""):
        assert find_source(text) is None
