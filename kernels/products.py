"""Matrix products with a weight in float32 on the CPU: torch's own (MKL's), or oneDNN's where those are faster.

On an AMD EPYC with AVX-512 oneDNN's run at 2.3 times the speed of MKL's; on processors that MKL was made for they do
not. Both compute in float32 and differ in the order of sums. Half-precision products are oneDNN's anyway.

Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear as torch_linear

TORCH, ONEDNN = "torch", "oneDNN"
TOKENS, LARGEST = 256, 2048  # of the products that are timed: rows, and at most so many inputs and outputs
TURNS = 4  # the first one warms up, the fastest of the others counts
TOLERANCE = 1e-5
"""Of the sum of K products of numbers about 1, divided by sqrt(K), its size: some 100 units of rounding of float32."""


def onednn_linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` by oneDNN; leading dimensions of ``x`` are free."""
    y_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
    return y_TN


def onednn_works(inputs: int, outputs: int) -> bool:
    """Whether oneDNN multiplies on this machine, in float32 as it should."""
    x_TK, weight_NK = _factors(inputs, outputs)
    try:
        error = onednn_linear(x_TK, weight_NK).double() - x_TK.double() @ weight_NK.double().T
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool(error.abs().max() <= TOLERANCE * x_TK.shape[1] ** 0.5)


def product_rates(inputs: int, outputs: int) -> dict[str, float]:
    """FLOP/s of both libraries on this machine, which take turns."""
    x_TK, weight_NK = _factors(inputs, outputs)
    ways: dict[str, Callable[..., torch.Tensor]] = {TORCH: torch_linear, ONEDNN: onednn_linear}
    turns = [[_seconds(way, x_TK, weight_NK) for way in ways.values()] for _ in range(TURNS)][1:]
    flops = 2.0 * x_TK.numel() * len(weight_NK)
    return {name: flops / min(times) for name, times in zip(ways, zip(*turns, strict=True), strict=True)}


def _factors(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a product of this shape, or of the largest one that takes some milliseconds; the same every time."""
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(TOKENS, min(inputs, LARGEST), generator=generator)
    return x_TK, torch.randn(min(outputs, LARGEST), x_TK.shape[1], generator=generator)


def _seconds(way: Callable[..., torch.Tensor], x_TK: torch.Tensor, weight_NK: torch.Tensor) -> float:
    begun = time.perf_counter()
    way(x_TK, weight_NK)
    return time.perf_counter() - begun
