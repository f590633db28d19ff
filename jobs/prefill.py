"""``cpmpi prefill``: log-probabilities and the KV cache of whole documents."""

from __future__ import annotations

from typing import Any

import click

from cpmpi.engine.options import JobOptions
from cpmpi.jobs.options import options_of, run_documents


@click.command(name="prefill")
@options_of(JobOptions, "context", "stride")
def command(**options: Any) -> None:
    """Log-probabilities and the KV cache of whole documents.

    Run it under mpirun or srun for several ranks, or as it is for one. Every document becomes, in the run folder, a
    log-probability for each token, its perplexity, and its keys and values, sharded over the ranks.
    """
    run_documents(keep_kv=True, **options)
