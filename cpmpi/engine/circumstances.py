"""On what machine, by which schedule and with which libraries results are made: written beside them in the run folder.

A job that goes on with a run takes from there what would change the order of sums.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cpmpi.engine.state import Job
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import publish_text


def publish_circumstances(job: Job) -> None:
    """Write ``schedule.json`` and ``topology.json``. On rank 0.

    Raises:
        UserError: they cannot be written.
    """
    paths, decision = RunPaths(job.options.output), job.decision
    summary = {**asdict(decision.schedule), "askers": "all", **asdict(job.place.grid), "segments": job.options.segments}
    kernels = [f"{backend.name}: {backend.reason}" for backend in dict.fromkeys(decision.backends)]
    made = {**summary, "reason": decision.reason, "kernels": kernels, "products": decision.products.library}
    publish_text(paths.schedule, json.dumps(made, indent=1) + "\n")
    publish_text(paths.topology, job.spec.topology + "\n")


def recorded_products(run: Path) -> str | None:
    """The library of linear layers that a run was begun with; None where there is no run, or it does not say."""
    paths = RunPaths.of(run)
    try:
        found = json.loads(paths.schedule.read_text(encoding="utf-8")).get("products") if paths.index.exists() else None
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
