"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cpmpi.errors import UserError

FOLDER = click.Path(path_type=Path)
SHARED = [
    click.option("--model", required=True, type=FOLDER, help="Hugging Face checkpoint folder (safetensors)."),
    click.option(
        "--input", "inputs", required=True, multiple=True, metavar="FILE...",
        help="Text files, folders, globs, .jsonl (id, and text or token_ids), .npy token ids.",
    ),
    click.argument("more_inputs", nargs=-1, metavar=""),
    click.option("--output", required=True, type=FOLDER, help="Run folder. The same command again resumes."),
    click.option(
        "--attention", type=click.Choice(["auto", "ring", "tree", "hybrid"]), default="auto", show_default=True,
        help="Schedule of attention across ranks; all are exact.",
    ),
    click.option(
        "--segments", type=click.IntRange(min=1), default=2, show_default=True, help="Segments a document is cut into."
    ),
    click.option(
        "--tp", type=click.IntRange(min=1), default=1, show_default=True,
        help="Ranks of a node that share the weights (tensor parallelism); divides the heads.",
    ),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
        help="Type to compute in; auto: float32 on CPUs, the checkpoint's own on GPUs.",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option(
        "--weights", type=click.Choice(["auto", "resident", "stream"]), default="auto", show_default=True,
        help="Keep all weights in memory, or a layer at a time; auto: as memory allows.",
    ),
    click.option(
        "--memory-limit", metavar="SIZE", help="What a rank may use, such as 8GB.  [default: its share of free memory]"
    ),
    click.option("--check-finite", is_flag=True, help="Stop at NaN or infinities in weights or layers, by name."),
    click.option(
        "--chunk-tokens", type=click.IntRange(min=1), default=1024, show_default=True,
        help="Tokens per pass through a layer.",
    ),
    click.option(
        "--special-tokens/--no-special-tokens", default=None,
        help="Whether the tokenizer adds its special tokens.  [default: as the tokenizer does]",
    ),
    click.option("--allow-longer", is_flag=True, help="Allow documents beyond the checkpoint's position limit."),
    click.option("--overwrite", is_flag=True, help="Delete a run that is in the output folder first."),
    click.option("--trace", type=FOLDER, help="Write what every rank did when, for chrome://tracing."),
    click.option("--plot", type=FOLDER, help="Draw it: FILE.png, FILE.svg or FILE.pdf."),
    click.option("--quiet", is_flag=True, help="No progress, results only."),
]  # fmt: skip


def document_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the jobs that take a model and documents."""
    for option in reversed(SHARED):
        command = option(command)
    return command


def run_documents(
    more_inputs: tuple[str, ...], inputs: tuple[str, ...], memory_limit: str | None, **options: Any
) -> None:
    """Run the main job with the options of the command line."""
    from cpmpi.engine.job import run
    from cpmpi.engine.options import JobOptions
    from cpmpi.jobs.options import parse_bytes

    limit = None if memory_limit is None else parse_bytes(memory_limit)
    command = shlex.join(["cpmpi", *sys.argv[1:]])
    run(JobOptions(inputs=(*inputs, *more_inputs), command=command, memory_limit=limit, **options))


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GB, 800MB or 1.5TB.

    Raises:
        UserError: it is no size.
    """
    number = text.strip().lower().removesuffix("b")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = float(number.removesuffix(unit)) * UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"--memory-limit {text}: not a size such as 8GB or 800MB") from None
    if not 0 < size < float("inf"):
        raise UserError(f"--memory-limit {text}: must be more than nothing")
    return int(size)
