"""What a job says: at its start what is going to happen, at its end what came out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from cpmpi.choices import OFF
from cpmpi.engine.results_table import results_text
from cpmpi.engine.score import Scores
from cpmpi.engine.state import Job
from cpmpi.run.reader import open_run
from cpmpi.run.writer import ShardWriter
from cpmpi.text import counted, human_bytes, shown
from cpmpi.topology.text import summary
from cpmpi.version import __version__


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job that is done, and the seconds that each document took, by its place in the run (none for those finished
    before)."""

    job: Job
    seconds: Mapping[int, float]
    failed: Mapping[int, str] = field(default_factory=dict)
    """Documents without a result, also of an earlier start, and why."""


def introduce(job: Job) -> None:
    """Say what is going to happen, before it does."""
    place, spec, say = job.place, job.spec, job.progress.say
    tokens = sum(d.n_tokens for d in spec.documents)
    checkpoint = job.inputs.checkpoint
    own = str(checkpoint.text_config_value("dtype") or "float32").removeprefix("torch.")
    kv = "no KV kept"
    if spec.kv is not None:
        kv = f"KV kept as {spec.kv.dtype}, {human_bytes(tokens * spec.kv.bytes_per_token)}"
    where = f"{counted(place.threads, 'thread')} each" if job.model.device.type == "cpu" else "one device each"
    say(f"cpmpi {__version__}: {counted(place.ranks.size, 'rank')} on {job.model.device.type}, {where}")
    say(summary(place.topology))
    if place.ranks.size > 1:
        say(str(place.carrier))
    say(
        f"model {job.options.model}: {checkpoint.config.model_type}, {counted(len(place.layers), 'layer')}, "
        f"stored as {own}, computed in {spec.dtype}; {kv}"
    )
    if job.options.tp > 1:
        say(str(place.grid))
    say(f"attention: {job.decision.reason}")
    for backend in dict.fromkeys(job.decision.backends):
        say(f"kernel {backend.name}: {backend.reason}")
    if place.blocks.reason and job.options.checkpoint != OFF:
        after = [block + 1 for block in sorted(place.blocks.whole)]
        where = f"only after layers {after[0]} to {after[-1]}" if after else "none"
        say(f"checkpoints inside a document: {where}: {place.blocks.reason}")
    say(str(job.decision.memory))
    say(f"{counted(len(spec.documents), 'document')}, {counted(tokens, 'token')}")
    if spec.scoring.context:
        say(f"{spec.scoring.windows}; a document that is interrupted begins again")


def log_document(scores: Scores, writer: ShardWriter | None, name: str) -> None:
    """A line in this rank's log."""
    parts = {**scores.seconds, **({"writer blocked": writer.stats.blocked_s} if writer is not None else {})}
    text = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in parts.items())
    logging.getLogger("cpmpi").info("document %r: %d tokens here; %s", name, len(scores.positions), text)


def print_results(outcome: Outcome) -> None:
    """The results as a table, on standard output of rank 0."""
    if not outcome.job.ranks.is_root:
        return
    folder = outcome.job.options.output
    with open_run(folder) as done:
        print(results_text(done.documents, outcome.seconds))
    print(f"run folder: {shown(folder)}")
