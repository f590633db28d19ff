"""Draw docs/img/measured.png: a ring and a hybrid on the emulated cluster, measured beside predicted.

python docs/make_measured_timeline.py    (root on Linux, as for `make cluster-test`)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SHAPE = {"new": 2048, "stored": 2048, "query_heads": 8, "kv_heads": 8, "key_dim": 64, "value_dim": 64}
TARGET = Path(__file__).resolve().parent / "img" / "measured.png"


def measure(leaf_file: str) -> None:
    """Measure and draw on the ranks of this launch."""
    from matplotlib.figure import Figure
    from mpi4py import MPI

    from cpmpi.comm.carrier import Carrier
    from cpmpi.cost.attention_bench import AttentionBench
    from cpmpi.cost.choose import schedule_on
    from cpmpi.cost.price import price
    from cpmpi.cost.shape import AttentionShape
    from cpmpi.kernels.select import select
    from cpmpi.timeline.plot import PAPER, draw_on
    from cpmpi.topology.discover import discover

    torch.set_num_threads(1)
    device, shape = torch.device("cpu"), AttentionShape(**SHAPE, itemsize=4)
    topology = discover(MPI.COMM_WORLD, leaf_file=leaf_file)
    bench = AttentionBench(MPI.COMM_WORLD, topology, select(device, torch.float32, head_dim=64), Carrier(device=device))
    rates = bench.rates(shape, torch.float32)
    panels = []
    for kind in ("ring", "hybrid"):
        schedule = schedule_on(kind, topology)
        panels.append((f"{kind}, predicted", price(schedule, topology, shape, rates).intervals))
        panels.append((f"{kind}, measured", bench.run(schedule, shape, torch.float32, alone=False).intervals))
    bench.close()
    if MPI.COMM_WORLD.rank == 0:
        figure = Figure(figsize=(11, 11), facecolor=PAPER)
        until_s = max(i.stop_s for _, intervals in panels for i in intervals)
        for place, (title, intervals) in enumerate(panels, start=1):
            axes = figure.add_subplot(len(panels), 1, place)
            draw_on(axes, intervals, title=title, until_s=until_s, legend=place == len(panels))
        figure.tight_layout(h_pad=1.2)
        figure.savefig(TARGET, dpi=100, facecolor=PAPER)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        sys.path.insert(0, str(TARGET.parent.parent.parent))
        from tests.cluster.emulated import running

        with running() as cluster:
            print(cluster.mpirun(__file__, str(cluster.leaf_file), timeout_s=120))
