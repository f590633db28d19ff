"""What one rank can do on the machine at hand: measured in a few seconds by as many processes as a node has ranks.

Ranks share memory, caches and clock, so all are measured at once. Each process prints ``ready``, waits for a line, and
prints what it measured. The figures are kept in the user's cache for the next plan of the same shape.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpmpi.comm.control_groups import node_cpus, node_memory_bytes
from cpmpi.comm.device import private_bytes, resident_set_bytes
from cpmpi.comm.ranks import node_name
from cpmpi.cost.hardware import Hardware
from cpmpi.errors import UserError
from cpmpi.user_cache import cache_folder, keep, kept
from cpmpi.version import __version__

DISK_BYTES = 64 << 20
PRODUCTS_S = 0.3  # for products
MOST_SIDE = 4096  # of the matrix in them: larger ones are as fast, and take seconds and gigabytes
LIMIT_S = 120.0  # for a process that measures, its imports included
FIGURES = (
    "attention_flops", "matmul_flops", "memory_gb_per_s", "merge_gb_per_s", "call_s", "program_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank computes, as far as its rates depend on it.

    Attributes:
        query_heads, kv_heads, key_dim, value_dim: of a layer.
        block: queries and keys of a kernel call.
        hidden, inner: numbers of a token's state, and of its widest state within a layer.
        chunk_tokens: tokens that go through a layer at a time.
        dtype: to compute in.
    """

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block: tuple[int, int]
    hidden: int
    inner: int
    chunk_tokens: int
    dtype: str


def hardware_here(work: Work, ranks: int | None, folder: Path) -> tuple[Hardware, str]:
    """This machine as one of ``ranks`` ranks of a node has it, and words that say when it was measured.

    Args:
        work: what a rank computes.
        ranks: of a node; None: one for each GPU, or one.
        folder: where the disk is measured.

    Raises:
        UserError: measuring fails.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    each = ranks or max(1, gpus)
    cores = len(os.sched_getaffinity(0))
    key = {
        **asdict(work), "node": node_name(), "processor": _processor(), "cores": cores, "gpus": gpus, "ranks": each,
        "torch": torch.__version__, "cpmpi": __version__, "folder": str(folder.absolute()),
    }  # fmt: skip
    cache = cache_folder()
    file = None if cache is None else cache / f"hardware-{_digest(key)}.json"
    found = _remembered(file, key)
    if found is None:
        threads = max(1, node_cpus(cores) // each)
        figures = _measured(work, 1 if gpus else each, threads, "cuda" if gpus else "cpu")
        found = {**key, **figures, "disk_gb_per_s": _disk_gb_per_s(folder), "date": time.strftime("%Y-%m-%d %H:%M")}
        when = f"measured now{_remember(file, found)}"
    else:
        when = f"measured {found['date']} ({file}; without that file it is measured again)"
    if not gpus:  # what measures has no model; this process has
        found["program_bytes"] = max(found["program_bytes"], float(resident_set_bytes()))
    memory = node_memory_bytes(held=private_bytes()) / each
    if gpus:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    return (
        Hardware(
            name=f"{key['node']}, {found['processor']}", source=when, machine="dgx-h100" if gpus else "cpu-2s",
            device="cuda" if gpus else "cpu", memory_bytes=memory, disk_gb_per_s=found["disk_gb_per_s"],
            **{name: found[name] for name in FIGURES},
        ),
        when,
    )  # fmt: skip


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _remembered(file: Path | None, key: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured for ``key``; None where the file is not there or says anything else."""
    found: Any = kept(file) if file is not None else None
    try:
        same = all(found[name] == value for name, value in json.loads(json.dumps(key)).items())
        known = all(isinstance(found[name], float | int) and found[name] >= 0 for name in (*FIGURES, "disk_gb_per_s"))
        return found if same and known and isinstance(found["date"], str) else None
    except (KeyError, TypeError):
        return None


def _remember(file: Path | None, found: dict[str, Any]) -> str:
    """Keep it for the next plan; nothing, or why that failed."""
    problem = keep(file, found) if file is not None else "there is no home folder"
    return f", not remembered ({problem})" if problem else ""


def _measured(work: Work, processes: int, threads: int, device: str) -> dict[str, float]:
    """The medians of the figures over processes that all measure at once."""
    line = [sys.executable, "-m", "cpmpi.cost.here", json.dumps(asdict(work)), str(threads), device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(processes)
    ]
    try:
        for one in started:
            assert one.stdout is not None
            if one.stdout.readline() != "ready\n":
                raise UserError("--hardware here: a process that measures this machine ended before its time")
        answers = [json.loads(_answer(one)) for one in _told_to_go(started)]
    finally:
        for one in started:
            one.kill()
            one.wait()
    return {name: statistics.median(answer[name] for answer in answers) for name in FIGURES}


def _told_to_go(started: Sequence[subprocess.Popen[str]]) -> Sequence[subprocess.Popen[str]]:
    for one in started:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    return started


def _answer(one: subprocess.Popen[str]) -> str:
    try:
        out, _ = one.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"--hardware here: measuring this machine took more than {LIMIT_S:g} s") from None
    if one.returncode:
        raise UserError(f"--hardware here: a process that measures this machine failed (exit status {one.returncode})")
    return out


def _disk_gb_per_s(folder: Path) -> float:
    """GB/s of writing to the file system of ``folder`` until it is on the disk."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            for _ in range(DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return DISK_BYTES / (time.perf_counter() - begun) / 1e9
    except OSError as problem:
        raise UserError(f"--hardware here: {folder} cannot be written to, to measure its disk: {problem}") from problem


def measure_rank(work: Work, device_type: str) -> dict[str, float]:
    """The figures of one rank: its kernel's rates, its products' rate, and what the program takes."""
    import torch

    from cpmpi.attention.execute import Heads
    from cpmpi.cost.measure import mean_seconds, measure
    from cpmpi.kernels.select import select
    from cpmpi.model.checkpoint import DTYPES

    device, dtype = torch.device(device_type), DTYPES[work.dtype]
    heads = Heads(
        query_heads=work.query_heads, kv_heads=work.kv_heads, key_dim=work.key_dim, value_dim=work.value_dim,
        dtype=dtype,
    )  # fmt: skip
    rates = measure(select(device, dtype, head_dim=work.key_dim), heads, device, lambda: None, work.block)
    hidden, inner = min(work.hidden, MOST_SIDE), min(work.inner, MOST_SIDE)
    x_CW = torch.randn(work.chunk_tokens, hidden, device=device).to(dtype)
    w_WI = torch.randn(inner, hidden, device=device).to(dtype).T
    seconds = mean_seconds(lambda: x_CW @ w_WI, device, PRODUCTS_S)
    return {
        "attention_flops": rates.attention_flops,
        "matmul_flops": 2.0 * work.chunk_tokens * hidden * inner / seconds,
        "memory_gb_per_s": rates.memory_gb_per_s,
        "merge_gb_per_s": rates.merge_gb_per_s or rates.memory_gb_per_s / 3,
        "call_s": rates.call_s,
        "program_bytes": float(resident_set_bytes() if device_type == "cpu" else 0),
    }


def main(words: Sequence[str]) -> None:
    """One of the processes that measure: work as JSON, threads, device."""
    import torch
    import transformers  # noqa: F401  # a rank has it in memory

    told = json.loads(words[0])
    work = Work(**{**told, "block": tuple(told["block"])})
    torch.set_num_threads(int(words[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(measure_rank(work, words[2])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
