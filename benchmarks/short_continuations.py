"""Short continuations in one pass against one by one, of one document and of many small ones; all in one launch.

    python -m benchmarks.short_continuations [--tokens 16384] [--ranks 2] [--rounds 3]

The demo's checkpoint prefills a text of so many tokens and 32 of 300 tokens. Then 64 continuations of 8 tokens are
scored after the first, and one after each of the others, in both ways by turns. Prints a line of JSON: seconds of each
(median, least and most), and the median of the ratios within the rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.main_job import emit, in_ranks
from benchmarks.stored_kv import CHECKPOINT, text_ids

SMALL, SMALL_TOKENS, MANY, SIZE = 32, 300, 64, 8


def measure(folder: Path, tokens: int, rounds: int) -> None:
    """One rank's part; rank 0 prints."""
    from cpmpi.comm.ranks import start
    from cpmpi.engine.contexts import MOST_TOGETHER, Context, New, open_contexts, open_stored, prepare_contexts
    from cpmpi.engine.extend import Question
    from cpmpi.engine.options import ContextOptions, JobOptions
    from cpmpi.engine.run import load_engine, run

    ranks = start()
    ids = text_ids(tokens + SMALL * SMALL_TOKENS)
    lengths = [tokens, *[SMALL_TOKENS] * SMALL]
    files = [folder / f"{i:02d}.npy" for i in range(len(lengths))]
    if ranks.is_root:
        for file, part in zip(files, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
            np.save(file, part)
    ranks.comm.Barrier()
    common: dict[str, Any] = {"model": CHECKPOINT, "quiet": True, "allow_longer": True}
    run(JobOptions.of(**common, inputs=files, output=folder / "run"))
    options = ContextOptions.of(**common, run=folder / "run", kv="memory")

    def questions(n: int, context: Any = lambda _: 0) -> list[Question]:
        return [Question(ids[:0], (ids[i * SIZE : (i + 1) * SIZE],), context(i)) for i in range(n)]

    with open_stored(options, ranks) as (stored, checkpoint):
        work = New(stored=tokens, longest=SIZE, at_once=MANY * SIZE)
        job = prepare_contexts(options, ranks, stored, checkpoint, work)
        whole = [Context(document=i, n_tokens=n, upto=n) for i, n in enumerate(lengths)]
        with load_engine(job) as engine:

            def after(contexts: list[Context], asked: list[Question], at_once: int) -> None:
                with open_contexts(job, engine, contexts) as extension:
                    for i in range(0, len(asked), at_once):
                        extension.score(asked[i : i + at_once])

            groups = [whole[i : i + MOST_TOGETHER] for i in range(1, len(whole), MOST_TOGETHER)]
            ways = {
                "one_document_together": lambda: after(whole[:1], questions(MANY), MANY),
                "one_document_one_by_one": lambda: after(whole[:1], questions(MANY), 1),
                "documents_together": lambda: [
                    after(each, questions(len(each), lambda i: i), MOST_TOGETHER) for each in groups
                ],
                "documents_one_by_one": lambda: [after([each], questions(1), 1) for each in whole[1:]],
            }
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for round_ in range(rounds + 1):  # the first one warms up
                for name, way in ways.items():
                    ranks.comm.Barrier()
                    began = time.perf_counter()
                    way()
                    ranks.comm.Barrier()
                    if round_:
                        taken[name].append(time.perf_counter() - began)
    if ranks.is_root:
        found: dict[str, Any] = {"ranks": ranks.size, "tokens": tokens, "attention": job.decision.schedule.kind}
        for name, each in taken.items():
            found[name] = [round(f(each), 3) for f in (statistics.median, min, max)]
        for name in ("one_document", "documents"):
            pairs = zip(taken[f"{name}_one_by_one"], taken[f"{name}_together"], strict=True)
            found[f"{name}_times_faster"] = round(statistics.median(a / b for a, b in pairs), 2)
        emit(**found)


if __name__ == "__main__":
    if done := in_ranks("benchmarks.short_continuations", __doc__, measure, tokens=16384, rounds=3):
        print(json.dumps(done[1]))
