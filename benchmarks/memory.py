"""Peak memory of a rank beside the formula that a job prints, and their ratio.

    python benchmarks/memory.py --tokens 8192 32768

Each length runs in a process of its own. What is compared is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Measure each length and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.tokens[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for tokens in asked.tokens:
            line = [sys.executable, __file__, "--one", folder, "--tokens", str(tokens)]
            print(subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip(), flush=True)


def make(folder: Path) -> None:
    """Save a random Llama of two wide layers."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8, head_dim=128,
        num_key_value_heads=4, vocab_size=512, sliding_window=None, max_position_embeddings=1 << 20,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """The formula's bytes and the peak of a document's forward on one rank."""
    import numpy as np
    import torch
    from mpi4py import MPI

    from cpmpi.checkpoint import Checkpoint
    from cpmpi.engine import Engine
    from cpmpi.layout import Layout
    from cpmpi.memory import parts_of, plan
    from cpmpi.probe import backends_of, probe
    from cpmpi.progress import Progress
    from cpmpi.schedule import Schedule
    from cpmpi.transport import MPITransport
    from cpmpi.weights import weight_bytes

    device, dtype = torch.device("cpu"), torch.float32
    checkpoint = Checkpoint(folder)
    skeleton = checkpoint.skeleton(dtype)
    layers = probe(skeleton)
    parts = parts_of(
        layers, tokens=tokens, world=1, hidden_size=1024, intermediate_size=2048, vocab_size=512, chunk_tokens=1024,
        dtype=dtype, keep_kv=False,
    )  # fmt: skip
    formula = plan(parts, weight_bytes(skeleton), choice="resident", limit=None, available=0)
    engine = Engine(
        rank=0, weights=checkpoint.weights(dtype, device, stream=False), layers=layers, device=device,
        schedule=Schedule(kind="ring", nodes=[[0]], parents=[None]), transport=MPITransport(MPI.COMM_SELF),
        backends=backends_of(layers, device), progress=Progress(enabled=False),
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 512, tokens)
    engine.score(ids, Layout(n_tokens=tokens, world=1), "document")
    peak = peak_bytes()
    megabytes = {name: round(size / 1e6) for name, size in formula.parts.items() if size}
    return {"tokens": tokens, "peak_mb": round(peak / 1e6), "formula_mb": round(formula.total / 1e6),
            "ratio": round(peak / formula.total, 3), "parts_mb": megabytes}  # type: ignore[dict-item]  # fmt: skip


def peak_bytes() -> int:
    """The most memory this process has held; getrusage's number may be that of the process that started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
