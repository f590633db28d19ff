"""A model's linear layers, computed by the faster of two libraries that multiply matrices in float32 on a CPU.

The libraries differ in the order of sums, so the choice must not change between two starts of the same job: what a run
began with is kept in it, and rates that were measured once are kept for the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

import torch

from cpmpi.comm.ranks import Ranks
from cpmpi.kernels.products import ONEDNN, TORCH, onednn_linear, onednn_works, product_rates
from cpmpi.model.kept_rates import rates_of

LEAST_GAIN = 1.2  # from which on oneDNN is taken: less may be noise


@dataclass(frozen=True, kw_only=True)
class Products:
    """The library that multiplies, and why."""

    library: str
    reason: str

    def __str__(self) -> str:
        return f"linear layers: {self.library}'s matrix products, {self.reason}"


def choose_products(
    model: torch.nn.Module, device: torch.device, ranks: Ranks, *, recorded: str | None = None
) -> Products:
    """The library for plain linear layers: oneDNN where it is right and faster on every rank. Collective.

    Args:
        model: its parameters may be on the meta device.
        device: that it computes on.
        ranks: who has to agree.
        recorded: the library that the run was begun with, which is taken again where every rank has it.
    """
    plain = list(_plain(model))
    if device.type != "cpu" or not plain:
        return Products(library=TORCH, reason="the only one for this device and type")
    largest = max(plain, key=lambda m: (m.in_features * m.out_features, m.in_features))
    shape = largest.in_features, largest.out_features
    if not all(ranks.comm.allgather(onednn_works(*shape))):
        changed = "; the run was begun with oneDNN" if recorded == ONEDNN else ""
        return Products(library=TORCH, reason=f"oneDNN is missing or not exact here{changed}")
    if recorded in (TORCH, ONEDNN):
        return Products(library=recorded, reason="as the run was begun")
    subject = f"float32 products, {shape[0]} inputs, {shape[1]} outputs"
    flops, note = rates_of(ranks, device, subject, (TORCH, ONEDNN), lambda: product_rates(*shape))
    gain = flops[ONEDNN] / flops[TORCH]
    return Products(library=ONEDNN if gain >= LEAST_GAIN else TORCH, reason=f"oneDNN is {gain:.2f} times as fast{note}")


def use_products(model: torch.nn.Module, products: Products) -> None:
    """Let plain linear layers multiply by the chosen library; others, and experts, keep what they have."""
    if products.library == ONEDNN:
        for module in _plain(model):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _plain(model: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            yield module


def _forward(module: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return onednn_linear(input, module.weight, module.bias)
