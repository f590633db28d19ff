"""Cases in which moving takes longer than computing: measured, predicted, and how much of the computing hides.

    mpirun -n 8 python -m mpi4py -m benchmarks.transfers [--leaf-file FILE] [--json FILE] [--repeat N]

Made for links of 200 Mbit/s between leaves: there every case below waits for its messages. Prints a line per case;
``docs/schedules.md`` holds such a table from the emulated cluster.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.schedules import DTYPE, report, shape_of
from cpmpi.cost.attention_bench import AttentionBench, Measured
from cpmpi.cost.choose import schedule_on
from cpmpi.cost.price import price
from cpmpi.text import seconds_text, table

# Schedule, new tokens, stored tokens, KV heads.
CASES = (
    ("ring", 32, 8192, 8), ("ring", 32, 16384, 8), ("ring", 512, 16384, 8), ("ring", 2048, 0, 8),
    ("ring", 32, 65536, 1),
    ("hybrid", 1024, 0, 8), ("hybrid", 2048, 0, 8), ("hybrid", 2048, 2048, 1),
    ("tree", 1024, 0, 8), ("tree", 2048, 0, 8), ("tree", 2048, 2048, 1),
)  # fmt: skip


def measure(bench: AttentionBench, repeat: int) -> list[dict[str, Any]]:
    """What was measured and predicted of each case. Collective."""
    rows = []
    for kind, new, stored, kv_heads in CASES:
        shape = shape_of(new, stored, kv_heads)
        rates = bench.comm.bcast(bench.rates(shape, DTYPE))
        schedule = schedule_on(kind, bench.topology)
        measured = bench.run(schedule, shape, DTYPE, repeat)
        predicted = price(schedule, bench.topology, shape, rates)
        rows.append(
            {"kind": kind, "new": new, "stored": stored, "kv_heads": kv_heads, "predicted": predicted.total_s,
             "computes": predicted.compute_s, "measured": {**asdict(measured), "intervals": ()}, "rates": asdict(rates)}
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        m = Measured(**row["measured"])
        times = (m.seconds, min(m.total_s), max(m.total_s), row["predicted"])
        lines.append(
            (row["kind"], f"{row['new']:,}", f"{row['stored']:,}", f"8:{row['kv_heads']}", *map(seconds_text, times),
             f"{row['predicted'] / m.seconds:.2f}", seconds_text(m.move), seconds_text(m.compute))
        )  # fmt: skip
    header = (
        "schedule", "new", "stored", "heads", "median", "least", "most", "predicted", "predicted / median", "move",
        "compute",
    )  # fmt: skip
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaf-file", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    report(lambda bench: measure(bench, options.repeat), show, options.leaf_file, options.json)


if __name__ == "__main__":
    main()
