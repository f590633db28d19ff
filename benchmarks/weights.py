"""Streamed against resident weights in one run: seconds, their ratio, peak memory, and whether the results are equal.

    python benchmarks/weights.py --tokens 16384

A random Llama is made in a temporary folder. Each way runs in a process of its own, in turn, ``--repeats`` times.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Measure both ways and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", choices=["resident", "stream"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.folder, asked.one, asked.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weight_bytes = make(Path(folder), asked.layers, asked.hidden)
        runs: dict[str, list[dict[str, float]]] = {"resident": [], "stream": []}
        for _ in range(asked.repeats):
            for way, found in runs.items():
                line = [sys.executable, __file__, "--one", way, "--folder", folder, "--tokens", str(asked.tokens)]
                found.append(json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout))
    best = {way: min(run["seconds"] for run in found) for way, found in runs.items()}
    print(
        json.dumps(
            {
                "tokens": asked.tokens,
                "weights_mb": round(weight_bytes / 1e6),
                "seconds": {way: round(seconds, 2) for way, seconds in best.items()},
                "ratio": round(best["stream"] / best["resident"], 3),
                "peak_mb": {way: round(found[0]["peak"] / 1e6) for way, found in runs.items()},
                "equal": len({run["digest"] for found in runs.values() for run in found}) == 1,
            }
        )
    )


def make(folder: Path, layers: int, hidden: int) -> int:
    """Save a random Llama; the bytes of its weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=1 << 20,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(weight.nbytes for weight in model.parameters())


def measure(folder: Path, way: str, tokens: int) -> dict[str, float]:
    """Seconds of a document, peak memory of this process in bytes, and a digest of the results."""
    import hashlib

    import numpy as np
    import torch
    from mpi4py import MPI

    from cpmpi.checkpoint import Checkpoint
    from cpmpi.engine import Engine
    from cpmpi.layout import Layout
    from cpmpi.probe import backends_of, probe
    from cpmpi.progress import Progress
    from cpmpi.schedule import Schedule
    from cpmpi.transport import MPITransport

    device, dtype = torch.device("cpu"), torch.float32
    checkpoint = Checkpoint(folder)
    layers = probe(checkpoint.skeleton(dtype))
    weights = checkpoint.weights(dtype, device, stream=way == "stream")
    engine = Engine(
        rank=0, layers=layers, schedule=Schedule(kind="ring", nodes=[[0]], parents=[None]),
        transport=MPITransport(MPI.COMM_SELF), backends=backends_of(layers, device), device=device, weights=weights,
        progress=Progress(enabled=False),
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 512, tokens)
    started = time.perf_counter()
    scores = engine.score(ids, Layout(n_tokens=tokens, world=1), "document")
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    digest = int(hashlib.sha256(scores.logprobs.numpy().tobytes()).hexdigest()[:12], 16)
    return {"seconds": seconds, "peak": peak, "digest": digest}


def peak_bytes() -> int:
    """The most memory this process has held; getrusage's number may be that of the process that started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
