"""What checkpoints inside a document cost: the same document without, at the default interval, as often as the default
ever takes them (writing fills 2% of the time, which is so where a node fails all the time), and after every layer.

    python -m benchmarks.checkpoints [--tokens 8192] [--ranks 2] [--rounds 3]

The model and the document are those of ``benchmarks.main_job``; keys and values are kept. All ways take turns in one
launch, each round in another order, so that a drifting machine hits them alike; ratios to the way without are taken
round by round.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.main_job import emit, in_ranks, summary

WAYS = ("off", "auto", "most", "0")


def measure(folder: Path, tokens: int, rounds: int) -> None:
    """Run all ways in turn on the ranks of this launch; rank 0 prints the seconds of each document."""
    from mpi4py import MPI

    from cpmpi.engine import pace
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.run import run
    from cpmpi.run import hidden

    comm, written, writing_s = MPI.COMM_WORLD, dict.fromkeys(WAYS, 0), []
    write = hidden.write_part
    way, length = WAYS[0], tokens

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        written[way] += length == tokens
        began = time.perf_counter()
        part = write(*args, **kwargs)
        writing_s.append(time.perf_counter() - began)
        return part

    hidden.write_part, failure_s = counted, pace.NODE_FAILURE_S
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for i, length in enumerate((512, *[tokens] * rounds)):
        for way in (*WAYS[i % len(WAYS) :], *WAYS[: i % len(WAYS)]):
            pace.NODE_FAILURE_S = 0.0 if way == "most" else failure_s
            options = JobOptions(
                model=folder / "model", inputs=(str(folder / f"{length}.npy"),), output=folder / "run",
                checkpoint="auto" if way == "most" else way, attention="ring", overwrite=True, quiet=True,
            )  # fmt: skip
            took = run(options).seconds[0]
            if length == tokens:
                seconds[way].append(took)
    if comm.rank == 0:
        figures = {f"{way} {i}": s for way, all_s in seconds.items() for i, s in enumerate(all_s)}
        counts = {f"written {way}": count / rounds for way, count in written.items()}
        emit(**figures, **counts, write_s=max(writing_s))


def main() -> None:
    """Start the ranks and print what they found."""
    answer = in_ranks("benchmarks.checkpoints", __doc__, measure, tokens=8192, rounds=3)
    if answer is None:
        return
    asked, found = answer
    seconds = {way: [found[f"{way} {i}"] for i in range(asked.rounds)] for way in WAYS}
    print(f"{asked.tokens} tokens on {asked.ranks} ranks, {asked.rounds} rounds; median (least to most)")
    for way, values in seconds.items():
        ratios = summary([a / b for a, b in zip(values, seconds["off"], strict=True)])
        count = found[f"written {way}"]
        print(
            f"  --checkpoint {way:5} {summary(values)} s, {ratios} of off; {count:.1f} checkpoints a document and rank"
        )
    print(f"  a rank's file takes up to {found['write_s']:.3f} s to write")


if __name__ == "__main__":
    main()
