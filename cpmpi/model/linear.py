"""A model's linear layers, computed by the faster of two libraries that multiply matrices in float32 on a CPU."""

from __future__ import annotations

from types import MethodType

import torch

from cpmpi.comm.ranks import Ranks
from cpmpi.kernels.products import onednn_gain, onednn_linear

LEAST_GAIN = 1.2  # from which on it is taken: less may be noise


def use_fast_products(model: torch.nn.Module, device: torch.device, ranks: Ranks) -> str:
    """Let plain linear layers multiply by oneDNN where that is faster on every rank; one line for the log. Collective.

    Layers of other classes, other types and experts keep what they have.

    Args:
        model: its parameters may be on the meta device, if they are streamed.
        device: that it computes on.
        ranks: who has to agree.
    """
    plain = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32]
    if device.type != "cpu" or not plain:
        return "linear layers: torch's own matrix products"
    largest = max(plain, key=lambda m: (m.in_features * m.out_features, m.in_features))
    gain: float = min(ranks.comm.allgather(onednn_gain(largest.in_features, largest.out_features)))
    if gain < LEAST_GAIN:
        return f"linear layers: torch's own matrix products (oneDNN's would be {gain:.2f} times as fast)"
    for module in plain:
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    return f"linear layers: oneDNN's matrix products, {gain:.2f} times as fast as torch's own"


def _forward(module: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return onednn_linear(input, module.weight, module.bias)
