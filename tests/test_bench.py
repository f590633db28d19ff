"""The bench on real ranks: it runs every schedule, counts the bytes that the model predicts, refuses bad names."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cpmpi.comm.carrier import Carrier
from cpmpi.cost.attention_bench import Measured, Overlap
from cpmpi.errors import UserError
from cpmpi.jobs.bench import HEADER, command, row_of

from .conftest import mpirun

SHAPE = ["--new", "64", "--stored", "256", "--query-heads", "4", "--kv-heads", "2", "--head-dim", "16", "--repeat", "1"]


@pytest.mark.mpi(3)
def test_every_schedule_sends_the_bytes_of_its_formula():
    import torch
    from mpi4py import MPI

    from cpmpi.cost.attention_bench import AttentionBench
    from cpmpi.cost.choose import schedule_on
    from cpmpi.cost.shape import AttentionShape
    from cpmpi.cost.simulate import Sizes
    from cpmpi.kernels.select import named
    from cpmpi.topology.synthetic import synthetic

    topology = synthetic("machine=cpu-2s,ranks=2/1")
    shape = AttentionShape(new=31, stored=50, query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
    bench = AttentionBench(MPI.COMM_WORLD, topology, named("reference"), Carrier())
    rates = bench.rates(shape, torch.float32)
    assert rates.attention_flops > 0
    assert MPI.COMM_WORLD.allgather(rates) == [rates] * 3
    sizes = Sizes(shape, 3)
    for kind in ("ring", "tree", "hybrid"):
        schedule = schedule_on(kind, topology)
        measured = bench.run(schedule, shape, torch.float32, repeat=1)
        sent = [sum(sizes.bytes(t.items) for now in schedule.program(r) for t in now.sends) for r in range(3)]
        assert measured.sent_bytes == max(sent)
        assert len(measured.total_s) == len(measured.compute_s) == len(measured.move_s) == 1
        assert measured.flops == shape.mask.pairs(range(50, 81), range(81)) * shape.pair_flops
        if bench.comm.rank == 0:
            assert {i.rank for i in measured.intervals} == {0, 1, 2}
            arrived = sum(i.n_bytes for i in measured.intervals if i.what == "transfer")
            assert arrived == sum(sent)
    bench.close()


def test_the_command_on_two_ranks(tmp_path):
    trace, picture = tmp_path / "trace.json", tmp_path / "timeline.png"
    line = ["-m", "cpmpi", "bench", "attention", "--attention", "all", *SHAPE]
    done = mpirun(2, *line, "--trace", str(trace), "--plot", str(picture), timeout_s=120)
    assert done.returncode == 0, done.stdout
    assert "2 ranks on 1 node, 64 new tokens after 256, 4 query and 2 KV heads of 16" in done.stdout
    for kind in ("ring", "tree", "hybrid"):
        assert f"\n{kind} " in done.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    assert picture.stat().st_size > 5000


def test_one_rank_without_a_launcher():
    done = mpirun(1, "-m", "cpmpi", "bench", "attention", *SHAPE, timeout_s=60)
    assert done.returncode == 0, done.stdout
    assert "attention: ring: " in done.stdout


def test_transport(tmp_path):
    done = mpirun(2, "-m", "cpmpi", "bench", "transport", "--repeat", "1", timeout_s=120)
    assert done.returncode == 0, done.stdout
    assert "GB/s a rank" in done.stdout


def test_fractions():
    m = Measured(total_s=(3.0, 2.0, 2.5), compute_s=(2.0,), move_s=(1.0,), flops=1.0, sent_bytes=1)
    assert (m.seconds, m.hidden, m.bound_share) == (2.5, 0.5, 0.8)
    assert Measured(total_s=(3.0,), compute_s=(2.0,), move_s=(0.1,), flops=1.0, sent_bytes=0).hidden == 1
    assert Overlap(1, move_s=1.0, compute_s=2.0, both_s=2.25).hidden == 0.75


def test_a_row_of_the_table():
    """Median, least and most are those of the repetitions; predicted, compute and move follow."""
    m = Measured(
        total_s=(3.0, 2.0, 2.5), compute_s=(2.0, 9.0, 1.0), move_s=(1.0,), flops=5e12, sent_bytes=1_500_000
    )  # fmt: skip
    row = row_of("tree", m, SimpleNamespace(total_s=0.25))
    assert dict(zip(HEADER, row, strict=True)) == {
        "schedule": "tree", "median": "2.5 s", "least": "2 s", "most": "3 s", "predicted": "250 ms", "compute": "2 s",
        "move": "1 s", "hidden": "50%", "of bound": "80%", "sent a rank": "1.5 MB", "GFLOP/s": "2,000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--query-heads", "5", "--kv-heads", "2"], "query heads (5) must be a multiple of the KV heads (2)"),
        (["--plot", "a.bmp"], "a drawing's name ends in one of"),
        (["--plot", "/nowhere/a.png"], "--plot /nowhere/a.png: no folder /nowhere"),
        (["--trace", "/nowhere/a.json"], "--trace /nowhere/a.json: no folder /nowhere"),
        (["--topology", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_what_cannot_be_measured(options, problem, monkeypatch):
    """On a world of one, started in this process by a double that has no MPI behind it."""
    from cpmpi.comm import ranks

    class Alone:
        size, rank = 1, 0

        def allgather(self, one):
            return [one]

        def bcast(self, one):
            return one

    monkeypatch.setattr(ranks, "start", lambda: ranks.Ranks(Alone()))
    monkeypatch.setattr("cpmpi.comm.device.choose_device", lambda *_: "cpu")
    monkeypatch.setattr("cpmpi.comm.device.set_threads", lambda _: 1)
    failed = CliRunner().invoke(command, ["attention", *options])
    assert isinstance(failed.exception, UserError)
    assert problem in str(failed.exception)
