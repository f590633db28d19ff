"""Each plot of a report as PNG and SVG, for papers and slides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cpmpi.errors import told_to_the_user
from cpmpi.report.curves import ByPosition, bits_of, log_edges
from cpmpi.report.machine import topology_of
from cpmpi.run.publish import make_folder
from cpmpi.run.reader import Document, Run
from cpmpi.run.surprisal import draw_surprisal, require_matplotlib
from cpmpi.text import counted, shown
from cpmpi.timeline.intervals import Interval
from cpmpi.timeline.plot import draw_timeline
from cpmpi.topology.plot import draw_machine

SUFFIXES = (".png", ".svg")
TITLE_WIDTH = 70  # of a document's name
LEAST_BAND = 4  # documents
INK, LINE, BAND, WIDE_BAND = "#1e293b", "#2563eb", "#a9c4f5", "#dbe6fb"
require_pictures = require_matplotlib


def image_names(documents: Sequence[Document]) -> list[str]:
    """The files that `draw_images` may write."""
    stems = [*(surprisal_stem(document) for document in documents), "perplexity", "timeline", "machine"]
    return [stem + suffix for stem in stems for suffix in SUFFIXES]


def surprisal_stem(document: Document) -> str:
    """The name of a document's picture, without its ending."""
    return f"surprisal-{document.index:06d}"


def draw_images(folder: Path, run: Run, documents: Sequence[Document], trace: Sequence[Interval]) -> list[Path]:
    """Draw each document's surprisal, perplexity by position, the timeline and the machine; the files.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    require_matplotlib()
    make_folder(folder)
    made = []
    for stem, draw in _drawings(run, documents, trace):
        for suffix in SUFFIXES:
            path = folder / (stem + suffix)
            with told_to_the_user(kinds=(OSError,)):
                draw(path)
            made.append(path)
    return made


def _drawings(
    run: Run, documents: Sequence[Document], trace: Sequence[Interval]
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Name, and what draws it into a file."""
    for document in documents:
        name = shown(document.id, TITLE_WIDTH)
        title = f"{name}: {document.n_tokens:,} tokens, perplexity {document.perplexity:.3f}"
        yield surprisal_stem(document), partial(draw_surprisal, document, title=title)
    yield "perplexity", partial(draw_perplexity, documents)
    if trace:
        yield "timeline", partial(draw_timeline, trace, title=f"{run.paths.folder.name}, measured")
    if (topology := topology_of(run)) is not None:
        yield "machine", partial(draw_machine, topology)


def draw_perplexity(documents: Sequence[Document], path: Path) -> None:
    """Draw perplexity by position: over all tokens, and the documents' median, quartiles and outer tenths."""
    pyplot = require_matplotlib()
    from matplotlib.ticker import EngFormatter

    by_position = ByPosition(log_edges(max(document.n_tokens for document in documents)))
    for document in documents:
        by_position.add(bits_of(document.logprobs))
    at = np.sqrt(np.maximum(by_position.edges[:-1], 1) * by_position.edges[1:])
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    if len(documents) >= LEAST_BAND:
        enough = by_position.documents >= LEAST_BAND
        low10, low25, median, high75, high90 = 2 ** np.where(enough, by_position.quantiles, np.nan)
        axes.fill_between(at, low10, high90, color=WIDE_BAND, linewidth=0, label="80% of the documents")
        axes.fill_between(at, low25, high75, color=BAND, linewidth=0, label="half of them")
        axes.plot(at, median, color=LINE, linewidth=0.8, linestyle="--", label="median")
    axes.plot(at, 2**by_position.pooled, color=LINE, linewidth=1.8, label="all tokens")
    axes.set(xscale="log", yscale="log", xlabel="position (tokens)", ylabel="perplexity")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"Perplexity by position, {counted(len(documents), 'document')}"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(loc="upper right", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
