"""Messages between ranks: large ones, sums, and what MPI refuses."""

import pytest
import torch

from cpmpi import transport as module
from cpmpi.transport import MPITransport

CPU = torch.device("cpu")


@pytest.fixture
def transport():
    from mpi4py import MPI

    made = MPITransport(MPI.COMM_WORLD)
    yield made
    made.close()


@pytest.mark.mpi(2)
def test_messages_in_parts_and_sums(transport, monkeypatch):
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    monkeypatch.setattr(module, "LARGEST_MESSAGE", 1000)
    payload_B = torch.arange(4097, dtype=torch.int64).to(torch.uint8) + rank
    incoming = transport.receive(4097, 1 - rank, 1, CPU)
    outgoing = transport.send(payload_B, 1 - rank, 1)
    assert torch.equal(incoming.wait(), payload_B + 1 - 2 * rank)
    outgoing.wait()
    assert transport.sent_bytes == 4097
    partial = torch.full((3, 500), 0.5 + rank)
    assert torch.equal(transport.sum(partial).wait().view(torch.float32), torch.full((1500,), 2.0))
    assert (transport.sums, transport.summed_bytes) == (1, 6000)


@pytest.mark.mpi(2)
def test_what_mpi_refuses_is_raised_by_the_wait(transport):
    """The message is larger than what was asked for; other messages go on."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    if rank:
        transport.send(torch.zeros(100, dtype=torch.uint8), 0, 0).wait()
        transport.send(torch.ones(10, dtype=torch.uint8), 0, 0).wait()
        return
    with pytest.raises(MPI.Exception, match=r"TRUNCATE|truncated"):
        transport.receive(10, 1, 0, CPU).wait()
    assert transport.receive(10, 1, 0, CPU).wait().sum() == 10
