"""Where everything goes on the drawing: plain coordinates, in units of which a rank's disc is about one wide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from cpmpi.topology.derive import node_order, rings, tree
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
        box: width and height of a node.
        radius: of a rank's disc.
        band: height above each row of boxes in which the tree's edges run.
        rows: rows of boxes, over all panels.
        facts: lines of text in a box; 1 is the name alone.
    """

    panels: tuple[Panel, ...]
    width: float
    height: float
    box: Point
    radius: float
    band: float
    rows: int
    facts: int


def arrange(topology: Topology) -> Drawing:
    """Leaves from top to bottom in node order, their nodes in rows, each node's leader at the top of its ring."""
    by_node, leaders = rings(topology), tree(topology).leaders
    order = node_order(topology)
    leaves = [(leaf, list(nodes)) for leaf, nodes in groupby(order, key=lambda i: topology.nodes[i].leaf)]
    largest = max(len(ring) for ring in by_node)
    facts = 1 if len(order) > 8 else 4 if any(node.gpus for node in topology.nodes) else 3
    radius = 0.45 if largest <= 16 else 0.2
    ring_radius = max(0.95, largest * radius * 3.5 / (2 * math.pi)) if largest > 1 else 0.0
    box = (2 * ring_radius + 2 * radius + 1.0, 2 * ring_radius + 2 * radius + 0.95 + 0.6 * facts)
    if facts > 1:
        box = (max(box[0], 6.2), box[1])
    columns = _columns([len(nodes) for _, nodes in leaves], box)
    rows_above = [math.ceil(len(nodes) / columns) for _, nodes in leaves]
    widest = min(columns, max(len(nodes) for _, nodes in leaves))
    band = 0.6 if len(order) == 1 else 1.1 + 0.5 * math.log2(widest)
    width = 2 * PANEL + widest * box[0] + (widest - 1) * GAP
    row = box[1] + band
    heights = [BAR + PANEL + rows * row for rows in rows_above]
    y, panels, row_number = sum(heights) + (len(heights) - 1) * 2 * GAP, [], 0
    height = y
    for (leaf, nodes), panel_height in zip(leaves, heights):
        y -= panel_height
        boxes = []
        for place, node in enumerate(nodes):
            left = PANEL + (place % columns) * (box[0] + GAP)
            bottom = y + panel_height - BAR - (place // columns + 1) * row
            ring = by_node[node]
            start = ring.index(leaders[node])
            centre = (left + box[0] / 2, bottom + box[1] - radius - ring_radius - 0.5)
            discs = {
                ring[(start + i) % len(ring)]: _on_circle(centre, ring_radius, i, len(ring)) for i in range(len(ring))
            }
            boxes.append(Box(node=node, row=row_number + place // columns, x=left, y=bottom, discs=discs))
        panels.append(Panel(leaf=leaf, x=0, y=y, width=width, height=panel_height, boxes=tuple(boxes)))
        row_number += math.ceil(len(nodes) / columns)
        y -= 2 * GAP
    return Drawing(
        panels=tuple(panels),
        width=width,
        height=height,
        box=box,
        radius=radius,
        band=band,
        rows=row_number,
        facts=facts,
    )


def _columns(sizes: list[int], box: Point) -> int:
    """Nodes in a row: all of a leaf's up to ``MOST_COLUMNS``, but the whole should not be too flat.

    Where rows must break, they do at a power of two: a binomial tree then goes from row to row in the first column only.
    """
    largest = max(sizes)
    if largest <= (MOST_COLUMNS if len(sizes) > 1 else 5):
        return largest
    wanted = math.sqrt(sum(sizes) * 2 * (box[1] + 2) / box[0])
    return max(4, min(MOST_COLUMNS, 1 << round(math.log2(wanted))))


def _on_circle(centre: Point, radius: float, place: int, of: int) -> Point:
    angle = math.pi / 2 - 2 * math.pi * place / of
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)
