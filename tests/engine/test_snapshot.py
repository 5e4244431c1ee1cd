"""Blocks of keys and values on disk: found by tokens, checked before they are trusted, kept within a size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.engine.kv_cache import common_prefix
from myllm.engine.snapshot import BLOCK, HEADER, SHORTEST, Payload, Snapshots, checksum
from myllm.snapshot_files import forget

MANY = 2**30


def payload_of(tokens: list[int], start: int) -> Payload:
    """What a runner would give: here a byte for each token's own value and place."""
    return np.array([(token * 7 + at) % 251 for at, token in enumerate(tokens)][start:], np.uint8)


def keep(snapshots: Snapshots, tokens: list[int]) -> None:
    for start, end, within in snapshots.gaps(tokens, snapshots.find(tokens)):
        snapshots.write(tokens[:end], start, payload_of(tokens[:end], start), within)


def restored(snapshots: Snapshots, tokens: list[int]) -> list[int]:
    """The payload of what was found, which must be that of the tokens asked for."""
    found = snapshots.find(tokens)
    values: list[int] = []
    for block in found.blocks:
        payload = snapshots.read(block)
        assert payload is not None
        values += payload[: block.used].tolist()
    assert values == payload_of(tokens[: found.length], 0).tolist()
    return tokens[: found.length]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "kv", "a model", MANY)


def test_what_was_kept_is_found_by_whatever_begins_so(snapshots: Snapshots) -> None:
    tokens = list(range(3 * BLOCK + 100))
    keep(snapshots, tokens)
    assert restored(snapshots, [*tokens, 5, 6]) == tokens
    assert restored(snapshots, tokens[:-1]) == tokens[:-1]
    assert restored(snapshots, [*tokens[: BLOCK + 50], -1, *tokens]) == tokens[: BLOCK + 50]
    assert restored(snapshots, [-1, *tokens]) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([(0, 40), (1, 300), (2, 7), (3, 256)]), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_the_longest_common_beginning_is_found_but_for_a_few_tokens(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[list[tuple[int, int]]]
) -> None:
    snapshots = Snapshots(tmp_path_factory.mktemp("kv"), "a model", MANY)
    known: list[list[int]] = []
    for turns in conversations:
        tokens = [kind * 1000 + at for kind, length in turns for at in range(length)]
        best = max((common_prefix(tokens, other) for other in known), default=0)
        assert best - len(restored(snapshots, tokens)) < SHORTEST
        keep(snapshots, tokens)
        known.append(tokens)
        assert len(tokens) < SHORTEST or restored(snapshots, tokens) == tokens


def test_the_end_of_a_prompt_is_found_however_little_of_a_block_it_is(snapshots: Snapshots) -> None:
    tokens = list(range(BLOCK + 100))
    keep(snapshots, tokens)
    assert restored(snapshots, tokens[: BLOCK + 2]) == tokens[: BLOCK + 2]


def test_ten_with_one_beginning_take_little_more_than_one(tmp_path: Path) -> None:
    def size(folder: Path, n: int) -> int:
        snapshots = Snapshots(folder, "a model", MANY)
        for number in range(n):
            keep(snapshots, [*range(1500), *([9000 + number] * 50)])
        return sum(file.stat().st_size - HEADER.size for file in files(folder))

    assert size(tmp_path / "ten", 10) <= 1.5 * size(tmp_path / "one", 1)


def test_what_goes_with_another_model_or_setting_is_not_found(tmp_path: Path, snapshots: Snapshots) -> None:
    tokens = list(range(100))
    keep(snapshots, tokens)
    assert Snapshots(tmp_path / "kv", "another", MANY).find(tokens).length == 0
    (block,) = snapshots.find(tokens).blocks
    assert Snapshots(tmp_path / "kv", "another", MANY).read(block) is None


@pytest.mark.parametrize("damage", ["cut", "longer", "a bit", "empty", "gone", "head", "tokens"])
def test_a_damaged_block_is_none(snapshots: Snapshots, damage: str) -> None:
    tokens = list(range(200))
    keep(snapshots, tokens)
    (block,) = snapshots.find(tokens).blocks
    data = bytearray(block.path.read_bytes())
    match damage:
        case "cut":
            del data[-1:]
        case "longer":
            data += b"x"
        case "a bit":
            data[-5] ^= 1
        case "empty":
            data.clear()
        case "head":
            data[HEADER.size - 9] ^= 1
        case "tokens":
            data[HEADER.size + 4] ^= 1
    block.path.write_bytes(data)
    if damage == "gone":
        block.path.unlink()
    assert snapshots.read(block) is None


@given(st.binary(min_size=1, max_size=9000), st.integers(0), st.integers(1, 255))
def test_a_changed_byte_changes_the_checksum(data: bytes, at: int, change: int) -> None:
    changed = bytearray(data)
    changed[at % len(data)] ^= change
    before, after = (checksum(np.frombuffer(each, np.uint8)) for each in (data, bytes(changed)))
    assert before != after


def test_pages_that_change_places_change_the_checksum() -> None:
    pages = np.random.default_rng(1).integers(0, 255, (2, 4096), np.uint8)
    assert checksum(pages.ravel()) != checksum(pages[::-1].ravel())


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "kv", "a model", 3000)
    for number in range(5):
        keep(snapshots, [number] * BLOCK)
        for file in files(tmp_path / "kv"):
            os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**9))
    assert snapshots.read(snapshots.find([0] * BLOCK).blocks[0]) is not None  # it is used
    snapshots.evict()
    there = [number for number in range(5) if snapshots.find([number] * BLOCK).length]
    assert there == [0, 4]
    assert sum(file.stat().st_size for file in files(tmp_path / "kv")) <= 3000


def test_files_are_private_and_whole(tmp_path: Path, snapshots: Snapshots) -> None:
    before = os.umask(0)
    try:
        keep(snapshots, list(range(600)))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in files(tmp_path / "kv")} == {0o600}
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert all(file.suffix == ".kv" for file in files(tmp_path / "kv"))


def test_nothing_is_left_of_what_could_not_be_written(
    tmp_path: Path, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        keep(snapshots, list(range(100)))
    assert files(tmp_path / "kv") == []


def test_a_folder_that_is_not_there_or_holds_other_things_is_no_error(tmp_path: Path) -> None:
    tokens = list(range(100))
    snapshots = Snapshots(tmp_path / "kv", "a model", 0)
    assert snapshots.find(tokens).length == 0
    snapshots.evict()
    keep(snapshots, tokens)
    (block,) = files(tmp_path / "kv")
    for name in ("x", "-1-.kv", f"{block.name.split('-')[0]}-9²-1.kv", "a-b.kv"):
        (tmp_path / "kv" / name).write_bytes(b"?" * 100)
    assert restored(snapshots, tokens) == tokens


def test_what_is_forgotten_goes_but_for_what_others_go_on_from(tmp_path: Path, snapshots: Snapshots) -> None:
    common = list(range(400))
    one, two = [*common, *[7001] * 300], [*common, *[7002] * 300]
    for tokens in (one, two):
        keep(snapshots, tokens)
    forget(tmp_path / "kv", [snapshots.name(one)])
    assert restored(snapshots, two) == two
    assert len(restored(snapshots, one)) == 512  # the block that the other branches off from is whole
    forget(tmp_path / "kv", ["nothing", snapshots.name(two)])
    assert files(tmp_path / "kv") == []
    forget(tmp_path / "none", [snapshots.name(two)])
