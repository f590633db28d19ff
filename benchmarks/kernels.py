"""Attention kernels against matrix products, as ratios from one run.

Run ``OMP_NUM_THREADS=1 python benchmarks/kernels.py``. Candidates take turns and the best of the turns counts, in
processor time, so that other work on the machine moves the ratios little. Arithmetic is 4 D operations for each visible
pair and query head.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from cpmpi.kernels.mask import Mask
from cpmpi.kernels.partial import merge_
from cpmpi.kernels.select import named

TURNS = 3
SHAPES = [(64, 8, 2), (64, 8, 8), (128, 32, 8), (128, 8, 8)]
OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

PRODUCTS_GFLOP = 4 * 2 * 1024**3 / 1e9


def race(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of processor time of each candidate, the best of some turns."""
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(TURNS):
        for name, candidate in candidates.items():
            start = time.process_time()
            candidate()
            best[name] = min(best[name], time.process_time() - start)
    return best


def products() -> Callable[[], object]:
    """Four 1024-cubed float32 matrix products, PRODUCTS_GFLOP of arithmetic."""
    a, b = torch.randn(2, 1024, 1024)
    return lambda: [a @ b for _ in range(4)]


def attention(dim: int, heads: int, kv_heads: int, queries: int, keys: int, q_start: int, mask: Mask) -> None:
    """One line: backends and the bare operator on strided views, as shares of the matrix product's speed."""
    q_THD = torch.randn(queries, heads, dim)
    k_SGD, v_SGD = torch.randn(2, keys, kv_heads, dim)
    scale = dim**-0.5
    options: dict[str, Any] = {"q_start": q_start, "k_start": 0, "mask": mask, "scale": scale}
    candidates: dict[str, Callable[[], object]] = {
        "matmul": products(),
        "cpu": lambda: named("cpu").attend(q_THD, k_SGD, v_SGD, **options),
        "blocked": lambda: named("blocked").attend(q_THD, k_SGD, v_SGD, **options),
    }
    if mask == Mask():
        views = [x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD)]
        candidates["bare operator"] = lambda: OPERATOR(*views, 0.0, q_start == 0, scale=scale)
    seconds = race(candidates)
    gflop = 4 * dim * heads * mask.pairs(range(q_start, q_start + queries), range(keys)) / 1e9
    peak = PRODUCTS_GFLOP / seconds.pop("matmul")
    shares = "  ".join(f"{name} {gflop / s / peak:4.0%}" for name, s in seconds.items())
    kind = f"window {mask.window}" if mask.window else "causal" if q_start == 0 else "full"
    print(
        f"D={dim:<3} H={heads:<2} G={kv_heads} T={queries:<4} S={keys:<4} {kind:<11} "
        f"{gflop / seconds['cpu']:4.0f} of {peak:.0f} GF/s  {shares}",
        flush=True,
    )


def merging() -> None:
    """What one merge costs, also as the number of keys whose arithmetic takes as long."""
    out_THE, other_THE = torch.randn(2, 4096, 8, 64)
    lse_TH, other_TH = torch.randn(2, 4096, 8)
    merge = {"merge": lambda: merge_(out_THE, lse_TH, other_THE, other_TH), "matmul": products()}
    seconds = race(merge)
    keys = seconds["merge"] / seconds["matmul"] * PRODUCTS_GFLOP * 1e9 / (4 * out_THE.numel())
    nanoseconds = seconds["merge"] / out_THE.numel() * 1e9
    print(f"merge: {nanoseconds:.2f} ns for each value of the result, the arithmetic of {keys:.0f} keys")


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for dim, heads, kv_heads in SHAPES:
        for q_start in (4096, 0):
            attention(dim, heads, kv_heads, 4096, 4096, q_start, Mask())
    attention(64, 8, 2, 2048, 2048, 0, Mask())
    attention(64, 8, 2, 256, 4096, 4096, Mask())
    attention(64, 8, 2, 1, 4096, 4096, Mask())
    for window in (128, 1024):
        attention(64, 8, 2, 4096, 4096, 0, Mask(window=window))
    merging()


if __name__ == "__main__":
    main()
