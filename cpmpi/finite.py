"""Which layer made a number that is NaN or infinite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from cpmpi.weights import finite

LAYER = re.compile(r"\D*\.\d+")  # "layers.3", "decoder.layers.3", not "layers.3.experts.0"


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
            if LAYER.fullmatch(name):
                hook = module.register_forward_hook(lambda _, __, output, name=name: check(name, output))
                hooks.callback(hook.remove)
        yield
