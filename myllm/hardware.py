"""What this machine can give: physical cores, available memory, BF16; as this process may use them.

A leaf. Knows CPU affinity and control groups, so that a container gets its share and not the
host's. Linux reads /proc and /sys; macOS asks `sysctl`. Must not know models or engines.

`root` is where the file system starts: tests give a made tree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
UNLIMITED: Final = 1 << 60
"""Control groups write "no limit" as `max` (v2) or as a number near 2^63 (v1)."""


def physical_cores(root: Path = ROOT) -> int:
    """Cores to compute on, at least 1: hyper-threads count once, efficiency cores not at all.

    llama.cpp's threads wait for each other at barriers, so a thread on half a core, or past the
    control group's quota, slows all of them. Within affinity and quota (rounded down).
    """
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    cores = len({_core_of(cpu, root) for cpu in _compute_cpus(root)})
    quota = min(_cpu_quotas(root), default=float(cores))
    return max(1, min(cores, int(quota)))


def multiplies_bf16(root: Path = ROOT) -> bool:
    """Whether the processor multiplies BF16, and llama.cpp lets it (x86: AVX512_BF16)."""
    cpuinfo = _read(root / "proc/cpuinfo")
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split()


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be taken without swapping: MemAvailable, less where a control group allows less.

    On macOS, the whole memory: what is free there says little, for caches fill it.
    """
    if sys.platform == "darwin":
        return _sysctl("hw.memsize") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _meminfo(root).get("MemAvailable", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min([free, *_group_headroom(root)]))


# ── cores ───────────────────────────────────────────────────────────────────────────────────


def _compute_cpus(root: Path) -> set[int]:
    """Logical CPUs of this process; on a hybrid processor the performance cores among them."""
    allowed = os.sched_getaffinity(0)  # type: ignore[attr-defined,unused-ignore]  # not on macOS
    performance = _cpu_list(_read(root / "sys/devices/cpu_core/cpus"))
    return allowed & performance or allowed


def _core_of(cpu: int, root: Path) -> str:
    """The CPUs sharing one core, as the kernel lists them: equal text, same core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(cpu)


def _cpu_list(text: str) -> set[int]:
    """`0-3,8` as a set (Linux's cpulist format); empty where it is anything else."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        if not (low.isdigit() and (high or low).isdigit()):
            return set()
        cpus.update(range(int(low), int(high or low) + 1))
    return cpus


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _groups("cpu", root):
        quota, _, period = _read(group / "cpu.max").partition(" ")  # v2: "150000 100000" or "max 100000"
        quota, period = (
            quota or _read(group / "cpu.cfs_quota_us"),
            period or _read(group / "cpu.cfs_period_us"),
        )
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # v1 writes -1 for none
            yield int(quota) / int(period)


# ── memory ──────────────────────────────────────────────────────────────────────────────────


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    fields = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[1].isdigit()}


def _group_headroom(root: Path) -> Iterator[int]:
    """Bytes to each limit above this process; file cache that the kernel would drop counts as free."""
    for group in _groups("memory", root):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(group / limit_name), _read(group / used_name)
            if limit.isdigit() and used.isdigit() and int(limit) < UNLIMITED:
                yield int(limit) - max(0, int(used) - _statistic(group / "memory.stat", cache_name))


def _statistic(file: Path, name: str) -> int:
    for line in _read(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


# ── reading ─────────────────────────────────────────────────────────────────────────────────


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's control group and of all above it, v2 and v1.

    In a container the path named may not exist below the mount; its ancestors still do.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _read(file: Path) -> str:
    """A small kernel file without its newline; empty where it cannot be read."""
    try:
        return file.read_text("ascii", "replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> int | None:
    import subprocess  # macOS only

    try:
        found = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return int(found.stdout) if found.stdout.strip().isdigit() else None
