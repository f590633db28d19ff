"""``cpmpi plan``: what a job will take on a machine, before it is submitted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

FILE = click.Path(path_type=Path)


@click.command("plan")
@click.option("--model", type=FILE, required=True, help="Checkpoint folder or config.json; weights need not be there.")
@click.option("--tokens", type=int, required=True, help="Length of the document.")
@click.option("--nodes", type=int, help="Nodes of the allocation.  [default: 1]")
@click.option("--gpus-per-node", type=int, help="GPUs of each, a rank each.  [default: all]")
@click.option(
    "--topology", metavar="FILE|SPEC", help="Saved description, or nodes=16,gpus=8,leaf=8 and so on, instead."
)
@click.option("--hardware", "hardware_name", default="h100", show_default=True, help="h100, h200, a100 or cpu.")
@click.option("--attention", default="auto", show_default=True, help="auto, ring, tree or hybrid.")
@click.option("--segments", type=int, default=2, show_default=True, help="Segments the document is cut into.")
@click.option("--tp", type=int, default=1, show_default=True, help="Ranks of a node that share the weights.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--kv-dtype", default="bfloat16", show_default=True, help="To store keys and values in; none for none.")
@click.option("--matmul-tflops", type=float, help="TFLOP/s of a rank in products, in place of the table's.")
@click.option("--attention-tflops", type=float, help="TFLOP/s of a rank in attention, in place of the table's.")
@click.option("--disk-gb-per-s", type=float, help="GB/s of a node to the file system.  [default: 2]")
@click.option("--trace", type=FILE, help="Write one layer's predicted timeline for chrome://tracing.")
@click.option("--plot", type=FILE, help="Draw it: FILE.png, FILE.svg or FILE.pdf.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(
    model: Path,
    tokens: int,
    nodes: int | None,
    gpus_per_node: int | None,
    topology: str | None,
    hardware_name: str,
    attention: str,
    segments: int,
    tp: int,
    dtype: str,
    kv_dtype: str,
    matmul_tflops: float | None,
    attention_tflops: float | None,
    disk_gb_per_s: float | None,
    trace: Path | None,
    plot: Path | None,
    debug: bool,
) -> None:
    """Time by phase, memory, disk and schedule of a document on an allocation; exit status 1 where it does not fit."""
    del debug  # read by the entry point
    from cpmpi.attention.schedule import KINDS
    from cpmpi.cost.hardware import hardware
    from cpmpi.cost.plan import Request, describe, mends
    from cpmpi.cost.plan import plan as make_plan
    from cpmpi.errors import UserError
    from cpmpi.model.checkpoint import DTYPES, Blueprint
    from cpmpi.model.size import model_size
    from cpmpi.topology.describe import Topology
    from cpmpi.topology.synthetic import synthetic

    try:
        if attention not in ("auto", *KINDS):
            raise UserError(f"unknown schedule {attention!r}: choose one of auto, {', '.join(KINDS)}")
        if kv_dtype not in ("none", *DTYPES):
            raise UserError(f"unknown --kv-dtype {kv_dtype!r}: choose one of none, {', '.join(DTYPES)}")
        if topology is not None and (nodes is not None or gpus_per_node is not None):
            raise UserError("give --topology, or --nodes and --gpus-per-node, not both")
        chip = hardware(hardware_name)
        rates = {"matmul-tflops": matmul_tflops, "attention-tflops": attention_tflops, "disk-gb-per-s": disk_gb_per_s}
        for name, value in rates.items():
            if value is not None and not value > 0:
                raise UserError(f"--{name} ({value}) must be positive")
        if matmul_tflops is not None:
            chip = replace(chip, matmul_flops=matmul_tflops * 1e12)
        if attention_tflops is not None:
            chip = replace(chip, attention_flops=attention_tflops * 1e12)
        if disk_gb_per_s is not None:
            chip = replace(chip, disk_gb_per_s=disk_gb_per_s)
        if topology is None:
            ranks = "" if gpus_per_node is None else f",{'ranks' if hardware_name == 'cpu' else 'gpus'}={gpus_per_node}"
            topology = f"machine={chip.machine},nodes={1 if nodes is None else nodes}{ranks}"
        machine = Topology.load(topology) if Path(topology).is_file() else synthetic(topology)
        request = Request(
            tokens=tokens, dtype=chip.dtype if dtype == "auto" else dtype, segments=segments, tp=tp,
            attention=attention, kv_dtype=None if kv_dtype == "none" else kv_dtype,
        )  # fmt: skip
        size = model_size(Blueprint(model), request.dtype, tokens)
        made = make_plan(size, request, machine, chip)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from None
    click.echo(describe(made, size, request, machine, chip))
    title = f"{made.schedule} on {made.ranks} ranks, {tokens:,} tokens, one layer, predicted"
    if trace is not None or plot is not None:
        if not made.price.intervals:
            raise UserError("a ring this long is priced by its first steps and has no timeline; plan fewer ranks")
        if trace is not None:
            from cpmpi.timeline.intervals import save_trace

            save_trace(made.price.intervals, trace)
        if plot is not None:
            from cpmpi.timeline.plot import draw

            draw(made.price.intervals, plot, title=title)
    if not made.fits:
        click.echo("error: it does not fit into memory. What would make it fit:", err=True)
        for mend in mends(size, request, machine, chip):
            click.echo(f"  {mend}", err=True)
        sys.exit(1)
    click.echo("fits")
