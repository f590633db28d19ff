"""On what machine, by which schedule and with which libraries results are made: written beside them in the run folder.

A job that goes on with a run takes from there what would change the order of sums.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpmpi.choices import SCHEDULES
from cpmpi.engine.state import Prepared
from cpmpi.errors import UserError
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import publish_text
from cpmpi.run.sealed_json import read_sealed, sealed_json


def publish_circumstances(job: Prepared, output: Path) -> None:
    """Write ``schedule.json`` and ``topology.json`` of the job whose results are written to ``output``. On rank 0.

    Raises:
        UserError: they cannot be written.
    """
    paths, decision, topology = RunPaths(output), job.decision, job.place.topology.to_json() + "\n"
    summary = {**asdict(decision.schedule), "askers": "all", **asdict(job.place.grid), "segments": job.options.segments}
    kernels = [f"{backend.name}: {backend.reason}" for backend in dict.fromkeys(decision.backends)]
    made = {**summary, "reason": decision.reason, "kernels": kernels, "products": decision.products.library}
    made["chunk_tokens"] = job.options.chunk_tokens
    publish_text(paths.topology, topology)
    publish_text(paths.schedule, sealed_json(made, topology=topology))


def recorded_products(run: Path) -> str | None:
    """The library of linear layers that a run was begun with; None where there is no run, or it does not say."""
    found = _recorded(run).get("products")
    return found if isinstance(found, str) else None


def recorded_schedule(run: Path, world: int) -> str | None:
    """The kind of schedule that a run was begun with on so many ranks of a head group; None where there is none."""
    found = _recorded(run)
    try:
        same = sum(map(len, found["nodes"])) == world and found["kind"] in SCHEDULES
    except (KeyError, TypeError):
        return None
    return str(found["kind"]) if same else None


def recorded_options(run: Path) -> dict[str, Any]:
    """The options of the job that made a run which decide in what order is added; those that it says."""
    found = _recorded(run)
    names = {"kind": "attention", "segments": "segments", "tp": "tp", "chunk_tokens": "chunk_tokens"}
    return {option: found[name] for name, option in names.items() if name in found}


def _recorded(run: Path) -> dict[str, Any]:
    """``schedule.json`` of a run; empty where there is none, or it is damaged."""
    paths = RunPaths.of(run).whole
    try:
        return read_sealed(paths.schedule) if paths.index.exists() else {}
    except UserError:
        return {}
