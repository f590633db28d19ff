"""The cyclic order with the widest narrowest link, over a small table of widths.

Rings are compared by, in this order: their narrowest link (wider is better), the sum of their widths (more is better),
the sum of the distances they bridge (less is better), and the order itself (so that the answer is the same everywhere).
Up to ``EXACT`` members the search is exhaustive, with branches cut as soon as their narrowest link is worse than the
best ring's; beyond, greedy insertion is improved by reversing stretches until the narrowest link cannot be replaced.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

EXACT = 8
Table = tuple[tuple[float, ...], ...]


class Grade(NamedTuple):
    """How good a ring is; the greatest is the best."""

    narrowest: float
    total: float
    near: float


def grade(order: tuple[int, ...], width: Table, distance: Table) -> Grade:
    """The grade of a closed ring of at least two members."""
    links = list(zip(order, (*order[1:], order[0])))
    widths = [width[a][b] for a, b in links]
    return Grade(min(widths), round(sum(widths), 6), -round(sum(distance[a][b] for a, b in links), 6))


@lru_cache(maxsize=4096)
def best_ring(width: Table, distance: Table) -> tuple[int, ...]:
    """The order of the members 0..n-1 round the ring, from 0, its second member less than its last.

    Args:
        width: symmetric; the bandwidth between two members, 0 where unknown.
        distance: symmetric; breaks ties between widths.
    """
    n = len(width)
    if n <= 3:
        return tuple(range(n))
    return _exact(width, distance) if n <= EXACT else _heuristic(width, distance)


def _exact(width: Table, distance: Table) -> tuple[int, ...]:
    n = len(width)
    best: tuple[int, ...] = tuple(range(n))
    best_grade = grade(best, width, distance)

    def extend(path: tuple[int, ...], left: frozenset[int]) -> None:
        nonlocal best, best_grade
        if not left:
            if path[1] < path[-1]:
                found = grade(path, width, distance)
                if found > best_grade or (found == best_grade and path < best):
                    best, best_grade = path, found
            return
        for member in sorted(left):
            if width[path[-1]][member] >= best_grade.narrowest:
                extend((*path, member), left - {member})

    extend((0,), frozenset(range(1, n)))
    return best


def _heuristic(width: Table, distance: Table) -> tuple[int, ...]:
    n = len(width)
    order = [0]
    left = set(range(1, n))
    while left:
        last = order[-1]
        order.append(min(left, key=lambda m: (-width[last][m], distance[last][m], m)))
        left.remove(order[-1])
    while _improve(order, width):
        pass
    first = order.index(0)
    order = order[first:] + order[:first]
    return tuple(order if order[1] < order[-1] else [order[0], *reversed(order[1:])])


def _improve(order: list[int], width: Table) -> bool:
    """Replace the narrowest link and one other by two links that are both wider than it (a 2-opt move)."""
    n = len(order)
    at = min(range(n), key=lambda i: (width[order[i]][order[(i + 1) % n]], i))
    order[:] = order[at:] + order[:at]  # the narrowest link is now order[0] - order[1]
    a, b = order[0], order[1]
    narrowest = width[a][b]
    moves = [(min(width[a][order[i]], width[b][order[(i + 1) % n]]), -i) for i in range(2, n)]
    best, i = max(moves)
    if best <= narrowest:
        return False
    order[1 : 1 - i] = reversed(order[1 : 1 - i])
    return True
