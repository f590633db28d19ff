"""Where everything goes on the drawing: plain coordinates, in units of which a rank's disc is about one wide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from cpmpi.topology.derive import Tree, node_order, rings, tree
from cpmpi.topology.describe import Topology

MOST_COLUMNS = 16
GAP = 0.7  # between boxes
PANEL = 0.6  # from a panel's edge to the boxes in it
BAR = 0.62  # height of a leaf switch

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A node: its index, row (from the top, over all panels), lower left corner, and the centre of each rank's disc."""

    node: int
    row: int
    x: float
    y: float
    discs: dict[int, Point]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A leaf switch (None: unknown) over its boxes: lower left corner and size; the switch is a bar at the top."""

    leaf: str | None
    x: float
    y: float
    width: float
    height: float
    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Everything, with the origin at the lower left corner of the lowest panel.

    Attributes:
        rings, tree: as derived from the description.
        box: width and height of a node.
        radius: of a rank's disc.
        rows: rows of boxes, over all panels.
        facts: lines of text in a box; 1 is the name alone.
    """

    rings: tuple[tuple[int, ...], ...]
    tree: Tree
    panels: tuple[Panel, ...]
    width: float
    height: float
    box: Point
    radius: float
    rows: int
    facts: int


def arrange(topology: Topology) -> Drawing:
    """Leaves from top to bottom in node order, their nodes in rows, each node's leader at the top of its ring."""
    by_node, spanning = rings(topology), tree(topology)
    order = node_order(topology)
    leaves = [(leaf, list(nodes)) for leaf, nodes in groupby(order, key=lambda i: topology.nodes[i].leaf)]
    largest = max(len(ring) for ring in by_node)
    facts = 1 if len(order) > 8 else 4 if any(node.gpus for node in topology.nodes) else 3
    radius = 0.45 if largest <= 16 else 0.2
    ring_radius = max(0.95, largest * radius * 3.5 / (2 * math.pi)) if largest > 1 else 0.0
    reach = 2 * (ring_radius + radius)
    box = (max(reach + 1.0, 6.2 if facts > 1 else 0.0), reach + 0.95 + 0.6 * facts)
    columns = _columns([len(nodes) for _, nodes in leaves], box)
    widest = min(columns, max(len(nodes) for _, nodes in leaves))
    row_height = box[1] + (0.6 if len(order) == 1 else 1.1 + 0.5 * math.log2(widest))
    width = 2 * PANEL + widest * box[0] + (widest - 1) * GAP
    rows = [math.ceil(len(nodes) / columns) for _, nodes in leaves]
    heights = [BAR + PANEL + count * row_height for count in rows]
    total = sum(heights) + (len(heights) - 1) * 2 * GAP
    panels = []
    for i, (leaf, nodes) in enumerate(leaves):
        top = total - sum(heights[:i]) - i * 2 * GAP
        boxes = []
        for place, node in enumerate(nodes):
            row, column = divmod(place, columns)
            x, y = PANEL + column * (box[0] + GAP), top - BAR - (row + 1) * row_height
            ring, first = by_node[node], by_node[node].index(spanning.leaders[node])
            centre = (x + box[0] / 2, y + box[1] - radius - ring_radius - 0.5)
            discs = {
                rank: _on_circle(centre, ring_radius, k, len(ring))
                for k, rank in enumerate((*ring[first:], *ring[:first]))
            }
            boxes.append(Box(node=node, row=sum(rows[:i]) + row, x=x, y=y, discs=discs))
        bottom = top - heights[i]
        panels.append(Panel(leaf=leaf, x=0, y=bottom, width=width, height=heights[i], boxes=tuple(boxes)))
    return Drawing(
        rings=by_node, tree=spanning, panels=tuple(panels), width=width, height=total, box=box, radius=radius,
        rows=sum(rows), facts=facts,
    )  # fmt: skip


def _columns(sizes: list[int], box: Point) -> int:
    """Nodes in a row: all of a leaf's up to ``MOST_COLUMNS``, but the whole should not be too flat.

    Where rows must break, they do at a power of two: a binomial tree then changes rows in the first column only.
    """
    largest = max(sizes)
    if largest <= (MOST_COLUMNS if len(sizes) > 1 else 5):
        return largest
    wanted = math.sqrt(sum(sizes) * 2 * (box[1] + 2) / box[0])
    return max(4, min(MOST_COLUMNS, 1 << round(math.log2(wanted))))


def _on_circle(centre: Point, radius: float, place: int, of: int) -> Point:
    angle = math.pi / 2 - 2 * math.pi * place / of
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)
