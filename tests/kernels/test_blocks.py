"""Blocks hold every visible pair exactly once, and nothing else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.kernels.blocks import Block, blocks
from cpmpi.kernels.fused import Tile, tiled_blocks
from cpmpi.kernels.mask import Mask

from .strategies import LAST, masks, spans


def painted(all_blocks: list[Block]) -> torch.Tensor:
    """How often each (query, key) pair is in a block."""
    times = torch.zeros(LAST, LAST, dtype=torch.int)
    for block in all_blocks:
        assert block.q
        assert block.k
        assert block.kind == "full" or len(block.q) == len(block.k)
        assert block.kind != "causal" or block.q == block.k
        square = torch.ones(len(block.q), len(block.k), dtype=torch.int)
        square = {"full": square, "causal": square.tril(), "anticausal": square.triu()}[block.kind]
        for shift in (n * block.step for n in range(block.repeat)):
            q, k = (slice(x.start + shift, x.stop + shift) for x in (block.q, block.k))
            times[q, k] += square
    return times


@given(mask=masks(), q=spans(), k=spans(), tile=st.builds(Tile, st.integers(1, LAST), st.integers(1, LAST)))
@settings(max_examples=300, deadline=None)
def test_exact_cover(mask: Mask, q: range, k: range, tile: Tile) -> None:
    dense = torch.zeros(LAST, LAST, dtype=torch.int)
    dense[q.start : q.stop, k.start : k.stop] = mask.dense(q, k).int()
    assert torch.equal(painted(list(blocks(mask, q, k))), dense)
    tiled = list(tiled_blocks(mask, q, k, tile))
    assert torch.equal(painted(tiled), dense)
    for block in tiled:
        assert (block.repeat - 1) * block.step + len(block.q) <= tile.queries
        assert len(block.k) <= tile.keys


def test_few_blocks_where_few_suffice() -> None:
    causal = list(blocks(Mask(), range(100, 300), range(50, 200)))
    assert causal == [
        Block(range(100, 200), range(50, 100), "full"),
        Block(range(100, 200), range(100, 200), "causal"),
        Block(range(200, 300), range(50, 200), "full"),
    ]
    windowed = list(blocks(Mask(window=100), range(1000), range(1000)))
    assert len(windowed) < 8
    assert max(block.repeat for block in windowed) == 9
