"""``cpmpi lm-eval``: lm-evaluation-harness with the checkpoint on all ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

NAME = "cpmpi"  # of the model, for the harness
COMMANDS = ("run", "ls", "validate")  # of the harness


@click.command(name="lm-eval", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="OPTIONS OF THE HARNESS...")
def command(arguments: tuple[str, ...]) -> None:
    """Evaluate a checkpoint on the tasks of lm-evaluation-harness.

    All options are the harness' own (cpmpi lm-eval run --help lists them), and its model is the checkpoint folder in
    --model_args: mpirun -n 4 cpmpi lm-eval --model_args pretrained=DIR --tasks TASK. Documents are scored whole, and
    not in windows; further --model_args are the options of cpmpi score, such as tp=2 or dtype=bfloat16
    (docs/lm-eval.md).
    """
    from cpmpi.comm.ranks import AgreedError, start

    words = [word for word in arguments if word != "--debug"]
    if importlib.util.find_spec("lm_eval") is None:
        raise AgreedError("lm-evaluation-harness is not installed: pip install 'cpmpi[eval]'")
    harness, parsed = parse(words)
    if not hasattr(parsed, "model_args"):  # a command of the harness that needs no model
        if start().is_root:
            harness.execute(parsed)
        return
    problem = evaluate(harness, parsed)
    if problem is not None:
        raise AgreedError(problem)


def parse(words: Sequence[str]) -> tuple[Any, Any]:
    """The harness' command line, and what it makes of these words; the same on all ranks.

    Raises:
        UsageError: they cannot be, in the harness' words.
    """
    from lm_eval._cli import HarnessCLI

    if words[:1] and words[0] in COMMANDS:
        first, *rest = words
    else:
        first, rest = "run", list(words)
    more = ["--model", NAME] if first == "run" else []
    before, said = sys.argv, io.StringIO()
    sys.argv = ["lm-eval", first, *more, *rest]
    try:
        harness = HarnessCLI()
        with contextlib.redirect_stderr(said):
            parsed = harness.parse_args()
    except SystemExit as end:
        if not end.code:
            raise
        raise click.UsageError(said.getvalue().strip().rpartition("error: ")[2]) from None
    finally:
        sys.argv = before
    if first == "run" and parsed.model != NAME:
        raise click.UsageError(f"--model {parsed.model}: here the model is {NAME}; lm-eval itself runs others")
    if getattr(parsed, "trust_remote_code", False):
        raise click.UsageError("--trust_remote_code: a checkpoint's or data set's own code is never run; leave it out")
    return harness, parsed


def evaluate(harness: Any, parsed: Any) -> str | None:
    """Run the harness on rank 0, and follow it on the others; what went wrong, on all ranks. Collective."""
    from lm_eval.api.registry import register_model
    from lm_eval.utils import setup_logging

    from cpmpi.engine.harness import CpmpiLM, following
    from cpmpi.errors import UserError, told_to_the_user

    lead = following()
    if not lead.ranks.is_root:
        return lead.follow()
    os.environ["LOCAL_RANK"] = "0"  # whoever started this may have meant others: this rank writes the results
    setup_logging()
    register_model(NAME)(CpmpiLM)
    problem = None
    try:
        with told_to_the_user():
            harness.execute(parsed)
    except UserError as error:
        if lead.broken:
            raise
        problem = str(error)
    lead.end(problem)
    return problem
