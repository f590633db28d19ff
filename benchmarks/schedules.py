"""Every schedule on this launch over 30 shapes: measured, predicted, and what ``auto`` would have taken.

    mpirun -n 8 python -m mpi4py -m benchmarks.schedules [--leaf-file FILE] [--json FILE] [--kv-heads N] [--shapes N]

Prefill of 1,024 to 4,096 tokens, and extension by 1 to 4,096 tokens after 1,024 to 65,536, with 8 query heads and 8 or
1 KV heads. Prints a line per shape; ``docs/schedules.md`` holds such a table from the emulated cluster.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from cpmpi.comm.carrier import Carrier
from cpmpi.cost.attention_bench import AttentionBench
from cpmpi.cost.choose import candidates, choose
from cpmpi.cost.price import price
from cpmpi.cost.shape import AttentionShape
from cpmpi.kernels.select import select
from cpmpi.text import seconds_text, table
from cpmpi.topology.discover import discover

TOKENS = [(new, 0) for new in (1024, 2048, 4096)] + list(product((1, 32, 512, 4096), (1024, 8192, 65536)))
SHAPES = [(new, stored, kv) for new, stored in TOKENS for kv in (8, 1)]
QUERY_HEADS, HEAD_DIM = 8, 64
DTYPE = torch.float32


def shape_of(new: int, stored: int, kv_heads: int) -> AttentionShape:
    """One of ``SHAPES``."""
    return AttentionShape(
        new=new, stored=stored, query_heads=QUERY_HEADS, kv_heads=kv_heads, key_dim=HEAD_DIM, value_dim=HEAD_DIM,
        itemsize=DTYPE.itemsize,
    )  # fmt: skip


def measure(bench: AttentionBench, shapes: list[tuple[int, int, int]], repeat: int) -> list[dict[str, Any]]:
    """For each shape the choice, and measured and predicted seconds by schedule. Collective."""
    rows = []
    for new, stored, kv_heads in shapes:
        shape = shape_of(new, stored, kv_heads)
        rates = bench.comm.bcast(bench.rates(shape, DTYPE))
        choice = choose(bench.topology, shape, rates)
        row: dict[str, Any] = {"new": new, "stored": stored, "kv_heads": kv_heads, "auto": choice.schedule.kind}
        schedules = candidates(bench.topology, shape.asking(bench.topology.world))
        row["predicted"] = {s.kind: price(s, bench.topology, shape, rates).total_s for s in schedules}
        row["measured"] = bench.race(schedules, shape, DTYPE, repeat)
        row["rates"] = asdict(rates)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: median seconds, those predicted, and how far ``auto`` is from the best."""
    lines = []
    for row in rows:
        medians = {kind: statistics.median(times) for kind, times in row["measured"].items()}
        ratio = medians[row["auto"]] / min(medians.values())
        cells = [f"{seconds_text(s)} ({seconds_text(row['predicted'][kind])})" for kind, s in medians.items()]
        lines.append(
            (f"{row['new']:,}", f"{row['stored']:,}", f"8:{row['kv_heads']}", *cells, row["auto"], f"{ratio:.2f}")
        )
    kinds = list(rows[0]["measured"])
    header = ("new", "stored", "heads", *(f"{kind} (predicted)" for kind in kinds), "auto", "auto / best")
    return table(header, lines)


def report(
    measured: Callable[[AttentionBench], list[dict[str, Any]]], shown: Callable[[list[dict[str, Any]]], str],
    leaf_file: Path | None, file: Path | None,
) -> None:  # fmt: skip
    """Measure on this launch, one thread a rank; rank 0 prints the rows and writes them to ``file``, if any."""
    comm, device = MPI.COMM_WORLD, torch.device("cpu")
    torch.set_num_threads(1)
    topology = discover(comm, leaf_file=leaf_file)
    bench = AttentionBench(comm, topology, select(device, DTYPE, head_dim=HEAD_DIM), Carrier(device=device))
    rows = measured(bench)
    bench.close()
    if comm.rank == 0:
        print(shown(rows))
        if file is not None:
            file.write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaf-file", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="measure every so many-th part of them only")
    parser.add_argument("--kv-heads", type=int, choices=(8, 1), help="only shapes with so many KV heads")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    known = [shape for shape in SHAPES if options.kv_heads in (None, shape[2])]
    picked = known[:: max(1, len(known) // options.shapes)]
    report(lambda bench: measure(bench, picked, options.repeat), show, options.leaf_file, options.json)


if __name__ == "__main__":
    main()
