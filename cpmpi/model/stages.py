"""In which stages of a document the modules of a model run.

The chunks of a document meet at every attention, so the time between two meetings is a *stage*: the second half of one
layer and the first half of the next, for all chunks. Stage s lies before attention s; a model of L attentions has
stages 0 to L. A model without weights shows in which stages each module runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpmpi.model.attention_call import Call
from cpmpi.model.forward import Chunk, layer_major
from cpmpi.model.head import decoder_of
from cpmpi.model.probe import TOKENS, ImaginedValues, no_attention

IN_LAYER = re.compile(r"\.\d+\.")


class Stages(NamedTuple):
    """The stages in which something is used, both included."""

    first: int
    last: int


@torch.inference_mode()
def stages_of(causal_lm: torch.nn.Module) -> dict[str, Stages]:
    """The stages in which each module of the decoder runs, by name; modules that do not run are left out."""
    spans: dict[str, Stages] = {}
    stage = 0

    def note(layer: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        nonlocal stage
        stage = layer + 1
        return no_attention(layer, calls)

    def begins(name: str) -> None:
        spans[name] = Stages(min(stage, spans[name].first) if name in spans else stage, stage)

    def ends(name: str) -> None:
        spans[name] = Stages(spans[name].first, stage)

    hooks = []
    for name, module in causal_lm.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begins(name)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: ends(name)))
    try:
        with ImaginedValues():  # type: ignore[no-untyped-call]
            ids_T = torch.zeros(TOKENS, dtype=torch.int64)
            layer_major(decoder_of(causal_lm), [Chunk(ids_T, 0)], TOKENS, note)
    finally:
        for hook in hooks:
            hook.remove()
    return spans


def stages_of_all(parameters: Sequence[str], spans: dict[str, Stages]) -> Stages | None:
    """When some parameters are used, if all of them belong to layers."""
    found = [span for name in parameters if (span := _stages_of(name, spans))]
    if len(found) < len(parameters):
        return None
    return Stages(min(span.first for span in found), max(span.last for span in found))


def _stages_of(parameter: str, spans: dict[str, Stages]) -> Stages | None:
    """As long as the parameter's module runs, or the nearest one around it."""
    name = parameter.rpartition(".")[0]
    while IN_LAYER.search(f"{name}."):
        if name in spans:
            return spans[name]
        name = name.rpartition(".")[0]
    return None
