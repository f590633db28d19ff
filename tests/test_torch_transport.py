"""Messages over torch.distributed equal those over MPI, bit for bit; gloo here, whose code NCCL shares."""

import re

import numpy as np
import pytest
import torch

from cpmpi.attention.execute import Execution, Heads, Keys, Queries, Rule
from cpmpi.attention.layout import Layout
from cpmpi.attention.schedule import Schedule
from cpmpi.comm import carrier as carriers
from cpmpi.comm import torch_transport as module
from cpmpi.comm.carrier import Carrier, address_of, choose_carrier
from cpmpi.comm.ranks import Ranks
from cpmpi.comm.transport import MPITransport
from cpmpi.errors import UserError
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.select import named
from cpmpi.run.reader import open_run
from cpmpi.topology.describe import Topology
from cpmpi.topology.node import NetworkDevice, Node, RankPlace
from cpmpi.topology.synthetic import synthetic

from .test_exact import save_documents, save_llama, shared_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HEADS = Heads(query_heads=4, kv_heads=2, key_dim=8, value_dim=6, dtype=torch.bfloat16)


def gloo(comm):
    return Carrier(kind="gloo", address="127.0.0.1").connect(comm)


def attention(comm, schedule, transport, n_tokens):
    """This rank's part of one layer's attention of random tokens."""
    layout = Layout(n_tokens=n_tokens, world=comm.size, segments=2)
    pieces = layout.pieces(comm.rank)
    generator = torch.Generator().manual_seed(comm.rank)
    keys = Keys.empty(pieces, HEADS, CPU)
    for part in (keys.k_SGD, keys.v_SGE):
        part.copy_(torch.randn(part.shape, generator=generator))
    queries = Queries(tuple((p.start, torch.randn(p.size, 4, 8, generator=generator).bfloat16()) for p in pieces))
    return Execution(
        rank=comm.rank, program=schedule.program(comm.rank), transport=transport, backend=named("reference"),
        heads=HEADS, rule=Rule(mask=Mask(), scale=0.3), query_layout=layout, key_layouts=(layout,), device=CPU,
    ).run(queries, keys)  # fmt: skip


def nodes_of(size):
    """Uneven nodes, as many as there can be."""
    cuts = [0, 1, 4, 6]
    return [list(range(a, min(b, size))) for a, b in zip(cuts, [*cuts[1:], size], strict=True) if a < min(b, size)]


def check_schedules(world):
    for size in range(1, world.size + 1):
        comm = world.Split(0 if world.rank < size else 1 + world.rank, key=world.rank)
        if world.rank < size:
            over_mpi, over_gloo = MPITransport(comm), gloo(comm)
            nodes = nodes_of(size)
            for kind in ("ring", "tree", "hybrid"):
                schedule = Schedule(
                    kind=kind, nodes=nodes, parents=[1, None, 1, 1][: len(nodes)] if size > 1 else [None]
                )
                for n_tokens in (3, 101):  # ranks without a token, and shards of several sizes
                    expected, found = (attention(comm, schedule, over, n_tokens) for over in (over_mpi, over_gloo))
                    assert torch.equal(found, expected), (size, kind, n_tokens)
            assert over_gloo.sent_bytes == over_mpi.sent_bytes
            assert (over_gloo.sent_bytes > 0) == (size > 1)
            over_mpi.close()
            over_gloo.close()
        world.Barrier()


@pytest.mark.mpi(6)
def test_every_schedule_over_gloo_is_that_over_mpi():
    from mpi4py import MPI

    check_schedules(MPI.COMM_WORLD)


@pytest.mark.slow
@pytest.mark.mpi(7)
def test_every_schedule_on_seven_ranks():
    from mpi4py import MPI

    check_schedules(MPI.COMM_WORLD)


@pytest.mark.mpi(2)
def test_messages_in_parts_and_sums(monkeypatch):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    monkeypatch.setattr(module, "LARGEST_MESSAGE", 1000)
    transport = gloo(comm)
    payload_B = torch.arange(4097, dtype=torch.int64).to(torch.uint8) + comm.rank
    for channel in (0, 1):  # with the same numbers
        incoming = transport.receive(4097, 1 - comm.rank, channel, CPU)
        assert incoming.complete_s == 0
        outgoing = transport.send(payload_B + channel, 1 - comm.rank, channel)
        assert torch.equal(incoming.wait(), payload_B + channel + 1 - 2 * comm.rank)
        outgoing.wait()
        assert incoming.complete_s >= incoming.posted_s
    assert transport.sent_bytes == 2 * 4097
    partial = torch.full((3, 500), 0.5 + comm.rank)
    assert torch.equal(transport.sum(partial).wait().view(torch.float32), torch.full((1500,), 2.0))
    assert torch.equal(partial, torch.full((3, 500), 2.0)), "in place"
    halves = torch.full((4,), 0.5 + comm.rank, dtype=torch.bfloat16)
    assert transport.sum(halves).wait().view(torch.float32).tolist() == [2.0] * 4
    assert (transport.sums, transport.summed_bytes) == (2, 6016)
    transport.close()


@pytest.mark.mpi(2)
def test_a_peer_that_is_gone_is_named():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    transport = gloo(comm)
    if comm.rank == 0:
        incoming = transport.receive(100, 1, 1, CPU)
    comm.Barrier()
    if comm.rank == 1:
        transport.close()
        comm.Barrier()
        return
    with pytest.raises(RuntimeError, match=r"^receive 100 bytes from rank 1 over gloo: \S"):
        incoming.wait()
    comm.Barrier()


class Coalescing:
    """A process group that starts what is posted between two calls at once, as NCCL's does."""

    supports_coalescing = True

    def __init__(self):
        self.calls = []

    def _start_coalescing(self):
        self.calls.append("start")

    def _end_coalescing(self):
        self.calls.append("end")
        return self

    def send(self, tensors, peer, number):
        self.calls.append(("send", tensors[0].numel(), peer))

    def recv(self, tensors, peer, number):
        self.calls.append(("receive", tensors[0].numel(), peer))

    def wait(self):
        self.calls.append("wait")


@pytest.mark.mpi(1)
def test_a_round_is_one_batch_of_each_channel():
    from mpi4py import MPI

    transport = Carrier(kind="gloo", address="127.0.0.1").connect(MPI.COMM_WORLD, names=range(5))
    own, transport.groups = transport.groups, [Coalescing(), Coalescing()]
    with transport.batch():
        incoming = transport.receive(5, 3, 0, CPU)
        transport.send(torch.zeros(6, dtype=torch.uint8), 4, 0)
        transport.send(torch.zeros(7, dtype=torch.uint8), 4, 1)
        assert transport.groups[0].calls == [], "nothing starts inside"
        with pytest.raises(AssertionError, match="after the batch"):
            incoming.wait()
    incoming.wait()
    transport.send(torch.zeros(8, dtype=torch.uint8), 4, 1)
    assert transport.groups[0].calls == ["start", ("receive", 5, 3), ("send", 6, 4), "end", "wait"]
    assert transport.groups[1].calls == ["start", ("send", 7, 4), "end", "start", ("send", 8, 4), "end"]
    transport.groups = own
    transport.close()


@pytest.mark.mpi(4)
def test_a_job_over_gloo_equals_one_over_mpi(tmp_path):
    """Attention in two groups of two, and two ranks a group that share the weights: sums of two are the same."""
    from mpi4py import MPI

    import cpmpi

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        save_documents(folder / "documents", (1, 300))
    comm.Barrier()
    for kind in ("mpi", "gloo"):
        cpmpi.prefill(
            model=folder / "model", inputs=folder / "documents", output=folder / kind, tp=2, transport=kind,
            attention="ring", quiet=True,
        ).close()  # fmt: skip
    comm.Barrier()
    if comm.rank == 0:
        with open_run(folder / "mpi") as expected, open_run(folder / "gloo") as found:
            for a, b in zip(found.documents, expected.documents, strict=True):
                np.testing.assert_array_equal(a.logprobs, b.logprobs)
                np.testing.assert_array_equal(a.kv(1, raw=True), b.kv(1, raw=True))
    assert not torch.distributed.is_initialized(), "the process' own group is not ours"


@pytest.mark.mpi(2)
def test_auto_takes_nccl_where_every_rank_has_a_gpu(monkeypatch):
    from mpi4py import MPI

    ranks, machine = Ranks(MPI.COMM_WORLD), synthetic("machine=cpu-2s,nodes=1,ranks=2")
    assert str(choose_carrier(ranks, machine, CPU, "auto")) == "messages: MPI: the data is in the host's memory"
    assert str(choose_carrier(ranks, machine, CUDA, "mpi")) == "messages: MPI: as asked for"
    assert choose_carrier(ranks, machine, CPU, "gloo").address == "127.0.0.1"
    with pytest.raises(
        UserError, match=r"--transport nccl: NCCL carries .* computes on cpu; choose auto, gloo or mpi$"
    ):
        choose_carrier(ranks, machine, CPU, "nccl")
    monkeypatch.setattr(carriers, "_problem", lambda *_: "")

    class Properties:
        uuid = "GPU-1"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    shared = "messages: MPI: through the host's memory, not NCCL: ranks 0 and 1 share a GPU"
    assert str(choose_carrier(ranks, machine, CUDA, "auto")) == shared
    with pytest.raises(UserError, match=r"^--transport nccl: ranks 0 and 1 share a GPU; choose auto, gloo or mpi$"):
        choose_carrier(ranks, machine, CUDA, "nccl")
    Properties.uuid = f"GPU-{ranks.rank}"
    expected = Carrier(kind="nccl", reason="every rank has a GPU of its own", device=CUDA, address="127.0.0.1")
    assert choose_carrier(ranks, machine, CUDA, "auto") == expected


def test_the_address_is_that_of_a_network_device(monkeypatch):
    def machine(*names):
        devices = tuple(NetworkDevice(name=name, gb_per_s=rate) for rate, name in enumerate(names, start=1))
        nodes = (
            Node(name="a", ranks=(RankPlace(rank=0),), networks=devices),
            Node(name="b", ranks=(RankPlace(rank=1),)),
        )
        return Topology(nodes=nodes)

    known = {"eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    monkeypatch.setattr(carriers, "_interface_address", lambda name: known.get(name, ""))
    assert address_of(machine("eth0", "ib0"), 0) == "10.1.0.1", "the faster one"
    assert address_of(machine("eth0", "mlx5_0"), 0) == "10.0.0.1", "that has an address"
    monkeypatch.setattr(carriers.socket, "gethostbyname", lambda _: "127.0.1.1")
    with pytest.raises(UserError, match=re.escape("node b has no network address that others reach; choose mpi")):
        address_of(machine("eth0"), 1)


def test_the_system_knows_an_interface_address():
    assert carriers._interface_address("lo") == "127.0.0.1"
    assert carriers._interface_address("no-such-one") == ""
