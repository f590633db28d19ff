"""What the ranks of this node can have of it: within the control groups (of Slurm, of a container) that they are in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def node_memory_bytes(held: int = 0) -> int:
    """Memory for all ranks on this node together, the page cache that can be given up included.

    Args:
        held: bytes that they have already; what is available comes on top, but a control group's limit is of both.
    """
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None, "/proc/meminfo: no MemAvailable"
    return min([int(found[1]) * 1024 + held, *memory_limits(_own_groups())])


def node_cpus(most: int) -> int:
    """Processors' worth of time for all ranks on this node together, at least 1 and at most ``most``."""
    return max(1, int(min([most, *cpu_limits(_own_groups())])))


def memory_limits(groups: str, root: Path = CONTROL_GROUPS) -> list[int]:
    """The memory limits, in bytes, of the control groups (version 1 or 2) that a process is in, and of those around.

    Args:
        groups: what /proc/PID/cgroup says of the process.
        root: where control groups are mounted.
    """
    texts = [(group / name).read_text() for group, name in _around(groups, root, "memory", "limit_in_bytes")]
    return [int(text) for text in texts if text.strip().isdigit()]


def cpu_limits(groups: str, root: Path = CONTROL_GROUPS) -> list[float]:
    """The limits on processor time, in processors; see `memory_limits`."""
    found = []
    for group, name in _around(groups, root, "cpu", "cfs_quota_us"):
        quota, *period = (group / name).read_text().split()
        period = period or (group / "cpu.cfs_period_us").read_text().split()
        if quota.isdigit():
            found.append(int(quota) / int(period[0]))
    return found


def _own_groups() -> str:
    return Path("/proc/self/cgroup").read_text()


def _around(groups: str, root: Path, controller: str, first_version: str) -> Iterator[tuple[Path, str]]:
    """The control groups around a process, inside out, that have a limit, and the name of the file with it."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder, name = root / controller, f"{controller}.{first_version}"
        elif not controllers:
            folder, name = root, f"{controller}.max"
        else:
            continue
        group = folder / path.lstrip("/")
        for around in (group, *group.parents):
            if around.is_relative_to(folder) and (around / name).is_file():
                yield around, name
