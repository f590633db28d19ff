"""Messages between ranks: large ones, sums, and what MPI refuses."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

from cpmpi.attention.execute import Execution, Heads, Keys, Queries, Rule
from cpmpi.attention.layout import Layout
from cpmpi.attention.schedule import Schedule
from cpmpi.comm import transport as module
from cpmpi.comm.transport import MPITransport
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.select import named

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


class Owned:
    """A lock that knows which thread holds it."""

    def __init__(self):
        self.lock, self.owner = threading.Lock(), None

    def __enter__(self):
        self.lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *_):
        self.owner = None
        self.lock.release()


class Asked:
    """A request that notes which threads ask for it, and whether they hold the lock."""

    def __init__(self, request, lock, asked):
        self.request, self.lock, self.asked = request, lock, asked

    def Test(self):
        self.asked.append((threading.get_ident(), self.lock.owner == threading.get_ident()))
        return self.request.Test()


@pytest.mark.mpi(2)
def test_messages_move_while_the_main_thread_never_enters_mpi(transport):
    """64 MB both ways are complete before anybody waits; and whoever asks for a request holds the lock."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, 64_000_000
    transport.lock = lock = Owned()
    asked = []

    def exchange(n_bytes):
        messages = (
            transport.receive(n_bytes, 1 - rank, 0, CPU),
            transport.send(torch.full((n_bytes,), rank + 1, dtype=torch.uint8), 1 - rank, 0),
        )
        with lock:
            for message in messages:
                message.requests = [Asked(request, lock, asked) for request in message.requests]
        return messages

    messages = exchange(size)
    for _ in range(6000):  # a minute, where it takes a tenth of a second
        if all(message.complete_s for message in messages):
            break
        time.sleep(0.01)
    assert all(message.complete_s for message in messages), "nothing moves outside of MPI calls"
    me = threading.get_ident()
    assert asked
    assert me not in [thread for thread, _ in asked]
    incoming, outgoing = messages
    assert torch.equal(incoming.wait(), torch.full((size,), 2 - rank, dtype=torch.uint8))
    outgoing.wait()
    for message in exchange(size):  # now the main thread asks too
        message.wait()
    assert all(held for _, held in asked)
    assert len(asked) > 4


@pytest.mark.mpi(2)
def test_an_array_is_given_to_all_as_it_is():
    """Small and large arrays, also an empty one and another type."""
    from mpi4py import MPI

    from cpmpi.comm.ranks import Ranks

    here = Ranks(MPI.COMM_WORLD)
    for array in (np.arange(7, dtype=np.int32), np.arange(1 << 22, dtype=np.int64), np.empty(0, np.uint16)):
        got = here.spread(array if here.is_root else None)
        assert got.dtype == array.dtype
        assert np.array_equal(got, array)


class Watched(MPITransport):
    """Knows how many bytes that it received are in memory."""

    def __init__(self, comm):
        super().__init__(comm)
        self.arrays = []

    def receive(self, n_bytes, peer, channel, device):
        array = np.empty(n_bytes, np.uint8)
        self.arrays.append(weakref.ref(array))
        host_B = torch.from_numpy(array)
        requests = [self.channels[channel].Irecv(p, peer) for p in module._parts(host_B)]
        return self._post(module.Message(self, host_B, device, requests, "receive", peer))

    def held(self):
        return sum(found.nbytes for array in self.arrays if (found := array()) is not None)


@pytest.mark.mpi(6)
def test_a_ring_holds_the_shards_of_its_price():
    """A shard that was passed on is freed: not all keys of the document gather in a rank's memory."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    heads = Heads(query_heads=2, kv_heads=2, key_dim=8, value_dim=8, dtype=torch.float32)
    layout = Layout(n_tokens=600, world=6, segments=2)
    pieces = layout.pieces(comm.rank)
    for nodes, shards in (([[0, 1, 2, 3, 4, 5]], 2), ([[0, 1, 2], [3, 4, 5]], 3)):
        schedule = Schedule(kind="ring", nodes=nodes, parents=[None, 0][: len(nodes)])
        transport, most = Watched(comm), [0]
        keys = Keys.empty(pieces, heads, CPU)
        keys.flat_B.zero_()
        execution = Execution(
            rank=comm.rank, program=schedule.program(comm.rank), transport=transport, backend=named("reference"),
            heads=heads, rule=Rule(mask=Mask(), scale=1.0), query_layout=layout, key_layouts=(layout,), device=CPU,
            tick=lambda _, transport=transport, most=most: most.append(transport.held()),
        )  # fmt: skip
        execution.run(Queries(tuple((p.start, torch.zeros(p.size, 2, 8)) for p in pieces)), keys)
        transport.close()
        assert len(transport.arrays) == 5
        assert max(most) <= shards * keys.flat_B.numel()
    for kind in ("ring", "tree", "hybrid"):  # what belongs to others is given up at the end
        schedule = Schedule(kind=kind, nodes=[[0, 1, 2], [3, 4, 5]], parents=[None, 0])
        transport = MPITransport(comm)
        execution = Execution(
            rank=comm.rank, program=schedule.program(comm.rank), transport=transport, backend=named("reference"),
            heads=heads, rule=Rule(mask=Mask(), scale=1.0), query_layout=layout, key_layouts=(layout,), device=CPU,
        )  # fmt: skip
        keys = Keys.empty(pieces, heads, CPU)
        keys.flat_B.zero_()
        execution.run(Queries(tuple((p.start, torch.zeros(p.size, 2, 8)) for p in pieces)), keys)
        transport.close()
        assert set(execution.queries) == set(execution.keys) == set(execution.partials) == {comm.rank}, kind
