"""The job on one rank against transformers, in float32 and in bfloat16, in processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.bf16 [--tokens 2048 4096] [--turns 3] [--dtypes float32 bfloat16]

The model and the inputs of `benchmarks.main_job`. Both sides run in this process with as many threads, one document at
a time and in turns; the processor seconds of the process count, so that other work on the machine moves ratios little.
Wall-clock time on several ranks: ``python -m benchmarks.main_job --dtype bfloat16``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.main_job import HEAD_CHUNK, make_inputs, summary


def transformers_scorer(folder: Path, dtype: str) -> Callable[[int], None]:
    """As in `benchmarks.main_job`: sdpa, the decoder in one call, the head in chunks."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def score(tokens: int) -> None:
        ids = torch.as_tensor(np.load(folder / f"{tokens}.npy"))
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for i in range(0, len(ids) - 1, HEAD_CHUNK):
            target = ids[i + 1 : i + 1 + HEAD_CHUNK]
            logits = model.lm_head(hidden[i : i + len(target)])
            torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")

    return score


def job_scorer(folder: Path, dtype: str) -> Callable[[int], None]:
    """What a job does for each document, without its start and its files."""
    import numpy as np
    import torch

    from cpmpi.attention.layout import Layout
    from cpmpi.attention.schedule import Schedule
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import start
    from cpmpi.comm.transport import MPITransport
    from cpmpi.engine.score import Engine
    from cpmpi.model.checkpoint import Checkpoint
    from cpmpi.model.linear import choose_products, use_products
    from cpmpi.model.probe import backends_of, probe

    ranks, device = start(), torch.device("cpu")
    checkpoint = Checkpoint(folder / "model")
    skeleton = checkpoint.skeleton(getattr(torch, dtype))
    layers = probe(skeleton)
    backends = backends_of(layers, device, ranks)
    print(f"{dtype}: kernel {backends[0].name}: {backends[0].reason}", flush=True)
    weights = checkpoint.weights(checkpoint.reader(skeleton, device), stream=False)
    chosen = choose_products(weights.model, device, ranks)
    use_products(weights.model, chosen)
    print(chosen)
    engine = Engine(
        rank=0, layers=layers, weights=weights,
        schedule=Schedule(kind="ring", nodes=[[0]], parents=[None]), transport=MPITransport(ranks.comm),
        backends=backends, device=device, progress=Progress(enabled=False),
    )  # fmt: skip

    def score(tokens: int) -> None:
        engine.score(np.load(folder / f"{tokens}.npy"), Layout(n_tokens=tokens, world=1), "document")

    return score


def seconds(score: Callable[[int], None], tokens: int) -> float:
    began = time.process_time()
    score(tokens)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cpmpi-bench-"))
    try:
        make_inputs(folder, arguments.tokens)
        for dtype in arguments.dtypes:
            ours, theirs = job_scorer(folder, dtype), transformers_scorer(folder, dtype)
            for tokens in (512, *arguments.tokens):
                pairs = [(seconds(theirs, tokens), seconds(ours, tokens)) for _ in range(arguments.turns)]
                if tokens == 512:
                    continue  # a warm-up
                print(f"{tokens} tokens, {dtype}, {len(pairs)} pairs; processor seconds, median (least to most)")
                print(f"  transformers       {summary([a for a, _ in pairs])}")
                print(f"  cpmpi, one rank    {summary([b for _, b in pairs])}")
                print(f"  times faster       {summary([a / b for a, b in pairs])}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
