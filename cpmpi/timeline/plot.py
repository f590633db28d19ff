"""Draw a timeline: a row for each rank, its computing above, what arrives below; predicted and measured look alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpmpi.timeline.intervals import Interval, waiting_share
from cpmpi.topology.plot import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, PAPER, STRIPE = "#1e293b", "#64748b", "#ffffff", "#f8fafc"
COLOURS = {
    "layers": "#bfdbfe", "compute": "#2563eb", "merge": "#7c3aed", "wait": "#fdba74", "transfer": "#14b8a6",
    "io": "#a3a3a3",
}  # fmt: skip
WORDS = {
    "layers": "computes the rest of a layer", "compute": "attends", "merge": "merges partials",
    "wait": "waits (exposed)", "transfer": "a message arrives", "io": "writes keys and values",
}  # fmt: skip
# Of a row: bottom and height of each kind's bar. Rows are one unit apart, rank 0 on top.
BARS = {
    "layers": (-0.1, 0.5), "compute": (-0.1, 0.5), "merge": (-0.1, 0.5), "wait": (-0.1, 0.5),
    "transfer": (-0.33, 0.2), "io": (-0.45, 0.1),
}  # fmt: skip
MOST_RANKS = 32


def draw_timeline(intervals: Iterable[Interval], path: str | Path, *, title: str) -> None:
    """Write a picture (PNG, SVG or PDF by the name of the file) of up to ``MOST_RANKS`` evenly spread ranks.

    Raises:
        ValueError: matplotlib is not installed, the file name ends in no known format, or there is nothing to draw.
    """
    require_matplotlib(path)
    from matplotlib.figure import Figure

    known = list(intervals)
    if not known:
        raise ValueError("a timeline without intervals cannot be drawn")
    figure = Figure(figsize=(11, 1.5 + 0.42 * min(MOST_RANKS, len({i.rank for i in known}))), facecolor=PAPER)
    axes = figure.add_subplot()
    draw_on(axes, known, title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=160, facecolor=PAPER)


def draw_on(
    axes: Axes, intervals: Sequence[Interval], *, title: str, until_s: float | None = None, legend: bool = True
) -> None:
    """Draw into given axes; ``until_s`` is where the time axis ends, so that several timelines compare."""
    from matplotlib.patches import Patch

    ranks = sorted({interval.rank for interval in intervals})
    shown = [ranks[i * len(ranks) // MOST_RANKS] for i in range(MOST_RANKS)] if len(ranks) > MOST_RANKS else ranks
    row = {rank: -place for place, rank in enumerate(shown)}
    end_s = max(interval.stop_s for interval in intervals)
    until_s = until_s or end_s
    scale, unit = next((f, u) for limit, f, u in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (1e99, 1, "s")) if until_s < limit)
    for place, y in enumerate(row.values()):
        if place % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color=STRIPE, zorder=0)
    kinds = [kind for kind in BARS if any(interval.what == kind for interval in intervals)]
    for kind in kinds:
        bottom, height = BARS[kind]
        for rank, y in row.items():
            spans = [(i.start_s * scale, i.seconds * scale) for i in intervals if i.rank == rank and i.what == kind]
            edge = PAPER if kind in ("compute", "transfer") and len(spans) <= 64 else "none"
            axes.broken_barh(
                spans, (y + bottom, height), facecolors=COLOURS[kind], edgecolors=edge, linewidth=0.5, zorder=3,
                alpha=0.85 if kind == "transfer" else 1.0,
            )  # fmt: skip
    axes.axvline(end_s * scale, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=4)
    axes.set_xlim(0, until_s * scale * 1.01)
    axes.set_ylim(-len(shown) + 0.45, 0.55)
    names = [f"rank {rank}" for rank in shown] if len(shown) <= 16 else [f"{rank}" for rank in shown]
    axes.set_yticks(list(row.values()), names, fontsize=8, color=INK)
    axes.tick_params(axis="both", length=0, labelsize=8, colors=SOFT)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}" if value else "0")
    axes.grid(axis="x", color="#e2e8f0", linewidth=0.6, zorder=1)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold", pad=8)
    facts = f"{end_s * scale:.3g} {unit}, {waiting_share(intervals):.0%} of the ranks' time spent waiting"
    axes.set_title(facts, fontsize=8.5, color=SOFT, loc="right", pad=8)
    if legend:
        handles = [Patch(color=COLOURS[kind], label=WORDS[kind]) for kind in kinds]
        axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, -0.02 - 0.5 / (len(shown) + 1)), ncols=len(kinds),
            frameon=False, fontsize=8, labelcolor=INK, handlelength=1.2, columnspacing=1.6,
        )  # fmt: skip
