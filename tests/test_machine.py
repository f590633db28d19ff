"""This rank's share of its node: threads, and memory within the limits of control groups."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpmpi.comm.control_groups import CONTROL_GROUPS, cpu_limits, memory_limits
from cpmpi.comm.device import choose_device, private_bytes, resident_set_bytes, room_of, set_threads
from cpmpi.comm.ranks import start
from cpmpi.errors import UserError

GB = 10**9
V1 = "9:name=systemd:/\n4:cpu,memory:/slurm/job_7/step_0\n0::/\n"
V2 = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"


@pytest.mark.parametrize(
    ("groups", "limits"),
    [
        (V1, {"memory/slurm/job_7/memory.limit_in_bytes": "8000000000", "memory/memory.limit_in_bytes": "99" * 9}),
        (V2, {"system.slice/slurmstepd.scope/job_7/memory.max": "8000000000", "system.slice/memory.max": "max"}),
    ],
)
def test_the_least_limit_of_the_groups_around_holds(groups, limits, tmp_path):
    for name, limit in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    (tmp_path / "memory.max").write_text("1\n")  # not a control group's
    assert min(memory_limits(groups, tmp_path / "cgroup")) == 8 * GB
    assert memory_limits("0::/\n", tmp_path / "nowhere") == []


def test_a_real_control_group(tmp_path):
    folder = next((f for f in (CONTROL_GROUPS / "memory", CONTROL_GROUPS) if (f / "cgroup.procs").exists()), None)
    if folder is None or not os.access(folder, os.W_OK):
        pytest.skip("control groups cannot be made here")
    group = folder / f"cpmpi-test-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            group.mkdir()
            stack.callback(group.rmdir)
            limit = "memory.limit_in_bytes" if folder.name == "memory" else "memory.max"
            (group / limit).write_text(str(1 << 30))
        except OSError as error:
            pytest.skip(f"control groups cannot be made here: {error}")
        code = "from cpmpi.comm.control_groups import node_memory_bytes; print(node_memory_bytes())"
        line = f'echo $$ > {group}/cgroup.procs && exec "$0" -c "{code}"'
        done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1 << 30


def test_limits_on_processor_time(tmp_path):
    for name, text in (("a/cpu.max", "max 100000"), ("cpu.max", "250000 100000"), ("cpu/b/cpu.cfs_quota_us", "150000")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "cpu/b/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_limits("0::/a\n", tmp_path) == [2.5]
    assert cpu_limits("4:cpu,cpuacct:/b\n", tmp_path) == [1.5]
    (tmp_path / "cpu/b/cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_limits("4:cpu,cpuacct:/b\n", tmp_path) == []


@pytest.mark.mpi(2)
def test_ranks_share_the_cores_and_the_memory(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ranks, cpu = start(), torch.device("cpu")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    assert set_threads(ranks) == len(cores) // 2
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(re.search(r"MemFree:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    before, held = room_of(ranks, cpu), private_bytes()
    assert free / 2 < before.bytes <= total / 2 or memory_limits(Path("/proc/self/cgroup").read_text())
    assert before.host_bytes is None
    assert held < before.program_bytes <= resident_set_bytes()
    monkeypatch.setattr("cpmpi.comm.device.node_memory_bytes", lambda held: held)
    taken = bytearray(1 << 28)  # what a rank takes is in what it can have as before: it is counted once
    taken[:: 1 << 12] = b"x" * len(taken[:: 1 << 12])
    mean, each = room_of(ranks, cpu).bytes, ranks.comm.allgather(held)  # of ranks that hold unlike amounts
    assert abs(mean - (sum(each) // len(each) + (1 << 28))) < 1 << 26, (mean, each)
    ranks.comm.Barrier()
    del taken
    try:
        os.sched_setaffinity(0, cores[ranks.rank :: 2])
        assert set_threads(ranks) == len(cores[ranks.rank :: 2])
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.mpi(2)
def test_ranks_agree_on_the_device(monkeypatch):
    """One rank sees a device and the other does not: no rank waits for one that has gone on."""
    ranks = start()
    monkeypatch.setattr("torch.cuda.is_available", lambda: ranks.rank == 0)
    for wanted, choices in (("auto", "cpu"), ("cuda", "cpu or auto")):
        with pytest.raises(
            UserError, match=rf"--device {wanted}: torch finds no CUDA device on \S+; choose {choices}$"
        ):
            ranks.together(choose_device, ranks, wanted)
    assert ranks.together(choose_device, ranks, "cpu").type == "cpu"


def test_what_this_machine_says():
    assert all(limit > 0 for limit in memory_limits(Path("/proc/self/cgroup").read_text()))
