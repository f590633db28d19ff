"""Draw a description: nodes under their leaf switches, the ring inside each, the tree between their leaders."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmpi.topology.describe import Topology
from cpmpi.topology.drawing_layout import BAR, GAP, Box, Drawing, Panel, Point, arrange
from cpmpi.topology.node import Node
from cpmpi.topology.text import SAID, folded, how_known, kinds_shown, lag, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOVE_TO, LINE_TO, BEND_TO, CURVE_TO = 1, 2, 3, 4  # codes of matplotlib.path.Path
FORMATS = (".png", ".svg", ".pdf")
INK, SOFT, LINE, PAPER, PANEL_FILL = "#1e293b", "#64748b", "#cbd5e1", "#ffffff", "#f8fafc"
RING, TREE, WIRE, SWITCH = "#2563eb", "#ea580c", "#94a3b8", "#334155"
NUMA = ("#bfdbfe", "#fde68a", "#bbf7d0", "#fbcfe8", "#ddd6fe", "#fed7aa", "#a5f3fc", "#e2e8f0")
INCHES, WIDEST_INCHES, HIGHEST_INCHES = 0.42, 22.0, 30.0  # of one unit; of the page at most


def require_matplotlib(path: str | Path) -> None:
    """Check before any work that :func:`draw_machine` can write ``path``.

    Raises:
        ValueError: matplotlib is not installed, or the file name ends in no known format.
    """
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"{path}: a drawing's name ends in one of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("drawing needs matplotlib: pip install 'cpmpi[plot]'")


def draw_machine(topology: Topology, path: str | Path) -> None:
    """Write a picture of the machine (PNG, SVG or PDF by the name of the file).

    Lines are the wider the more bandwidth they have, on a logarithmic scale.

    Raises:
        ValueError: as :func:`require_matplotlib`.
    """
    require_matplotlib(path)
    from matplotlib.figure import Figure

    drawing = arrange(topology)
    several = len(drawing.panels) > 1
    margin = 2.4 + 0.8 * math.log2(drawing.rows) if drawing.rows > 1 else 0.8
    right = 2.6 if several else 0.8
    legend = _legend_lines(topology)
    foot, head = 1.5 + 0.75 * len(legend), 2.4
    width, height = max(drawing.width + margin + right, 17.0), drawing.height + foot + head
    scale = min(INCHES, WIDEST_INCHES / width, HIGHEST_INCHES / height)
    figure = Figure(figsize=(width * scale, height * scale), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    left = -margin - max(0.0, width - (drawing.width + margin + right)) / 2
    axes.set_xlim(left, left + width)
    axes.set_ylim(-foot, drawing.height + head)
    axes.axis("off")
    pen = _Pen(axes, scale / INCHES)
    _title(pen, topology, left + 0.8, drawing.height)
    for panel in drawing.panels:
        _panel(pen, topology, drawing, panel)
    if several:
        _spine(pen, topology, drawing)
    _tree(pen, topology, drawing)
    _legend(pen, legend, left + 0.8)
    figure.savefig(path, dpi=160, facecolor=PAPER)


class _Pen:
    """Draws in units of the layout; ``zoom`` shrinks letters and lines with the page."""

    def __init__(self, axes: Axes, zoom: float) -> None:
        self.axes, self.zoom = axes, zoom

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        style = {"color": INK, "ha": "center", "va": "center", **style}
        self.axes.text(
            x,
            y,
            text,
            fontsize=size * max(self.zoom, style.pop("least_zoom", 0.0)),
            zorder=style.pop("zorder", 9),
            **style,
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str, **style: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        corner = f"round,pad=0,rounding_size={style.pop('corner', 0.25)}"
        weight = style.pop("weight", 1.0) * self.zoom
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=corner, fc=fill, ec=edge, linewidth=weight, **style)
        )

    def disc(self, at: Point, radius: float, fill: str, edge: str, weight: float) -> None:
        from matplotlib.patches import Circle

        self.axes.add_patch(Circle(at, radius, fc=fill, ec=edge, linewidth=weight * self.zoom, zorder=6))

    def curve(
        self, points: list[Point], colour: str, weight: float, zorder: float, arrow: bool = False, dashed: bool = False
    ) -> None:
        """A line (2 points) or cubic curve (4 points), with an arrow head at its end."""
        codes = [LINE_TO if len(points) == 2 else CURVE_TO] * (len(points) - 1)
        self._path(points, [MOVE_TO, *codes], colour, weight, zorder, arrow, dashed)

    def route(
        self, start: Point, end: Point, x: float, levels: list[float], colour: str, weight: float, arrow: bool,
        dashed: bool,
    ) -> None:  # fmt: skip
        """From ``start`` up to the first level, along it to ``x``, to the second level, along it, down to ``end``."""
        corners = [(start[0], levels[0]), (x, levels[0]), (x, levels[1]), (end[0], levels[1])]
        stops = [start, *corners, (end[0], end[1] + 0.05)]
        points, codes = [start], [MOVE_TO]
        for before, corner, after in zip(stops, corners, stops[2:]):
            points += [_towards(corner, before), corner, _towards(corner, after)]
            codes += [LINE_TO, BEND_TO, BEND_TO]
        self._path([*points, stops[-1]], [*codes, LINE_TO], colour, weight, 7, arrow, dashed)

    def _path(
        self, points: list[Point], codes: list[int], colour: str, weight: float, zorder: float, arrow: bool,
        dashed: bool,
    ) -> None:  # fmt: skip
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Curve

        weight *= self.zoom
        style = f"-|>,head_length={0.4 * weight + 2.2},head_width={0.3 * weight + 1.2}" if arrow else "-"
        self.axes.add_patch(
            FancyArrowPatch(
                path=Curve(points, codes), arrowstyle=style, mutation_scale=self.zoom if arrow else 1, color=colour,
                linewidth=weight, zorder=zorder, capstyle="round", joinstyle="round",
                linestyle=(0, (2, 3)) if dashed else "solid",
            )
        )  # fmt: skip


def _towards(corner: Point, other: Point, radius: float = 0.45) -> Point:
    """The point of the straight line from ``corner`` to ``other`` where the corner's rounding ends."""
    reach = math.hypot(other[0] - corner[0], other[1] - corner[1]) or 1.0
    part = min(radius / reach, 0.5)
    return corner[0] + (other[0] - corner[0]) * part, corner[1] + (other[1] - corner[1]) * part


def _weight(gb_per_s: float | None) -> float:
    """Points of a line: 10 MB/s is 1, every factor of ten 0.9 more; unknown is thin."""
    return 0.7 if gb_per_s is None else max(0.8, min(6.0, 1 + 0.9 * (math.log10(gb_per_s) + 2)))


def _title(pen: _Pen, topology: Topology, x: float, top: float) -> None:
    leaves = len({node.leaf for node in topology.nodes if node.leaf is not None})
    counts = [(topology.world, "rank"), (len(topology.nodes), "node"), (leaves, "leaf switch")]
    words = [f"{n} {word}{'' if n == 1 else 'es' if word.endswith('ch') else 's'}" for n, word in counts if n]
    pen.text(x, top + 1.7, " · ".join(words), 15, ha="left", weight="bold", least_zoom=0.55)
    measured = f"{len(topology.measured)} links measured" if topology.measured else "not measured"
    if bounds := sum(m.at_most for m in topology.measured):
        measured += f", of {bounds} only what they had at most (dashed)"
    origin = (topology.origin or "origin unknown").partition(" (")[0]
    pen.text(x, top + 0.85, f"{origin} · {measured}", 9, ha="left", color=SOFT, least_zoom=0.55)


def _panel(pen: _Pen, topology: Topology, drawing: Drawing, panel: Panel) -> None:
    known = panel.leaf is not None
    pen.box(panel.x, panel.y, panel.width, panel.height, PANEL_FILL, LINE, zorder=0, corner=0.4)
    bar = panel.y + panel.height - BAR
    fill, edge, ink = (SWITCH, SWITCH, PAPER) if known else (PANEL_FILL, WIRE, SOFT)
    style = "-" if known else "--"
    pen.box(panel.x, bar, panel.width, BAR, fill, edge, zorder=4, corner=0.3, linestyle=style)
    label = panel.leaf or "leaf switch unknown"
    fabrics = {topology.nodes[box.node].fabric for box in panel.boxes}
    if len(fabrics) == 1 and None not in fabrics:
        label += f" · NVLink domain {fabrics.pop()}"
    pen.text(panel.x + panel.width / 2, bar + BAR / 2, label, 8.5, color=ink, weight="bold")
    for box in panel.boxes:
        _node(pen, topology, drawing, box, bar)


def _node(pen: _Pen, topology: Topology, drawing: Drawing, box: Box, bar: float) -> None:
    node, (width, height) = topology.nodes[box.node], drawing.box
    pen.box(box.x, box.y, width, height, PAPER, WIRE, zorder=3, corner=0.3, weight=1.2)
    plug, top = box.x + width - 0.75, box.y + height
    fastest = max((device.gb_per_s or 0.0 for device in node.networks), default=0.0) or None
    pen.curve([(plug, top), (plug, bar)], LINE, _weight(fastest), 1)
    pen.box(plug - 0.2, top - 0.16, 0.4, 0.32, WIRE, PAPER, zorder=5, corner=0.08)
    _ring(pen, topology, drawing, box)
    middle = box.x + width / 2
    if drawing.facts > 1:
        for line, words in enumerate(_facts(node)):
            size, colour = (10.5, INK) if line == 0 else (7, SOFT)
            pen.text(
                middle,
                box.y + 0.6 * (drawing.facts - line) - 0.1,
                words,
                size,
                color=colour,
                weight="bold" if line == 0 else None,
            )
    else:
        pen.text(middle, box.y + 0.5, node.name, 9, weight="bold")


def _facts(node: Node) -> list[str]:
    parts = [(node.sockets, "socket"), (node.numa_domains, "NUMA domain"), (node.cores, "core")]
    lines = [node.name, " · ".join(f"{n} {word}{'s' if n != 1 else ''}" for n, word in parts if n)]
    names = folded([device.name for device in node.networks])
    speeds = {device.gb_per_s for device in node.networks}
    each = f" · {rate(speeds.pop())}" if len(speeds) == 1 and None not in speeds else ""
    gpus = f"{len(node.gpus)} × {node.gpus[0].name or 'GPU'}" if node.gpus else ""
    lines += [gpus, f"{names if len(names) < 28 else f'{len(node.networks)} network devices'}{each}"]
    return [line for line in lines if line]


def _ring(pen: _Pen, topology: Topology, drawing: Drawing, box: Box) -> None:
    ring, leader = drawing.rings[box.node], drawing.tree.leaders[box.node]
    radius = drawing.radius
    zoom = 1.0 if radius > 0.3 else 0.5
    for a, b in zip(ring, (*ring[1:], ring[0])) if len(ring) > 1 else ():
        (x, y), (u, v) = box.discs[a], box.discs[b]
        reach = math.hypot(u - x, v - y)
        bend = 0.22 if len(ring) == 2 else 0.0  # two links between the same two discs
        dx, dy = (u - x) / reach, (v - y) / reach
        start = (x + dx * radius - dy * bend, y + dy * radius + dx * bend)
        end = (u - dx * (radius + 0.06) - dy * bend, v - dy * (radius + 0.06) + dx * bend)
        link = topology.link(a, b)
        weight = zoom * 0.8 * _weight(link.gb_per_s)
        pen.curve([start, end], RING, weight, 5, arrow=radius > 0.3, dashed=link.at_most)
    for rank, at in box.discs.items():
        numa = topology.numa_of(rank)
        fill = PAPER if numa is None else NUMA[numa % len(NUMA)]
        edge, weight = (TREE, 2.2) if rank == leader else (INK, 0.8)
        pen.disc(at, radius, fill, edge, weight * max(zoom, 0.6))
        if radius > 0.3:
            pen.text(*at, str(rank), 9 if rank < 100 else 7.5)
    if len(ring) >= 5:
        links = [topology.link(a, b).gb_per_s for a, b in zip(ring, (*ring[1:], ring[0]))]
        known = [link for link in links if link is not None]
        centre = [sum(c) / len(ring) for c in zip(*box.discs.values())]
        if len(known) == len(links):
            number, unit = rate(min(known)).split()
            pen.text(centre[0], centre[1] + 0.18, number, 10, color=RING, weight="bold")
            pen.text(centre[0], centre[1] - 0.42, unit, 7, color=RING)


def _spine(pen: _Pen, topology: Topology, drawing: Drawing) -> None:
    """What joins the leaves: a bar down the right side, with each leaf's uplink."""
    x = drawing.width + 1.3
    bars = [panel.y + panel.height - BAR for panel in drawing.panels if panel.leaf is not None]
    for y in bars:
        figure = topology.figures["spine"].gb_per_s
        pen.curve([(drawing.width, y + BAR / 2), (x, y + BAR / 2)], LINE, 1.3 * _weight(figure), 1)
    if bars:
        low, high = min(bars), max(bars) + BAR
        above = {node.above for node in topology.nodes}
        name = " / ".join(above.pop()) if len(above) == 1 else ""
        pen.box(x, low, BAR, high - low, SWITCH, SWITCH, zorder=4, corner=0.3)
        pen.text(x + BAR / 2, (low + high) / 2, name or "network", 8.5, color=PAPER, weight="bold", rotation=90)


def _tree(pen: _Pen, topology: Topology, drawing: Drawing) -> None:
    spanning = drawing.tree
    where = {box.node: box for panel in drawing.panels for box in panel.boxes}
    few = len(spanning.edges) <= 16
    for child, parent in spanning.edges:
        low, high = where[child], where[parent]
        link = topology.link(spanning.leaders[child], spanning.leaders[parent])
        start, end = (
            (x, y + drawing.radius)
            for x, y in (low.discs[spanning.leaders[child]], high.discs[spanning.leaders[parent]])
        )
        weight = 0.8 * _weight(link.gb_per_s)
        if low.row != high.row:
            x = -0.7 - 0.8 * (1 + math.log2(abs(low.row - high.row)))
            pen.route(
                start, end, x, [box.y + drawing.box[1] + 0.3 for box in (low, high)], TREE, weight, few, link.at_most
            )
            label = (x, (start[1] + end[1]) / 2)
        else:
            columns = abs(start[0] - end[0]) / (drawing.box[0] + GAP)
            rise = 1.2 + 0.62 * math.log2(max(columns, 1.0))
            points = [start, (start[0], start[1] + rise), (end[0], end[1] + rise), (end[0], end[1] + 0.05)]
            pen.curve(points, TREE, weight, 7, arrow=few, dashed=link.at_most)
            label = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.75 * rise)
        if drawing.facts > 1:
            back = {"boxstyle": "round,pad=0.15", "fc": PAPER, "ec": "none", "alpha": 0.9}
            pen.text(
                *label,
                ("≤ " if link.at_most else "") + rate(link.gb_per_s),
                7,
                color=TREE,
                weight="bold",
                bbox=back,
                zorder=8,
            )


def _legend_lines(topology: Topology) -> list[tuple[str, float | None, str]]:
    """(colour, GB/s, words) of each kind of link that is known."""
    lines: list[tuple[str, float | None, str]] = []
    shown = kinds_shown(topology)
    for kind, figure in topology.figures.items():
        if figure.gb_per_s is None or kind not in shown:
            continue
        latency = "" if figure.latency_us is None else f", {lag(figure.latency_us, 'µs')}"
        colour = RING if kind in ("numa", "node") else TREE
        lines.append(
            (colour, figure.gb_per_s, f"{SAID[kind]}: {rate(figure.gb_per_s)}{latency} ({how_known(topology, kind)})")
        )
    return lines


def _legend(pen: _Pen, lines: list[tuple[str, float | None, str]], x: float) -> None:
    y = -1.0
    for colour, gb_per_s, words in lines:
        pen.curve([(x, y), (x + 1.4, y)], colour, 0.8 * _weight(gb_per_s), 5)
        pen.text(x + 1.9, y, words, 8.5, ha="left", color=SOFT, least_zoom=0.55)
        y -= 0.75
    words = "blue: ring in a node · orange: tree, leaders have an orange rim · fill: NUMA domain · width: log bandwidth"
    pen.text(x, y, words, 8, ha="left", color=SOFT, style="italic", least_zoom=0.55)
