"""The picture of a document: how surprising its tokens are, from its beginning to its end."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.errors import UserError
from cpmpi.run.reader import Document
from cpmpi.text import escaped, shown

POINTS = 300  # windows along the document: few enough that their means are steady
OWN_FONT = "DejaVu Sans"  # that matplotlib brings
NO_CHARACTER = "\U0010ffff"  # only in fonts that have a placeholder for everything
BOX = "\N{WHITE SQUARE}"


def windows(
    bits_T: npt.NDArray[np.float64], n: int = POINTS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Cut (T,) values into n equal runs: the middle position of each, and (3, n) their mean and quartiles."""
    n = min(n, len(bits_T))
    bounds = np.linspace(0, len(bits_T), n + 1).astype(np.int64)
    runs = [bits_T[a:b] for a, b in pairwise(bounds)]
    stats = np.array([[run.mean(), *np.quantile(run, (0.25, 0.75))] for run in runs]).T
    return (bounds[:-1] + bounds[1:]) / 2, stats


def require_matplotlib() -> Any:
    """matplotlib's pyplot, for pictures in files.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'cpmpi[plot]'") from error
    return pyplot


def drawable(text: str) -> tuple[str, list[str]]:
    """The text with what no font here has replaced by a box, and the font families that have the rest.

    matplotlib's own font has no Chinese, Japanese or Korean; other fonts are looked at only where one is needed.
    """
    from matplotlib import font_manager

    families, missing = [OWN_FONT], set(text) - _characters(font_manager.findfont(OWN_FONT))
    others = {font.name: font.fname for font in font_manager.fontManager.ttflist} if missing else {}
    for name in sorted(others):
        if missing and (found := missing & _characters(others[name])):
            families.append(name)
            missing -= found
    return "".join(BOX if c in missing else c for c in text), families


@cache
def _characters(font: str) -> frozenset[str]:
    """The characters that a font file has; none where it cannot be read or only seems to have them."""
    from matplotlib.ft2font import FT2Font

    try:
        found = frozenset(map(chr, FT2Font(font).get_charmap()))
    except (RuntimeError, OSError):
        return frozenset()
    return frozenset() if NO_CHARACTER in found else found


def draw_surprisal(document: Document, path: Path, title: str) -> None:
    """Draw surprisal (bits per token) along the document to an image file; its ending says which kind.

    Raises:
        UserError: matplotlib is not installed, or the document has fewer than two tokens.
    """
    pyplot = require_matplotlib()
    from matplotlib.ticker import EngFormatter

    first = document.first_scored
    bits_T = -document.logprobs[first:].astype(np.float64) / math.log(2)
    if not len(bits_T):
        raise UserError(f"document '{shown(document.id)}' has one token: there is no surprisal to draw")
    at, (mean, low, high) = windows(bits_T)
    at += first - 1
    running = np.cumsum(bits_T) / np.arange(1, len(bits_T) + 1)
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    axes.fill_between(at, low, high, color="#c6d9ec", linewidth=0, label="quartiles")
    axes.plot(at, mean, color="#2b6ca3", linewidth=0.8, label="mean")
    every = np.unique(np.linspace(min(50, len(running) - 1), len(running) - 1, POINTS).astype(np.int64))
    axes.plot(every + first, running[every], color="#d1495b", linewidth=1.6, label="mean so far")
    axes.set(xlim=(0, document.n_tokens), ylim=(0, max(1.0, float(np.quantile(high, 0.995)) * 1.15)))
    axes.set(xlabel="position (tokens)", ylabel="surprisal (bits per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    title, families = drawable(escaped(title))
    axes.set_title(title, loc="left", fontsize=11, parse_math=False, fontfamily=families)
    axes.legend(loc="upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
