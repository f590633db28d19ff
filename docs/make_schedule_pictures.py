"""Draw docs/img/schedules.png and extension.png: predicted timelines of every schedule on one small cluster."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from cpmpi.cost.choose import schedule_on
from cpmpi.cost.price import Price, price
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.timeline.plot import PAPER, draw_on
from cpmpi.topology.synthetic import synthetic

IMAGES = Path(__file__).resolve().parent / "img"
RATES = Rates(attention_flops=1e12, memory_gb_per_s=200)
CLUSTER = "machine=cpu-2s,nodes=4,ranks=2,leaf=2,node_gb_per_s=8,leaf_gb_per_s=1.5,spine_gb_per_s=1"
ONE_NODE = "machine=cpu-2s,nodes=1,ranks=8,node_gb_per_s=8"


def predicted(kind: str, machine: str, new: int, stored: int) -> Price:
    """One layer with 32 query and 8 KV heads of 128, in bfloat16."""
    shape = AttentionShape(new=new, stored=stored, query_heads=32, kv_heads=8, key_dim=128, value_dim=128)
    topology = synthetic(machine)
    return price(schedule_on(kind, topology), topology, shape, RATES)


def picture(name: str, new: int, stored: int, panels: list[tuple[str, str, str]], one_axis: bool) -> None:
    """Panels of (title, kind, machine) under each other, on one time axis or each on its own."""
    prices = [predicted(kind, machine, new, stored) for _, kind, machine in panels]
    until_s = max(p.total_s for p in prices) if one_axis else None
    figure = Figure(figsize=(11, 2.75 * len(panels) + 0.4), facecolor=PAPER)
    for i, ((title, _, _), p) in enumerate(zip(panels, prices, strict=True)):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        draw_on(axes, p.intervals, title=title, until_s=until_s, legend=i == len(panels) - 1)
    figure.tight_layout(h_pad=1.2)
    figure.savefig(IMAGES / f"{name}.png", dpi=140, facecolor=PAPER)


if __name__ == "__main__":
    picture(
        "schedules",
        4096,
        0,
        [
            ("ring on one node of 8 ranks", "ring", ONE_NODE),
            ("two-level ring on 4 nodes of 2 ranks", "ring", CLUSTER),
            ("hybrid on the same", "hybrid", CLUSTER),
            ("tree on the same", "tree", CLUSTER),
        ],
        one_axis=False,
    )
    kinds = ("ring", "hybrid", "tree")
    picture("extension", 256, 65536, [(f"{k}: 256 tokens after 65,536", k, CLUSTER) for k in kinds], one_axis=True)
