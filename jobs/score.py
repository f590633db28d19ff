"""``cpmpi score``: log-probabilities of whole documents, nothing else kept."""

from __future__ import annotations

from typing import Any

import click

from cpmpi.engine.options import JobOptions
from cpmpi.jobs.options import options_of, run_documents


@click.command(name="score")
@options_of(JobOptions, "kv_dtype")
def command(**options: Any) -> None:
    """Log-probabilities of whole documents.

    Like prefill, without storing keys and values: one layer's are in memory at a time.
    """
    run_documents(keep_kv=False, **options)
