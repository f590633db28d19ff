"""NaN and infinities: refused by the name of what holds them, or of the layer that made them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from cpmpi.errors import UserError

LAYER_NAME = re.compile(r"\D*\.\d+")  # "layers.3", "decoder.layers.3", not "layers.3.experts.0"


def finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor with NaN or infinities.

    Raises:
        UserError: naming it, and how many of its numbers are not finite.
    """
    if tensor.is_floating_point() and (bad := tensor.numel() - int(tensor.isfinite().sum())):
        raise UserError(f"{name}: {bad} of {tensor.numel()} numbers are NaN or infinite")


@contextmanager
def finite_layers(decoder: torch.nn.Module) -> Iterator[None]:
    """Within it, every layer's output is searched for NaN and infinities.

    Raises:
        UserError: inside the decoder's forward, naming the layer that made them.
    """

    def check(name: str, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                finite(tensor, f"output of {name}")

    with ExitStack() as hooks:
        for name, module in decoder.named_modules():
            if LAYER_NAME.fullmatch(name):
                hook = module.register_forward_hook(lambda _, __, output, name=name: check(name, output))
                hooks.callback(hook.remove)
        yield
