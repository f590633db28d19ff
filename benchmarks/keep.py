"""What the scores beside log-probabilities cost: the same document without, and with each of them.

    python -m benchmarks.keep [--tokens 2048] [--rounds 5]

The model and the document are those of ``benchmarks.main_job`` (vocabulary 32,000; a narrow model: the wider it is, the
smaller the share of what is computed from its logits). One process with one rank; all ways take turns in each round, so
that a drifting machine hits them alike; ratios to the way without are taken round by round, and of the least of each,
which a busy machine disturbs less. Seconds are processor time of the whole document, from its first layer to the marks
in run.h5.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.main_job import make_inputs

WAYS = ("", "rank", "greedy", "entropy", "moments", "topk=5", "topk=20", "ids")


def measure(folder: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the document, by way and round."""
    from cpmpi.engine import run as job
    from cpmpi.engine.options import JobOptions

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    score, took = job.score_document, [0.0]

    def timed(*arguments):  # type: ignore[no-untyped-def]
        began = time.process_time()
        found = score(*arguments)
        took[0] = time.process_time() - began
        return found

    job.score_document = timed
    for length in (512, *[tokens] * rounds):
        for way in WAYS:
            keep = {"": (), "ids": (f"ids={folder / 'ids.txt'}",)}.get(way, (way,))
            options = JobOptions(
                model=folder / "model", inputs=(str(folder / f"{length}.npy"),), output=folder / "run", keep=keep,
                keep_kv=False, checkpoint="off", overwrite=True, quiet=True,
            )  # fmt: skip
            job.run(options)
            if length == tokens:
                seconds[way].append(took[0])
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cpmpi-keep-") as name:
        folder = Path(name)
        make_inputs(folder, [arguments.tokens])
        (folder / "ids.txt").write_text(" ".join(map(str, range(0, 32_000, 2000))))
        seconds = measure(folder, arguments.tokens, arguments.rounds)
    print(f"{arguments.tokens:,} tokens, {arguments.rounds} rounds in turns, processor time")
    for way, each in seconds.items():
        ratios = [a / b for a, b in zip(each, seconds[""], strict=True)]
        more = f"{100 * (statistics.median(ratios) - 1):+.1f}% ({', '.join(f'{100 * (r - 1):+.1f}' for r in ratios)})"
        least = f"least {min(each):.2f} s, {100 * (min(each) / min(seconds['']) - 1):+.1f}%"
        print(
            f"{way or 'log-probabilities alone':>24}  {statistics.median(each):6.2f} s  {more if way else ''}  {least}"
        )


if __name__ == "__main__":
    main()
