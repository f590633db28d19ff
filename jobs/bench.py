"""``cpmpi bench``: measure parts of the job on the ranks that it is launched on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from cpmpi.comm.ranks import Ranks
    from cpmpi.cost.attention_bench import Measured
    from cpmpi.cost.price import Price
    from cpmpi.topology.describe import Topology

T = TypeVar("T")
FILE = click.Path(path_type=Path)
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)  # bytes
DTYPES = ("float32", "bfloat16", "float16")
topology_file = click.option("--topology", "topology_file", type=FILE, help="Saved description.  [default: discover]")
leaf_file = click.option("--leaf-file", type=FILE, help="Nodes by switch, in the format of topology.conf.")
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
repeat_option = click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Repetitions.")


@click.group("bench")
def command() -> None:
    """Measure attention across ranks, or messages between them, on the ranks of this launch."""


@command.command()
@click.option("--attention", default="auto", show_default=True, help="auto, ring, tree, hybrid, or all.")
@click.option("--new", type=int, default=4096, show_default=True, help="Tokens with queries.")
@click.option("--stored", type=int, default=0, show_default=True, help="Tokens before them, with keys only.")
@click.option("--query-heads", type=int, default=8, show_default=True)
@click.option("--kv-heads", type=int, default=8, show_default=True)
@click.option("--head-dim", type=int, default=64, show_default=True)
@click.option("--segments", type=int, default=2, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@device_option
@repeat_option
@topology_file
@leaf_file
@click.option("--trace", type=FILE, help="Write what every rank did when, for chrome://tracing.")
@click.option("--plot", type=FILE, help="Draw it: FILE.png, FILE.svg or FILE.pdf.")
def attention(
    attention: str,
    new: int,
    stored: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    segments: int,
    dtype: str,
    device: str,
    repeat: int,
    topology_file: Path | None,
    leaf_file: Path | None,
    trace: Path | None,
    plot: Path | None,
) -> None:
    """One layer's attention of random tokens: measured against predicted, and how much of the transfers is hidden."""
    import torch

    from cpmpi.attention.schedule import KINDS
    from cpmpi.comm import ranks as launched
    from cpmpi.comm.device import choose_device, set_threads
    from cpmpi.cost.attention_bench import AttentionBench
    from cpmpi.cost.choose import choose, schedule_on
    from cpmpi.cost.price import price
    from cpmpi.cost.shape import AttentionShape
    from cpmpi.kernels.select import select
    from cpmpi.text import seconds_text, table

    ranks = launched.start()
    kinds = ranks.together(_kinds, attention)
    if plot is not None:
        ranks.together(_require_drawing, plot)
    on = ranks.together(choose_device, ranks, device)
    set_threads(ranks)
    number = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]

    def make_shape() -> AttentionShape:
        return AttentionShape(
            new=new, stored=stored, query_heads=query_heads, kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim,
            itemsize=number.itemsize, segments=segments, stored_segments=segments,
        )  # fmt: skip

    shape = ranks.together(_users, make_shape)
    topology = _topology(ranks, topology_file, leaf_file)
    bench = AttentionBench(ranks.comm, topology, select(on, number, head_dim=head_dim), on)
    rates = bench.rates(shape, number)
    if attention == "auto":
        choice = ranks.together(_users, lambda: choose(topology, shape, rates))
        kinds = (choice.schedule.kind,)
        if ranks.is_root:
            click.echo(f"attention: {choice.reason}")
    rows, last = [], None
    for kind in [k for k in KINDS if k in kinds]:
        schedule = schedule_on(kind, topology, shape.asking(topology.world))
        predicted = ranks.together(_users, partial(price, schedule, topology, shape, rates))
        last = m = bench.run(schedule, shape, number, repeat)
        rows.append(_row(kind, m, predicted))
    bench.close()
    if ranks.is_root:
        assert last is not None
        click.echo(
            f"{topology.world} ranks on {len(topology.nodes)} nodes, {new:,} new tokens after {stored:,}, "
            f"{query_heads} query and {kv_heads} KV heads of {head_dim}, {dtype}; kernel {bench.backend.name}: "
            f"{rates.attention_flops / 1e9:,.3g} GFLOP/s a rank, a call {seconds_text(rates.call_s)}"
        )
        click.echo(table(HEADER, rows, left=1))
        if trace is not None:
            from cpmpi.timeline.intervals import save_trace

            save_trace(last.intervals, trace)
        if plot is not None:
            from cpmpi.timeline.plot import draw

            draw(last.intervals, plot, title=f"{kinds[-1]}, measured")


HEADER = (
    "schedule", "median", "least", "most", "predicted", "compute", "move", "hidden", "of bound", "sent a rank",
    "GFLOP/s",
)  # fmt: skip


def _row(kind: str, m: Measured, predicted: Price) -> tuple[str, ...]:
    from cpmpi.text import seconds_text

    times = (m.seconds, min(m.total_s), max(m.total_s), predicted.total_s, m.compute, m.move)
    return (
        kind, *map(seconds_text, times), f"{m.hidden:.0%}", f"{m.bound_share:.0%}", f"{m.sent_bytes / 1e6:,.3g} MB",
        f"{m.flops / m.seconds / 1e9:,.3g}",
    )  # fmt: skip


@command.command()
@device_option
@repeat_option
@topology_file
@leaf_file
def transport(device: str, repeat: int, topology_file: Path | None, leaf_file: Path | None) -> None:
    """Messages of every rank to the next, all at once: time, GB/s, and how much hides behind longer computing."""
    from cpmpi.comm import ranks as launched
    from cpmpi.comm.device import choose_device, set_threads
    from cpmpi.comm.transport import MPITransport
    from cpmpi.cost.attention_bench import ordered, overlap
    from cpmpi.text import seconds_text, table

    ranks = launched.start()
    on = ranks.together(choose_device, ranks, device)
    set_threads(ranks)
    topology = _topology(ranks, topology_file, leaf_file)
    comm = ordered(ranks.comm, topology)
    wires = MPITransport(comm)
    measured = [overlap(comm, wires, n_bytes, on, repeat) for n_bytes in SIZES]
    wires.close()
    comm.Free()
    if ranks.is_root:
        rows = []
        for m in measured:
            times = map(seconds_text, (m.move_s, m.compute_s, m.both_s))
            rows.append((f"{m.n_bytes:,}", *times, f"{m.hidden:.0%}", f"{m.n_bytes / m.move_s / 1e9:.3g}"))
        click.echo(f"{topology.world} ranks, each to the next along the rings, all at once; medians of {repeat}")
        click.echo(table(("bytes", "move", "compute", "both", "hidden", "GB/s a rank"), rows))


def _kinds(attention: str) -> tuple[str, ...]:
    from cpmpi.attention.schedule import KINDS
    from cpmpi.errors import UserError

    if attention not in ("auto", "all", *KINDS):
        raise UserError(f"unknown schedule {attention!r}: choose one of auto, all, {', '.join(KINDS)}")
    return (attention,) if attention in KINDS else KINDS


def _users(work: Callable[[], T]) -> T:
    """The result of ``work()``; its ValueError is the user's."""
    from cpmpi.errors import UserError

    try:
        return work()
    except ValueError as error:
        raise UserError(str(error)) from None


def _require_drawing(path: Path) -> None:
    from cpmpi.topology.plot import require_matplotlib

    _users(lambda: require_matplotlib(path))


def _topology(ranks: Ranks, topology_file: Path | None, leaf_file: Path | None) -> Topology:
    """The saved description, or the one discovered and measured now. Collective."""
    from cpmpi.comm.ranks import AgreedError
    from cpmpi.jobs.topology import load
    from cpmpi.topology.discover import discover, require_match

    try:
        if topology_file is None:
            return discover(ranks.comm, leaf_file=leaf_file)
        topology: Topology = ranks.on_root(load, topology_file)
        require_match(ranks.comm, topology)
        return topology
    except AgreedError:
        raise
    except ValueError as error:  # of all ranks
        raise AgreedError(str(error)) from error
