"""``cpmpi plan``: what a job will take on a machine, before it is submitted."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpmpi.choices import STORED_DTYPES
from cpmpi.errors import UserError, told, told_to_the_user
from cpmpi.jobs.options import job_option

if TYPE_CHECKING:
    from cpmpi.cost.hardware import Hardware
    from cpmpi.cost.plan import Plan, Request
    from cpmpi.model.size import ModelSize
    from cpmpi.topology.describe import Topology

FILE = click.Path(path_type=Path)
DOES_NOT_FIT = 3  # exit status
HERE = "here"
NONE = "none"
RATES = {
    "matmul_tflops": ("matmul_flops", 1e12),
    "attention_tflops": ("attention_flops", 1e12),
    "disk_gb_per_s": ("disk_gb_per_s", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What ``cpmpi plan`` is asked for."""

    model: Path
    tokens: int
    nodes: int | None
    ranks_per_node: int | None
    topology: str | None
    hardware: str
    attention: str
    segments: int
    tp: int
    chunk_tokens: int
    dtype: str
    kv_dtype: str
    matmul_tflops: float | None
    attention_tflops: float | None
    disk_gb_per_s: float | None
    trace: Path | None
    plot: Path | None

    def __post_init__(self) -> None:
        if self.topology is not None and (self.nodes is not None or self.ranks_per_node is not None):
            raise UserError("give --topology, or --nodes and --gpus-per-node, not both")
        for name in RATES:
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} ({value}) must be positive")


@click.command("plan")
@job_option("model", help="Checkpoint folder or config.json; weights need not be there.")
@click.option("--tokens", type=int, required=True, help="Length of the document.")
@click.option("--nodes", type=int, help="Nodes of the allocation.  [default: 1]")
@click.option("--gpus-per-node", "--ranks-per-node", "ranks_per_node", type=int,
              help="GPUs of each, a rank each, or ranks where there are none.  [default: all GPUs]")  # fmt: skip
@click.option(
    "--topology", metavar="FILE|SPEC", help="Saved description, or nodes=16,gpus=8,leaf=8 and so on, instead."
)
@click.option("--hardware", default="h100", show_default=True,
              help="h100, h200, a100 or cpu; here: this machine, measured in seconds and remembered.")  # fmt: skip
@job_option("attention", help="Schedule of attention across ranks.")
@job_option("segments")
@job_option("tp")
@job_option("chunk_tokens")
@job_option("dtype")
@job_option("kv_dtype", type=click.Choice([NONE, *STORED_DTYPES]), help="Type to store keys and values in.")
@click.option("--matmul-tflops", type=float, help="TFLOP/s of a rank in products, in place of the table's.")
@click.option("--attention-tflops", type=float, help="TFLOP/s of a rank in attention, in place of the table's.")
@click.option("--disk-gb-per-s", type=float, help="GB/s of a node to the file system.  [default: 2]")
@job_option("trace", help="Write one layer's predicted timeline for chrome://tracing.")
@job_option("plot")
def command(**options: Any) -> None:
    """Time by phase, memory, disk and schedule of a document on an allocation; exit status 3 where it does not fit."""
    from cpmpi.cost.plan import make_plan, mends, plan_text
    from cpmpi.timeline.files import check_files
    from cpmpi.topology.describe import UnknownBandwidthError

    asked = Asked(**options)
    check_files(plot=asked.plot, trace=asked.trace)
    size, request, machine, chip = prepared(asked)
    with told_to_the_user(kinds=(UnknownBandwidthError,)):
        made = make_plan(size, request, machine, chip)
    click.echo(plan_text(made, size, request, machine, chip))
    save_timeline(asked, made)
    if not made.fits:
        click.echo("error: it does not fit into memory. What would make it fit:", err=True)
        for mend in mends(size, request, machine, chip):
            click.echo(f"  {mend}", err=True)
        sys.exit(DOES_NOT_FIT)
    click.echo("fits")


def prepared(asked: Asked) -> tuple[ModelSize, Request, Topology, Hardware]:
    """The model's size, what is to be done, the machine, and one rank's share of it.

    Raises:
        UserError: a file cannot be read, or a name or a number is none.
    """
    import torch

    from cpmpi.choices import AUTO, DTYPES, one_of
    from cpmpi.cost.hardware import hardware
    from cpmpi.cost.plan import Request
    from cpmpi.model.checkpoint import Blueprint
    from cpmpi.model.size import model_size

    blueprint = Blueprint(asked.model)
    table = None if asked.hardware == HERE else hardware(asked.hardware)
    device = table.device if table is not None else "cuda" if torch.cuda.is_available() else "cpu"
    own = str(blueprint.compute_dtype(asked.dtype, torch.device(device))).removeprefix("torch.")
    request = Request(
        tokens=asked.tokens, dtype=one_of(f"--dtype {AUTO}: {asked.model} is in", own, DTYPES),
        segments=asked.segments, tp=asked.tp, attention=asked.attention, chunk_tokens=asked.chunk_tokens,
        kv_dtype=None if asked.kv_dtype == NONE else asked.kv_dtype,
    )  # fmt: skip
    machine = machine_of(asked, table.machine if table is not None else "dgx-h100" if device == "cuda" else "cpu-2s")
    size = model_size(blueprint, request.dtype, asked.tokens)
    chip = measured_here(size, request, machine) if table is None else table.computing_in(request.dtype)
    given = {
        field: value * unit for name, (field, unit) in RATES.items() if (value := getattr(asked, name)) is not None
    }
    return size, request, machine, replace(chip, **given)


def measured_here(size: ModelSize, request: Request, machine: Topology) -> Hardware:
    """This machine, as one of as many ranks as the first node of ``machine`` has; says when it was measured."""
    from cpmpi.cost.here import Work, hardware_here
    from cpmpi.cost.plan import attention_shape

    kind = size.layers[0][0]
    shape = attention_shape(kind, request)
    work = Work(
        query_heads=shape.query_heads, kv_heads=shape.kv_heads, key_dim=shape.key_dim, value_dim=shape.value_dim,
        block=shape.block(machine.world), hidden=size.hidden, inner=size.inner // request.tp,
        chunk_tokens=request.chunk_tokens, dtype=request.dtype,
    )  # fmt: skip
    chip, when = hardware_here(work, len(machine.nodes[0].ranks), Path.cwd())
    click.echo(f"hardware: {when}")
    return chip


def machine_of(asked: Asked, kind: str) -> Topology:
    """The saved description, or one that is generated."""
    import torch

    from cpmpi.topology.describe import Topology
    from cpmpi.topology.synthetic import synthetic

    if asked.topology is not None:
        if asked.topology.endswith(".json") and not Path(asked.topology).is_file():
            raise UserError(f"--topology {asked.topology}: no such file")
        return told(Topology.load if Path(asked.topology).is_file() else synthetic, asked.topology)
    gpus = kind != "cpu-2s"
    each = asked.ranks_per_node
    if each is None and asked.hardware == HERE:
        each = torch.cuda.device_count() if gpus else 1
    ranks = "" if each is None else f",{'gpus' if gpus else 'ranks'}={each}"
    return told(synthetic, f"machine={kind},nodes={1 if asked.nodes is None else asked.nodes}{ranks}")


def save_timeline(asked: Asked, made: Plan) -> None:
    """Write the files that are asked for.

    Raises:
        UserError: there is no timeline, or the file system refuses.
    """
    from cpmpi.timeline.files import save_files

    if asked.trace is None and asked.plot is None:
        return
    if not made.price.intervals:
        raise UserError("a ring this long is priced by its first steps and has no timeline; plan fewer ranks")
    title = f"{made.schedule} on {made.ranks} ranks, {asked.tokens:,} tokens, one layer, predicted"
    save_files(made.price.intervals, plot=asked.plot, trace=asked.trace, title=title)
