"""The picture of a comparison: the two runs, and their difference, by position; and the difference of each document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpmpi.run.comparison import Comparison, Named
from cpmpi.run.paired import LEVEL
from cpmpi.run.surprisal import drawable, require_matplotlib
from cpmpi.text import escaped, shown

COLOURS = {-1: "#2b6ca3", 0: "#8a8a8a", 1: "#d1495b"}
MEANINGS = {-1: "B less surprised", 0: "not told apart", 1: "B more surprised"}
NAME_WIDTH, ID_WIDTH = 60, 24
MOST_NAMED = 30  # documents whose names can be read beside the picture


def draw_comparison(found: Comparison, path: Path, names: tuple[str, str]) -> None:
    """Draw it to an image file; its ending says which kind.

    Args:
        found: the comparison.
        path: of the file.
        names: of the runs A and B.

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = require_matplotlib()
    panels = 3 if len(found.documents) > 1 else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.6), layout="constrained")
    titles = [f"{which}: {shown(name, NAME_WIDTH)}" for which, name in zip("AB", names, strict=True)]
    both = [drawable(escaped(title)) for title in titles]
    _levels(axes[0], found.positions, [text for text, _ in both], [family for _, family in both])
    _bars(axes[1], found.positions, [_position(one) for one in found.positions])
    for one in axes[:2]:
        one.set_xscale("log", base=2)
    axes[1].set(xlabel="position (tokens before)", ylabel="difference B - A (nats a token)")
    if panels == 3:
        ordered = sorted(found.documents, key=lambda one: one.change.difference)
        _bars(axes[2], ordered, list(range(len(ordered))))
        axes[2].set(xlabel="documents, by difference", ylabel="difference B - A (nats a token)", xticks=[])
        if len(ordered) <= MOST_NAMED:
            ids = [drawable(shown(one.document, ID_WIDTH)) for one in ordered]
            axes[2].set_xticks(range(len(ordered)), [text for text, _ in ids], rotation=90, fontsize=7)
            for label, (_, families) in zip(axes[2].get_xticklabels(), ids, strict=True):
                label.set(fontfamily=families, parse_math=False)
    change = found.corpus.change
    axes[1].set_title(
        f"all: {change.difference:+.4f} nats a token, bars: {LEVEL:.0%} intervals", fontsize=9, loc="left"
    )
    for one in axes:
        one.grid(axis="y", color="#e6e6e6")
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _levels(axes: Any, bins: Sequence[Named], titles: Sequence[str], families: Sequence[list[str]]) -> None:
    """Both runs' mean by position."""
    at = [_position(one) for one in bins]
    axes.plot(at, [one.change.nll_a for one in bins], marker="o", markersize=3, color="#8a8a8a", label="A")
    axes.plot(at, [one.change.nll_b for one in bins], marker="o", markersize=3, color="#2b6ca3", label="B")
    axes.set(xlabel="position (tokens before)", ylabel="mean nll (nats a token)")
    axes.legend(frameon=False, fontsize=9)
    for line, (title, family) in enumerate(zip(titles, families, strict=True)):
        axes.text(
            0, 1.09 - 0.06 * line, title, transform=axes.transAxes, fontsize=9, fontfamily=family, parse_math=False
        )  # fmt: skip


def _bars(axes: Any, found: Sequence[Named], at: Sequence[float]) -> None:
    """Differences with their intervals, coloured by what these tell."""
    axes.axhline(0, color="#444444", linewidth=0.8)
    for sign, colour in COLOURS.items():
        chosen = [(x, one.change) for x, one in zip(at, found, strict=True) if one.change.sign == sign]
        if not chosen:
            continue
        y = np.array([change.difference for _, change in chosen])
        bounds = np.array([change.interval for _, change in chosen])
        ends = np.nan_to_num(np.maximum(0, [y - bounds[:, 0], bounds[:, 1] - y]))
        axes.errorbar(
            [x for x, _ in chosen], y, yerr=ends, fmt="o", markersize=3.5, color=colour, elinewidth=1.2,
            label=MEANINGS[sign],
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="best")


def _position(one: Named) -> float:
    """The middle of a bin on a logarithmic axis."""
    return float(np.sqrt(max(1, one.start) * max(1, one.stop - 1)))
