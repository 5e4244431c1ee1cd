"""A process counts the cores and the memory that it may use, not those of the host."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from myllm import hardware

MIB = 2**20


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Linux with 4 cores of 2 hyper-threads each, 8 GiB available, in no control group."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for cpu in range(8):
        core = cpu % 4
        write(tmp_path, {f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list": f"{core},{core + 4}\n"})
    write(tmp_path, {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\nHuge: 0\n"})
    return tmp_path


def test_hyper_threads_of_one_core_count_once(machine: Path) -> None:
    assert hardware.physical_cores(machine) == 4


@pytest.mark.parametrize(("allowed", "cores"), [({0, 1}, 2), ({0, 4}, 1), ({3}, 1), ({1, 5, 2}, 2)])
def test_only_cores_in_the_affinity_count(
    machine: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert hardware.physical_cores(machine) == cores


def test_an_old_kernel_and_no_topology_are_read_too(machine: Path, tmp_path: Path) -> None:
    for cpu in range(8):
        file = machine / f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"
        file.rename(file.with_name("thread_siblings_list"))
    assert hardware.physical_cores(machine) == 4
    assert hardware.physical_cores(tmp_path / "nothing") == 8


@pytest.mark.parametrize(("listed", "cores"), [("0-1,4-5", 2), ("0", 1), ("nonsense", 4), ("90-99", 4)])
def test_efficiency_cores_do_not_count(machine: Path, listed: str, cores: int) -> None:
    write(machine, {"sys/devices/cpu_core/cpus": f"{listed}\n"})
    assert hardware.physical_cores(machine) == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "9900000 100000"}, 4),
        ({"proc/self/cgroup": "0::/not/mounted\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_a_control_groups_quota_limits_the_cores(machine: Path, files: dict[str, str], cores: int) -> None:
    write(machine, files)
    assert hardware.physical_cores(machine) == cores


def test_available_memory_is_what_the_kernel_says(machine: Path) -> None:
    assert hardware.available_memory(machine) == 8 * 2**30


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("0::/a/b", ("a/b/memory.max", "a/b/memory.current", "a/b/memory.stat", "inactive_file")),
        ("0::/a/b", ("a/memory.max", "a/memory.current", "a/memory.stat", "inactive_file")),
        (
            "9:memory:/x",
            (
                "memory/x/memory.limit_in_bytes",
                "memory/x/memory.usage_in_bytes",
                "memory/x/memory.stat",
                "total_inactive_file",
            ),
        ),
    ],
)
def test_a_control_group_leaves_its_limit_less_what_it_uses_and_cannot_drop(
    machine: Path, group: str, names: tuple[str, str, str, str]
) -> None:
    limit, used, statistics, cache = names
    write(
        machine,
        {
            "proc/self/cgroup": f"{group}\n",
            f"sys/fs/cgroup/{limit}": f"{512 * MIB}\n",
            f"sys/fs/cgroup/{used}": f"{300 * MIB}\n",
            f"sys/fs/cgroup/{statistics}": f"anon 1\n{cache} {100 * MIB}\n",
        },
    )
    assert hardware.available_memory(machine) == (512 - 300 + 100) * MIB


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_group_without_a_limit_takes_nothing_away(machine: Path, limit: str) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": limit,
            "sys/fs/cgroup/a/memory.current": str(300 * MIB),
        },
    )
    assert hardware.available_memory(machine) == 8 * 2**30


def test_a_group_past_its_limit_has_nothing_left(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": "1000",
            "sys/fs/cgroup/a/memory.current": "2000",
        },
    )
    assert hardware.available_memory(machine) == 0


def test_on_macos_sysctl_is_asked_for_performance_cores_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"hw.perflevel0.physicalcpu": 6, "hw.physicalcpu": 8, "hw.memsize": 16 * 2**30}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(hardware, "_sysctl", answers.get)
    assert hardware.physical_cores() == 6
    assert hardware.available_memory() == 16 * 2**30
    del answers["hw.perflevel0.physicalcpu"]
    assert hardware.physical_cores() == 8


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= hardware.physical_cores() <= (os.cpu_count() or 1)
    assert hardware.available_memory() > 16 * MIB


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx512f avx512_bf16 sha_ni", True), ("fpu avx512f", False), ("", False)]
)
def test_a_processor_that_multiplies_bf16_is_known_by_its_flags(
    machine: Path, flags: str, expected: bool
) -> None:
    write(machine, {"proc/cpuinfo": f"processor : 0\nflags\t\t: {flags}\n"})
    assert hardware.multiplies_bf16(machine) is expected
