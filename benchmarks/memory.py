"""Peak memory of every rank of a real job beside what its start line says, and their ratio.

    python benchmarks/memory.py --tokens 8192 32768 131072 --ranks 1 2

A random Mistral of three wide layers, whose window keeps attention short; each job keeps KV and runs in processes of
its own. What is compared is the peak of the whole process, Python and torch with it. Prints a line of JSON a job.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

VOCABULARY = 512


def main() -> None:
    """Run a job for each length and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", choices=["resident", "stream"], default="resident")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure(asked.one, asked.tokens[0], asked.weights)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for tokens in asked.tokens:
            for ranks in asked.ranks:
                line = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
                line += [sys.executable, "-m", "mpi4py", __file__, "--one", folder, "--tokens", str(tokens)]
                done = subprocess.run([*line, "--weights", asked.weights], capture_output=True, text=True, check=True)
                print(next(text for text in done.stdout.splitlines() if text.startswith("{")), flush=True)


def make(folder: Path) -> None:
    """Save a random Mistral of three wide layers."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8, head_dim=128,
        num_key_value_heads=4, vocab_size=VOCABULARY, sliding_window=1024,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measure(folder: Path, tokens: int, weights: str) -> None:
    """Run the job on the ranks of this launch; rank 0 prints the formula's bytes and the peaks."""
    import numpy as np
    from mpi4py import MPI

    from cpmpi.comm.ranks import start
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared

    comm = MPI.COMM_WORLD
    document, output = folder / f"{tokens}.npy", folder / f"run-{tokens}-{comm.size}"
    if comm.rank == 0:
        np.save(document, np.random.default_rng(0).integers(0, VOCABULARY, tokens))
    comm.Barrier()
    options = JobOptions(
        model=folder, inputs=(str(document),), output=output, weights=weights, attention="ring", quiet=True,
        overwrite=True,
    )  # fmt: skip
    job = prepare(options, start())
    run_prepared(job)
    formula = job.decision.memory
    peaks = comm.gather(peak_bytes())
    totals = comm.gather(formula.total)
    if comm.rank == 0:
        assert peaks is not None
        assert totals is not None
        found = {
            "tokens": tokens, "ranks": comm.size, "weights": weights,
            "peak_mb": [round(peak / 1e6) for peak in peaks], "formula_mb": [round(total / 1e6) for total in totals],
            "ratio": [round(peak / total, 3) for peak, total in zip(peaks, totals, strict=True)],
            "parts_mb": {name: round(size / 1e6) for name, size in formula.parts.items() if size},
        }  # fmt: skip
        print(json.dumps(found))


def peak_bytes() -> int:
    """The most memory this process has held; getrusage's number may be that of the process that started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
