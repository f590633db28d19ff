"""Chunks of a document, and the sums of ranks that share the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpmpi.attention.layout import Layout, Piece
from cpmpi.model.forward import Sum, chunked


@given(st.integers(0, 3000), st.integers(1, 7), st.integers(1, 6), st.integers(1, 700))
def test_chunks_cover_the_pieces_and_are_of_one_size(n_tokens, world, segments, limit):
    """Never above the limit, no more than needed, sizes of one piece differ by at most one, in order."""
    layout = Layout(n_tokens=n_tokens, world=world, segments=segments)
    for rank in range(world):
        pieces = layout.pieces(rank)
        cut = chunked(pieces, limit)
        assert [i for c in cut for i in range(c.start, c.stop)] == [i for p in pieces for i in range(p.start, p.stop)]
        for piece in pieces:
            sizes = [c.size for c in cut if piece.start <= c.start and c.stop <= piece.stop and c.size]
            assert max(sizes, default=0) <= limit
            assert max(sizes, default=0) - min(sizes, default=0) <= 1
            assert len(sizes) == -(-piece.size // limit)
        assert all(c.size for c in cut)


def test_chunks_by_hand():
    assert chunked([Piece(10, 20), Piece(30, 33)], 4) == [Piece(10, 13), Piece(13, 16), Piece(16, 20), Piece(30, 33)]


@pytest.mark.mpi(2)
def test_sums_of_bfloat16_are_added_in_float32_and_come_back_as_bfloat16():
    from mpi4py import MPI

    from cpmpi.comm.transport import MPITransport

    rank, transport = MPI.COMM_WORLD.rank, MPITransport(MPI.COMM_WORLD)
    given = torch.tensor([[256.0, 0.5], [3.0, -1.0]] if rank else [[1.0, 0.25], [1.0, 1.0]])
    for dtype in (torch.bfloat16, torch.float32):
        partial = given.to(dtype)
        raw = transport.sum(partial.clone()).wait()
        assert raw.view(torch.float32).tolist() == [257.0, 0.75, 4.0, 0.0], "bfloat16 has no 257"
        summed = Sum(transport.sum(partial), partial).wait()
        assert summed.dtype == dtype
        assert summed.shape == (2, 2)
        assert torch.equal(summed, torch.tensor([[257.0, 0.75], [4.0, 0.0]]).to(dtype))
    assert (transport.sums, transport.summed_bytes) == (4, 4 * 16)
    transport.close()
