"""A long text after a stored document, dealt over the ranks, against one rank that computes it; all in one launch.

    python -m benchmarks.long_continuation [--tokens 16384] [--long 4096] [--ranks 2] [--repeats 3]

The demo's checkpoint prefills its text once; then a further text is scored after it in both ways by turns, by the
schedule that `auto` chose. Prints a line of JSON: seconds of each (median, least and most), their ratio, and the same
of the processor time of the rank that takes most, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.stored_kv import CHECKPOINT, text_ids


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder is not None:
        measure(asked.folder, asked.tokens, asked.long, asked.repeats)
        return
    from cpmpi.jobs.demo import launcher

    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.long_continuation", "--folder", folder]
        words += [f"--tokens={asked.tokens}", f"--long={asked.long}", f"--repeats={asked.repeats}"]
        threads = str(max(1, (os.cpu_count() or 1) // asked.ranks))
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
        subprocess.run(
            [*launcher(asked.ranks), *words], check=True, env={**os.environ, **as_root, "OMP_NUM_THREADS": threads}
        )


def measure(folder: Path, tokens: int, long: int, repeats: int) -> None:
    """One rank's part; rank 0 prints."""
    from cpmpi.comm.ranks import start
    from cpmpi.engine.contexts import Context, New, open_context, open_stored, prepare_contexts, trunk_of
    from cpmpi.engine.extend import Question
    from cpmpi.engine.options import ContextOptions, JobOptions
    from cpmpi.engine.run import load_engine, run
    from cpmpi.engine.trunk import Joint, judge

    ranks = start()
    ids = text_ids(tokens + long)
    if ranks.is_root:
        np.save(folder / "text.npy", ids[:tokens])
    ranks.comm.Barrier()
    common = {"model": CHECKPOINT, "quiet": True, "allow_longer": True}
    run(JobOptions.of(**common, inputs=folder / "text.npy", output=folder / "run"))
    options = ContextOptions.of(**common, run=folder / "run", kv="memory")
    question = Question(ids[:0], (ids[tokens:],))
    times: dict[str, list[float]] = {"dealt": [], "one_rank": []}
    busy: dict[str, list[float]] = {"dealt": [], "one_rank": []}
    with open_stored(options, ranks) as (stored, checkpoint):
        job = prepare_contexts(options, ranks, stored, checkpoint, New(stored=tokens, longest=long, at_once=long))
        with load_engine(job) as engine:
            context = Context(document=0, n_tokens=tokens, upto=tokens)
            with open_context(job, engine, context) as extension:
                make = partial(trunk_of, job, extension)
                for _ in range(repeats + 1):
                    for name, way in (
                        ("dealt", lambda: judge(make, question, Joint(0, (0,), True))),
                        ("one_rank", lambda: extension.score([question])),
                    ):
                        ranks.comm.Barrier()
                        began, busy_s = time.perf_counter(), time.process_time()
                        way()
                        busy[name].append(max(ranks.comm.allgather(time.process_time() - busy_s)))
                        times[name].append(time.perf_counter() - began)
    if ranks.is_root:
        ends = (statistics.median, min, max)
        found = {"tokens": tokens, "long": long, "ranks": ranks.size, "attention": job.decision.reason}
        for what, taken in (("seconds", times), ("busiest_s", busy)):
            found[what] = {name: [round(f(each[1:]), 3) for f in ends] for name, each in taken.items()}
            pairs = zip(taken["one_rank"][1:], taken["dealt"][1:], strict=True)
            found[f"{what}_one_rank_to_dealt"] = round(statistics.median(a / b for a, b in pairs), 2)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
