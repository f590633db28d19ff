"""Spanning trees over nodes that hang under switches: plain indices and names, no hardware.

Nodes are grouped by the switches over them, and every group is spanned from the inside out: first the nodes of a leaf,
then the heads of the leaves, then the heads of what is above. So exactly one edge leaves each group on the way to the
root: data going up crosses each leaf's uplink once, and only groups - 1 edges run between leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

Parents = list[int | None]
Path = tuple[str, ...]


def binomial(n: int) -> Parents:
    """The binomial tree: a reduction takes the least number of rounds, ``ceil(log2(n))``, one message a node a round.

    Member i hangs under i without its lowest set bit; member 0 is the root.
    """
    return [None if i == 0 else i & (i - 1) for i in range(n)]


def span(paths: Sequence[Path]) -> Parents:
    """The parent of each node in a tree that is binomial inside each group and between the groups.

    Args:
        paths: the switches over each node, top first, empty if unknown: such a node is a group of its own.
    """
    parents: Parents = [None] * len(paths)

    def connect(members: list[int], level: int) -> int:
        groups: dict[object, list[int]] = {}
        for i in members:
            groups.setdefault(paths[i][level] if level < len(paths[i]) else i, []).append(i)
        alone = len(groups) == len(members)
        heads = [group[0] if alone or len(group) == 1 else connect(group, level + 1) for group in groups.values()]
        inner = binomial(len(heads))
        for i, up in enumerate(inner):
            if up is not None:
                parents[heads[i]] = heads[up]
        return heads[inner.index(None)]

    connect(list(range(len(paths))), 0)
    return parents
