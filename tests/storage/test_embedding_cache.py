"""The embedding cache: what is put comes back, the oldest goes first, and no fault of it ever raises."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.storage import database, embedding_cache
from myllm.storage.embedding_cache import CachedVectors, EmbeddingCache, cache_file, cache_keys

KEY = b"k" * 32
ENTRY = CachedVectors([(0, 5, 3)], bytes(16))
SETTINGS = {
    "fingerprint": "f",
    "window": None,
    "overlap": 0,
    "pool": "none",
    "purpose": None,
    "on_overflow": "split",
}


def numbered(*numbers: int, size: int = 1536) -> dict[bytes, CachedVectors]:
    return {number.to_bytes(32): CachedVectors([(0, 5, 3)], bytes(size)) for number in numbers}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, notes: list[str]) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache", note=notes.append)


window = st.tuples(*[st.integers(0, 2**53)] * 3)
entry = st.lists(window, min_size=1, max_size=3).flatmap(
    lambda windows: st.binary(min_size=8 * len(windows), max_size=8 * len(windows)).map(
        lambda vectors: CachedVectors(windows, vectors)
    )
)


@settings(deadline=None)  # the first opening imports sqlite_utils, half a second on a busy machine
@given(st.dictionaries(st.binary(min_size=32, max_size=32), entry, max_size=20))
def test_what_is_put_comes_back(entries: dict[bytes, CachedVectors]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = EmbeddingCache(Path(folder))
        first.put(entries)
        first.close()
        second = EmbeddingCache(Path(folder))
        assert second.get([*entries, b"missing"]) == entries
        second.close()


def test_more_keys_than_one_statement_takes(cache: EmbeddingCache) -> None:
    entries = numbered(*range(1200), size=16)
    cache.put(entries)
    assert cache.get(list(entries)) == entries


def test_the_file_is_private(cache: EmbeddingCache, tmp_path: Path) -> None:
    cache.put({KEY: ENTRY})
    files = list((tmp_path / "cache").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert len(files) == 3  # with the journal and its index


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cap = 400_000
    cache = EmbeddingCache(tmp_path, max_bytes=cap)
    for number in range(100):
        cache.put(numbered(number))
    assert len(cache.get(list(numbered(*range(50))))) == 50  # 50…99 are now the oldest
    for number in range(100, 200):
        cache.put(numbered(number))
    kept = {int.from_bytes(key) for key in cache.get(list(numbered(*range(200))))}
    gone = set(range(200)) - kept
    assert gone
    assert gone == set(range(50, 50 + len(gone)))
    cache.close()
    assert cache_file(tmp_path).stat().st_size < 1.1 * cap


@pytest.mark.parametrize("most_used", [1000, 49], ids=["closed", "many read"])
def test_what_was_only_read_is_noted_at_the_end_and_whenever_it_was_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_used: int
) -> None:
    monkeypatch.setattr(embedding_cache, "MOST_USED", most_used)
    cache = EmbeddingCache(tmp_path)
    for number in range(100):
        cache.put(numbered(number))
    assert len(cache.get(list(numbered(*range(50))))) == 50
    if most_used == 1000:
        cache.close()
    later = EmbeddingCache(tmp_path, max_bytes=400_000)
    for number in range(100, 200):
        later.put(numbered(number))
    kept = {int.from_bytes(key) for key in later.get(list(numbered(*range(100))))}
    later.close()
    cache.close()
    assert set(range(50)) <= kept, "read last"
    assert len(kept) < 100


def test_reading_waits_for_nobody_who_writes(cache: EmbeddingCache, tmp_path: Path, notes: list[str]) -> None:
    cache.put({KEY: ENTRY})
    other = sqlite3.connect(cache_file(tmp_path / "cache"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert cache.get([KEY]) == {KEY: ENTRY}
    other.close()
    cache.close()
    assert notes == []


def test_a_broken_file_is_set_aside_and_said(tmp_path: Path, notes: list[str]) -> None:
    cache_file(tmp_path).write_bytes(b"no database" * 1000)
    cache = EmbeddingCache(tmp_path, note=notes.append)
    cache.put({KEY: ENTRY})
    assert cache.get([KEY]) == {KEY: ENTRY}
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1
    assert len(notes) == 1
    assert "set aside" in notes[0]


def test_a_file_damaged_in_the_middle_is_set_aside(tmp_path: Path, notes: list[str]) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.put(numbered(*range(200)))
    cache.close()
    damaged = bytearray(cache_file(tmp_path).read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    cache_file(tmp_path).write_bytes(damaged)
    cache = EmbeddingCache(tmp_path, note=notes.append)
    assert cache.get(list(numbered(*range(200)))) == {}
    cache.put({KEY: ENTRY})
    assert cache.get([KEY]) == {KEY: ENTRY}
    assert len(notes) == 1


def test_another_programs_database_is_left_whole(tmp_path: Path, notes: list[str]) -> None:
    other = sqlite3.connect(cache_file(tmp_path))
    other.execute("CREATE TABLE precious (x)")
    other.commit()
    other.close()
    cache = EmbeddingCache(tmp_path, note=notes.append)
    cache.put({KEY: ENTRY})
    (kept,) = tmp_path.glob("*.corrupt-*")
    other = sqlite3.connect(kept)
    assert other.execute("SELECT * FROM precious").fetchall() == []
    other.close()
    assert "another program" in notes[0]


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        ("vectors = 7", False),
        ("vectors = 'text'", False),
        ("vectors = x''", False),
        ("vectors = x'00'", False),
        ("windows = 'text'", False),
        ("windows = x''", False),
        ("windows = zeroblob(25)", False),
        ("used = 'text'", True),
        ("used = x'00'", True),
        ("used = 0.5", True),
        ("used = 9223372036854775807", True),
    ],
)
def test_an_entry_that_is_none_of_ours_is_made_anew(
    tmp_path: Path, notes: list[str], change: str, noted: bool
) -> None:
    first = EmbeddingCache(tmp_path)
    first.put({KEY: ENTRY})
    first.close()
    with sqlite3.connect(cache_file(tmp_path)) as other:
        other.execute(f"UPDATE embeddings SET {change}")
    other.close()
    cache = EmbeddingCache(tmp_path, note=notes.append)
    assert cache.get([KEY]) == {}
    cache.put({KEY: ENTRY})
    assert cache.get([KEY]) == {KEY: ENTRY}
    cache.close()
    assert [("set aside" in note) for note in notes] == [True] * noted


def test_a_locked_file_is_done_without(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = EmbeddingCache(tmp_path)
    first.put({KEY: ENTRY})
    first.close()
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('PRAGMA locking_mode = EXCLUSIVE'); c.execute('BEGIN EXCLUSIVE'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(cache_file(tmp_path))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        cache = EmbeddingCache(tmp_path, note=notes.append)
        cache.put({KEY: ENTRY})
        assert cache.get([KEY]) == {}
        other.communicate(b"")
    assert len(notes) == 1
    assert "locked by another process; going on without" in notes[0]


@pytest.mark.parametrize(
    ("pragma", "why"), [("max_page_count = 4", "full"), ("query_only = ON", "readonly")], ids=["full", "ro"]
)
def test_what_cannot_be_written_can_still_be_read(
    cache: EmbeddingCache, notes: list[str], pragma: str, why: str
) -> None:
    cache.put({KEY: ENTRY})
    assert cache._connection is not None
    cache._connection.execute(f"PRAGMA {pragma}")
    cache.put(numbered(*range(100)))
    cache.put(numbered(*range(100)))
    assert cache.get([KEY]) == {KEY: ENTRY}
    assert len(notes) == 1
    assert why in notes[0]


def test_no_folder_is_no_failure(tmp_path: Path, notes: list[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "cache", note=notes.append)
    cache.put({KEY: ENTRY})
    assert cache.get([KEY]) == {}
    assert len(notes) == 1


def test_two_processes_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; "
        "from myllm.storage.embedding_cache import EmbeddingCache, CachedVectors; "
        "cache = EmbeddingCache(Path(sys.argv[1]), note=print); start = int(sys.argv[2])\n"
        "for n in range(start, start + 200):\n"
        "    cache.put({n.to_bytes(32): CachedVectors([(0, 1, 2)], bytes(64))})"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, str(start)], stdout=subprocess.PIPE)
        for start in (0, 100)
    ]
    assert [process.communicate()[0] for process in running] == [b"", b""]
    assert len(EmbeddingCache(tmp_path).get(list(numbered(*range(300))))) == 300


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"window": 128},
        {"overlap": 1},
        {"pool": "mean"},
        {"purpose": "query"},
        {"on_overflow": "error"},
        {"texts": ["b"]},
    ],
    ids=str,
)
def test_all_that_changes_a_vector_changes_the_key(change: dict[str, object]) -> None:
    given = {"texts": ["a"], **SETTINGS}
    assert cache_keys(**given) != cache_keys(**given | change)  # type: ignore[arg-type]


def test_a_key_does_not_depend_on_the_texts_beside_it() -> None:
    of_a, of_b = cache_keys(["a", "b"], **SETTINGS)  # type: ignore[arg-type]
    assert cache_keys(["b", "a"], **SETTINGS) == [of_b, of_a]  # type: ignore[arg-type]


def test_what_is_read_again_and_again_is_written_once(tmp_path: Path) -> None:
    first = EmbeddingCache(tmp_path)
    first.put(numbered(1))
    first.put(numbered(2))
    first.close()
    states = []
    for _ in range(3):
        cache = EmbeddingCache(tmp_path)
        assert len(cache.get(list(numbered(1, 2)))) == 2
        cache.close()
        states.append(cache_file(tmp_path).read_bytes())
    assert states[0] == states[1] == states[2]
    with sqlite3.connect(cache_file(tmp_path)) as database:
        assert database.execute("SELECT DISTINCT used FROM embeddings").fetchall() == [(2,)]
    database.close()
