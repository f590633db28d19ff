"""A checkpoint four times larger than the memory it may use, streamed, against the same with resident weights.

    python benchmarks/weights.py --tokens 16384

A random Mistral is made in a temporary folder, its weights four times the memory limit that the streamed job gets. Both
jobs run on one rank in processes of their own, in turn, and each reads the weights from the disk: the page cache has to
forget them first. Prints a line of JSON: seconds of the document (resident weights are loaded before it), their ratio,
peak memory and what the plan said, and whether the results are equal bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.memory import peak_bytes

TIMES_THE_LIMIT = 4
VOCABULARY = 512


def main() -> None:
    """Measure both ways and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", choices=["resident", "stream"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.folder, asked.one, asked.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), asked.layers, asked.hidden)
        runs: dict[str, list[dict[str, float]]] = {"resident": [], "stream": []}
        for _ in range(asked.repeats):
            for way, found in runs.items():
                line = [sys.executable, "-m", "benchmarks.weights", "--one", way, "--folder", folder]
                done = subprocess.run([*line, "--tokens", str(asked.tokens)], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        limit = weight_bytes(Path(folder)) // TIMES_THE_LIMIT
    seconds = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
    print(
        json.dumps(
            {
                "tokens": asked.tokens,
                "weights_mb": round(limit * TIMES_THE_LIMIT / 1e6),
                "limit_mb": round(limit / 1e6),
                "seconds": {way: [round(run["seconds"], 2) for run in found] for way, found in runs.items()},
                "ratio": round(seconds["stream"] / seconds["resident"], 3),
                "peak_mb": {way: round(max(run["peak"] for run in found) / 1e6) for way, found in runs.items()},
                "plan_mb": {way: round(max(run["plan"] for run in found) / 1e6) for way, found in runs.items()},
                "equal": len({run["digest"] for found in runs.values() for run in found}) == 1,
            }
        )
    )


def make(folder: Path, layers: int, hidden: int) -> None:
    """Save a random Mistral with a wide MLP and a window, so that most of its arithmetic is products with weights."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=hidden, intermediate_size=8 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 128,
        num_key_value_heads=2, vocab_size=VOCABULARY, sliding_window=1024, max_position_embeddings=1 << 20,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def weight_bytes(folder: Path) -> int:
    """Bytes of the checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: Path, way: str, tokens: int) -> dict[str, float]:
    """Seconds of a document, bytes that this process held at most and by the plan, and a digest of the results."""
    import numpy as np

    from cpmpi.comm.ranks import start
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared
    from cpmpi.run.reader import open_run

    document, output = folder / "document.npy", folder / f"run-{way}"
    np.save(document, np.random.default_rng(0).integers(0, VOCABULARY, tokens))
    forget(folder)
    job = prepare(
        JobOptions(
            model=folder, inputs=(str(document),), output=output, keep_kv=False, weights=way, quiet=True,
            overwrite=True, memory_limit=weight_bytes(folder) // TIMES_THE_LIMIT if way == "stream" else None,
        ),
        start(),
    )  # fmt: skip
    (seconds,) = run_prepared(job).seconds.values()
    with open_run(output) as done:
        digest = int(hashlib.sha256(done.documents[0].logprobs.tobytes()).hexdigest()[:12], 16)
    return {"seconds": seconds, "peak": peak_bytes(), "plan": job.decision.memory.total, "digest": digest}


def forget(folder: Path) -> None:
    """Have the page cache drop the weights."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
