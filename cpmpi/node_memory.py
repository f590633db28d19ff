"""Memory that the ranks of this node can have: what is free, and what the job's control groups allow."""

from __future__ import annotations

import re
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def node_memory_bytes() -> int:
    """What all ranks on this node can have together, the page cache that can be given up included."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None, "/proc/meminfo: no MemAvailable"
    return min(int(found[1]) * 1024, *group_limits(Path("/proc/self/cgroup").read_text()))


def group_limits(groups: str, root: Path = CONTROL_GROUPS) -> list[int]:
    """The memory limits, in bytes, of the control groups (version 1 or 2) that a process is in, and of those around.

    Args:
        groups: what /proc/PID/cgroup says of the process.
        root: where control groups are mounted.
    """
    limits = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.limit_in_bytes"
        elif not controllers:
            folder, name = root, "memory.max"
        else:
            continue
        group = folder / path.lstrip("/")
        for around in (group, *group.parents):
            file = around / name
            if around.is_relative_to(folder) and file.is_file() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return limits
