"""The main job against one transformers process, against the arithmetic, and against itself on one rank.

    python -m benchmarks.main_job [--tokens 8192 16384] [--pairs 3] [--dtype float32]

A Llama of 55 million parameters with random weights and tokens, both sides in one type. Each figure is the time of a
whole document, without starting Python and reading weights, after a short warm-up document. The two sides take turns in
processes of their own, so that a drifting machine hits both alike; ratios are taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HEAD_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def flops(self, tokens: int) -> tuple[float, float]:
        """Multiplications and additions of one document: in matrix products, and in causal attention."""
        heads = (self.heads + self.kv_heads) * self.head_dim
        per_layer = self.hidden * (2 * heads + 3 * self.intermediate)
        attention = self.layers * 2 * tokens * (tokens + 1) * self.heads * self.head_dim
        return 2 * tokens * (self.layers * per_layer + self.hidden * self.vocabulary), attention


SIZES = Sizes(hidden=512, intermediate=1408, layers=8, heads=8, kv_heads=2, head_dim=64, vocabulary=32_000)


def make_inputs(folder: Path, lengths: list[int]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SIZES.hidden, num_hidden_layers=SIZES.layers, num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.kv_heads, intermediate_size=SIZES.intermediate, vocab_size=SIZES.vocabulary,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for n in {512, *lengths}:
        np.save(folder / f"{n}.npy", np.random.default_rng(n).integers(0, SIZES.vocabulary, n))


def transformers_worker(folder: Path, tokens: int, dtype: str) -> None:
    """One process with sdpa, the decoder in one call as transformers does it, the head in chunks."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def score(name: int) -> float:
        ids = torch.as_tensor(np.load(folder / f"{name}.npy"))
        began = time.perf_counter()
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for i in range(0, len(ids) - 1, HEAD_CHUNK):
            target = ids[i + 1 : i + 1 + HEAD_CHUNK]
            logits = model.lm_head(hidden[i : i + len(target)])
            torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
        return time.perf_counter() - began

    score(512)
    emit(seconds=score(tokens))


def cpmpi_worker(folder: Path, tokens: int, dtype: str, tp: int) -> None:
    """The job itself, KV written to disk included."""
    from cpmpi.comm.ranks import start
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.run import run

    ranks = start()
    inputs = tuple(str(folder / f"{n}.npy") for n in (512, tokens))
    output = folder / f"run-{ranks.size}-{tp}"
    options = JobOptions(
        model=folder / "model", inputs=inputs, output=output, dtype=dtype, tp=tp, overwrite=True, quiet=True
    )
    seconds = run(options).seconds
    peaks = ranks.comm.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if ranks.is_root and peaks is not None:
        emit(seconds=seconds[1], peak_bytes=max(peaks))


def rates_worker(sizes: Sizes, dtype: str) -> None:
    """FLOP/s of matrix products and of attention on one thread of each rank at once, in shapes of this model.

    Attention is that of the kernel that a job takes.

    Measured on all ranks at the same time: a core alone may be faster than two that share a processor.
    """
    import torch
    from mpi4py import MPI

    from cpmpi.kernels.mask import Mask
    from cpmpi.kernels.select import select

    torch.set_num_threads(1)
    heads, kv_heads, dim, kind = sizes.heads, sizes.kv_heads, sizes.head_dim, getattr(torch, dtype)
    x, w = torch.randn(1024, sizes.hidden).to(kind), torch.randn(sizes.intermediate, sizes.hidden).to(kind)
    q_THD, k_SGD = torch.randn(2048, heads, dim).to(kind), torch.randn(8192, kv_heads, dim).to(kind)
    backend = select("cpu", kind, head_dim=dim, heads=(heads, kv_heads))
    options: dict[str, Any] = {"q_start": 8192, "k_start": 0, "mask": Mask(), "scale": dim**-0.5}
    rates: dict[str, list[float]] = {"matmul": [], "attention": []}
    MPI.COMM_WORLD.Barrier()
    ends = time.perf_counter() + 6
    while time.perf_counter() < ends:
        for name, work, count in (
            ("matmul", lambda: torch.nn.functional.linear(x, w), 2 * x.numel() * sizes.intermediate),
            ("attention", lambda: backend.attend(q_THD, k_SGD, k_SGD, **options), 4 * q_THD.numel() * len(k_SGD)),
        ):
            began = time.perf_counter()
            work()
            rates[name].append(count / (time.perf_counter() - began))
    everyone = MPI.COMM_WORLD.gather({name: statistics.median(values) for name, values in rates.items()})
    if everyone is not None:
        emit(**{name: statistics.mean(rank[name] for rank in everyone) for name in rates})


def emit(**figures: float) -> None:
    print("FIGURES " + json.dumps(figures), flush=True)


def worker(
    arguments: list[str], ranks: int = 0, threads: int = 1, module: str = "benchmarks.main_job"
) -> dict[str, float]:
    """Start a worker, under mpirun where ranks are given, and read its figures."""
    command = [sys.executable, "-m", "mpi4py", "-m", module, *arguments]
    if ranks:
        beside = Path(sys.executable).with_name("mpirun")
        mpirun = str(beside) if beside.exists() else "mpirun"
        command = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *command]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, **as_root, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    figures: dict[str, float] = json.loads(lines[0].removeprefix("FIGURES "))
    return figures


def in_ranks(
    module: str, description: str | None, measure: Callable[[Path, int, int], None], *, tokens: int, rounds: int
) -> tuple[argparse.Namespace, dict[str, float]] | None:
    """Run a benchmark's ``measure(folder, tokens, rounds)`` on ranks of its own.

    Args:
        module: of the benchmark, which calls this both where it is started and, as a rank, where it measures.
        description: of the command.
        measure: prints its figures with `emit`.
        tokens, rounds: defaults of the options.

    Returns:
        What was asked for, and the figures; None in a rank.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure(asked.one, asked.tokens, asked.rounds)
        return None
    with tempfile.TemporaryDirectory(prefix="cpmpi-bench-") as name:
        make_inputs(Path(name), [asked.tokens])
        line = ["--one", name, "--tokens", str(asked.tokens), "--rounds", str(asked.rounds)]
        return asked, worker(line, ranks=asked.ranks, module=module)


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def compare(folder: Path, tokens: int, pairs: int, dtype: str) -> None:
    theirs, ours, alone, shared, bounds, peaks = [], [], [], [], [], {1: [], 2: []}
    for _ in range(pairs):
        rates = worker(["rates", dtype], ranks=2)
        theirs.append(worker(["transformers", str(folder), str(tokens), dtype], threads=2)["seconds"])
        for n, times in ((2, ours), (1, alone)):
            figures = worker(["cpmpi", str(folder), str(tokens), dtype, "1"], ranks=n)
            times.append(figures["seconds"])
            peaks[n].append(figures["peak_bytes"])
        shared.append(worker(["cpmpi", str(folder), str(tokens), dtype, "2"], ranks=2)["seconds"])
        products, attention = SIZES.flops(tokens)
        bounds.append((products / rates["matmul"] + attention / rates["attention"]) / 2)
        print(f"  rates {rates['matmul'] / 1e9:.0f} and {rates['attention'] / 1e9:.0f} GFLOP/s a thread", flush=True)
    print(f"{tokens} tokens, {dtype}, {pairs} pairs; median (least to most)")
    print(f"  transformers, 2 threads            {summary(theirs)} s")
    print(f"  cpmpi prefill, 2 ranks x 1 thread  {summary(ours)} s")
    print(f"  cpmpi prefill, 1 rank x 1 thread   {summary(alone)} s")
    print(f"  times faster than transformers     {summary([a / b for a, b in zip(theirs, ours)])}")
    print(f"  share of the arithmetic's bound    {summary([a / b for a, b in zip(bounds, ours)])}")
    print(f"  efficiency from 1 to 2 ranks       {summary([a / (2 * b) for a, b in zip(alone, ours)])}")
    print(f"  --tp 2 on 2 ranks over --tp 1      {summary([a / b for a, b in zip(shared, ours)])}")
    for n, values in peaks.items():
        print(f"  peak memory, {n} rank(s)             {statistics.median(values) / 1e6:.0f} MB a rank", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cpmpi-bench-"))
    try:
        make_inputs(folder, arguments.tokens)
        for tokens in arguments.tokens:
            compare(folder, tokens, arguments.pairs, arguments.dtype)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rates"]:
        rates_worker(SIZES, sys.argv[2])
    elif sys.argv[1:2] == ["transformers"]:
        transformers_worker(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["cpmpi"]:
        cpmpi_worker(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
