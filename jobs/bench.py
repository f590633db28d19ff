"""``cpmpi bench``: measure parts of the job on the ranks that it is launched on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cpmpi.choices import AUTO, DTYPES, SCHEDULES
from cpmpi.errors import told, told_to_the_user
from cpmpi.jobs.options import job_option
from cpmpi.jobs.selftest import command as selftest

if TYPE_CHECKING:
    from cpmpi.cost.attention_bench import AttentionBench, Measured
    from cpmpi.cost.price import Price
    from cpmpi.cost.rates import Rates
    from cpmpi.cost.shape import AttentionShape

T = TypeVar("T")
ALL = "all"
FILE = click.Path(path_type=Path)
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)  # bytes
LEAST = click.IntRange(min=1)
topology_file = click.option("--topology", "topology_file", type=FILE, help="Saved description.  [default: discover]")
leaf_file = click.option("--leaf-file", type=FILE, help="Nodes by switch, in the format of topology.conf.")
repeat_option = click.option("--repeat", type=LEAST, default=3, show_default=True, help="Repetitions.")


@click.group("bench")
def command() -> None:
    """Try what a job needs on the ranks of this launch, or measure attention across them, or messages."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What ``cpmpi bench attention`` is asked for."""

    attention: str
    new: int
    stored: int
    query_heads: int
    kv_heads: int
    head_dim: int
    segments: int
    dtype: str
    device: str
    transport: str
    repeat: int
    topology_file: Path | None
    leaf_file: Path | None
    trace: Path | None
    plot: Path | None


@command.command()
@job_option("attention", type=click.Choice([AUTO, *SCHEDULES, ALL]), help="Schedules to measure.")
@click.option("--new", type=LEAST, default=4096, show_default=True, help="Tokens with queries.")
@click.option("--stored", type=click.IntRange(min=0), default=0, show_default=True,
              help="Tokens before them, with keys only.")  # fmt: skip
@click.option("--query-heads", type=LEAST, default=8, show_default=True)
@click.option("--kv-heads", type=LEAST, default=8, show_default=True)
@click.option("--head-dim", type=LEAST, default=64, show_default=True)
@job_option("segments")
@job_option("dtype", type=click.Choice(DTYPES), default="float32", help="Of queries, keys and values.")
@job_option("device")
@job_option("transport")
@repeat_option
@topology_file
@leaf_file
@job_option("trace")
@job_option("plot")
def attention(**options: Any) -> None:
    """One layer's attention of random tokens: measured against predicted, and how much of the transfers is hidden."""
    from cpmpi.comm import ranks as launched
    from cpmpi.comm.carrier import choose_carrier
    from cpmpi.comm.device import choose_device, set_threads
    from cpmpi.cost.attention_bench import AttentionBench
    from cpmpi.cost.choose import choose, schedule_on
    from cpmpi.cost.price import price
    from cpmpi.jobs.topology import described
    from cpmpi.kernels.select import select
    from cpmpi.model.checkpoint import DTYPES as TORCH_DTYPES
    from cpmpi.timeline.files import check_files, save_files

    asked = Asked(**options)
    ranks = launched.start()
    ranks.on_root(check_files, plot=asked.plot, trace=asked.trace)
    on = ranks.together(choose_device, ranks, asked.device)
    set_threads(ranks)
    number = TORCH_DTYPES[asked.dtype]
    shape = ranks.together(shape_of, asked, number.itemsize)
    topology = described(ranks, asked.topology_file, asked.leaf_file)
    carrier = choose_carrier(ranks, topology, on, asked.transport)
    backend = ranks.together(told, select, on, number, head_dim=asked.head_dim)
    bench = AttentionBench(ranks.comm, topology, backend, carrier)
    rates = bench.rates(shape, number)
    kinds = SCHEDULES if asked.attention in (AUTO, ALL) else (asked.attention,)
    if asked.attention == AUTO:
        choice = ranks.on_root(priced, choose, topology, shape, rates)
        kinds = (choice.schedule.kind,)
        if ranks.is_root:
            click.echo(f"attention: {choice.reason}")
    rows, last = [], None
    for kind in kinds:
        schedule = schedule_on(kind, topology, shape.asking(topology.world))
        predicted = ranks.on_root(priced, price, schedule, topology, shape, rates)
        last = m = bench.run(schedule, shape, number, asked.repeat)
        rows.append(row_of(kind, m, predicted))
    bench.close()
    assert last is not None
    title = f"{kinds[-1]}, measured"
    if ranks.is_root:
        print_rows(asked, bench, rates, rows)
    ranks.on_root(save_files, last.intervals, plot=asked.plot, trace=asked.trace, title=title)


HEADER = (
    "schedule", "median", "least", "most", "predicted", "compute", "move", "hidden", "of bound", "sent a rank",
    "GFLOP/s",
)  # fmt: skip


def shape_of(asked: Asked, itemsize: int) -> AttentionShape:
    """The attention that is asked for."""
    from cpmpi.cost.shape import AttentionShape

    return AttentionShape(
        new=asked.new, stored=asked.stored, query_heads=asked.query_heads, kv_heads=asked.kv_heads,
        key_dim=asked.head_dim, value_dim=asked.head_dim, itemsize=itemsize, segments=asked.segments,
        stored_segments=asked.segments,
    )  # fmt: skip


def priced(work: Callable[..., T], *args: Any) -> T:
    """The result of ``work(*args)``; a bandwidth that nobody knows is for the user to measure or to give."""
    from cpmpi.topology.describe import UnknownBandwidthError

    with told_to_the_user(kinds=(UnknownBandwidthError,)):
        return work(*args)


def row_of(kind: str, m: Measured, predicted: Price) -> tuple[str, ...]:
    """A schedule's line of the table: one cell for each word of ``HEADER``."""
    from cpmpi.text import seconds_text

    times = (m.seconds, min(m.total_s), max(m.total_s), predicted.total_s, m.compute, m.move)
    return (
        kind, *map(seconds_text, times), f"{m.hidden:.0%}", f"{m.bound_share:.0%}", f"{m.sent_bytes / 1e6:,.3g} MB",
        rate_text(m.flops / m.seconds / 1e9),
    )  # fmt: skip


def rate_text(rate: float) -> str:
    """A rate with three digits, and with all of those before the point."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


def print_rows(asked: Asked, bench: AttentionBench, rates: Rates, rows: Sequence[Sequence[str]]) -> None:
    """Say what was measured, and the table."""
    from cpmpi.text import counted, seconds_text, table

    topology = bench.topology
    click.echo(
        f"{counted(topology.world, 'rank')} on {counted(len(topology.nodes), 'node')}, {asked.new:,} new tokens "
        f"after {asked.stored:,}, {asked.query_heads} query and {asked.kv_heads} KV heads of {asked.head_dim}, "
        f"{asked.dtype}; kernel {bench.backend.name}: {rate_text(rates.attention_flops / 1e9)} GFLOP/s a rank, "
        f"{seconds_text(rates.call_s)} to start"
    )
    click.echo(table(HEADER, rows, left=1))


@command.command()
@job_option("device")
@job_option("transport")
@repeat_option
@topology_file
@leaf_file
def transport(device: str, transport: str, repeat: int, topology_file: Path | None, leaf_file: Path | None) -> None:
    """Messages of every rank to the next, all at once: time, GB/s, and how much hides behind longer computing."""
    from cpmpi.comm import ranks as launched
    from cpmpi.comm.carrier import choose_carrier
    from cpmpi.comm.device import choose_device, set_threads
    from cpmpi.cost.attention_bench import ordered, overlap
    from cpmpi.jobs.topology import described
    from cpmpi.text import counted, seconds_text, table

    ranks = launched.start()
    on = ranks.together(choose_device, ranks, device)
    set_threads(ranks)
    topology = described(ranks, topology_file, leaf_file)
    comm = ordered(ranks.comm, topology)
    carrier = choose_carrier(ranks, topology, on, transport)
    wires = carrier.connect(comm)
    measured = [overlap(comm, wires, n_bytes, on, repeat) for n_bytes in SIZES]
    wires.close()
    comm.Free()
    if ranks.is_root:
        rows = []
        for m in measured:
            times = map(seconds_text, (m.move_s, m.compute_s, m.both_s))
            rows.append((f"{m.n_bytes:,}", *times, f"{m.hidden:.0%}", f"{m.n_bytes / m.move_s / 1e9:.3g}"))
        many = counted(topology.world, "rank")
        click.echo(f"{many}, each to the next along the rings, all at once; medians of {repeat}; {carrier}")
        click.echo(table(("bytes", "move", "compute", "both", "hidden", "GB/s a rank"), rows))


command.add_command(selftest)
