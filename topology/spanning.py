"""Spanning trees over nodes that hang under switches: plain indices and names, no hardware.

Nodes are grouped by the switches over them, and every group is spanned from the inside out: first the nodes of a leaf,
then the heads of the leaves, then the heads of what is above. So exactly one edge leaves each group on the way to the
root: data going up crosses each leaf's uplink once, and only groups - 1 edges run between leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Parents = list[int | None]
Path = tuple[str, ...]
Shape = Callable[[int], Parents]


def binomial(n: int) -> Parents:
    """The binomial tree: a reduction takes the least number of rounds, ``ceil(log2(n))``, one message a node a round.

    Member i hangs under i without its lowest set bit; member 0 is the root.
    """
    return [None if i == 0 else i & (i - 1) for i in range(n)]


def binary(n: int) -> Parents:
    """An in-order binary tree whose inner members have even numbers, the root 0 with one child.

    First of the two trees of Sanders, Speck and Träff, 'Two-tree algorithms for full bandwidth broadcast, reduction and
    scan' (2009), in the numbering that NCCL uses too.
    """
    parents: Parents = [None] * n
    for i in range(1, n):
        low = i & -i
        up = (i ^ low) | (low << 1)
        parents[i] = up if up < n else i ^ low
    return parents


def binary_twin(n: int) -> Parents:
    """Second of the two trees: the first one mirrored, or shifted by one where n is odd, so that inner members of the
    one are (but for one, where n is odd) outer members of the other."""
    first = binary(n)
    move: Callable[[int], int] = (lambda i: n - 1 - i) if n % 2 == 0 else (lambda i: (i + 1) % n)
    parents: Parents = [None] * n
    for i, up in enumerate(first):
        parents[move(i)] = None if up is None else move(up)
    return parents


def span(paths: Sequence[Path], shape: Shape) -> Parents:
    """The parent of each node in a tree of the given shape inside each group and between the groups.

    Args:
        paths: the switches over each node, top first, empty if unknown: such a node is a group of its own.
        shape: :func:`binomial`, :func:`binary` or :func:`binary_twin`.
    """
    parents: Parents = [None] * len(paths)

    def connect(members: list[int], level: int) -> int:
        groups: dict[object, list[int]] = {}
        for i in members:
            groups.setdefault(paths[i][level] if level < len(paths[i]) else i, []).append(i)
        alone = len(groups) == len(members)
        heads = [group[0] if alone or len(group) == 1 else connect(group, level + 1) for group in groups.values()]
        inner = shape(len(heads))
        for i, up in enumerate(inner):
            if up is not None:
                parents[heads[i]] = heads[up]
        return heads[inner.index(None)]

    connect(list(range(len(paths))), 0)
    return parents


def loads(paths: Sequence[Path], parents: Parents) -> tuple[dict[object, list[int]], dict[object, list[int]]]:
    """How many messages of a reduction [leave, enter] each node, and each switch through its uplink."""
    nodes: dict[object, list[int]] = {}
    uplinks: dict[object, list[int]] = {}
    for child, parent in enumerate(parents):
        if parent is None:
            continue
        for end, direction in ((child, 0), (parent, 1)):
            nodes.setdefault(end, [0, 0])[direction] += 1
            other = parent if end == child else child
            for depth in range(1, len(paths[end]) + 1):
                if paths[end][:depth] != paths[other][:depth]:
                    uplinks.setdefault(paths[end][:depth], [0, 0])[direction] += 1
    return nodes, uplinks
