"""Weights that are in memory only while they are used: read from the checkpoint as the document goes through the model.

The chunks of a document meet at every attention, so the time between two meetings is a *stage*: the second half of one
layer and the first half of the next, for all chunks. Stage s lies before attention s; a model of L attentions has
stages 0 to L. A probe without weights shows in which stages each module runs. While stage s and attention s are
computed, a thread reads the weights that begin with stage s + 1; those that end with stage s are freed when it is done.
So about two layers are in memory at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from cpmpi.attention_call import Call
from cpmpi.forward import decoder_of, layer_major
from cpmpi.layout import Piece
from cpmpi.memory import WeightBytes
from cpmpi.probe import TOKENS, ImaginedValues, no_attention
from cpmpi.weight_reader import Group, WeightReader

IN_LAYER = re.compile(r"\.\d+\.")


class Span(NamedTuple):
    """The stages in which something is used, both included."""

    first: int
    last: int


class Weights:
    """The weights of a model that stay in memory throughout; the base of those that do not.

    Attributes:
        model: the causal-LM model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def enter(self, stage: int) -> None:
        """The weights of ``stage`` are in place when this returns."""

    def leave(self, stage: int) -> None:
        """``stage`` is done."""

    def close(self) -> None:
        """The document is done."""


class StreamedWeights(Weights):
    """The weights of a model on the meta device, brought and freed stage by stage.

    Args:
        reader: of the model's weights.
        spans: the stages in which the model's modules run.

    Raises:
        UserError: tensors are missing or of the wrong shape (named).
    """

    def __init__(self, reader: WeightReader, spans: dict[str, Span]) -> None:
        super().__init__(reader.model)
        self._weights = reader
        self._spans: list[tuple[Span, Group]] = []
        lasting = []
        for group in reader.groups:
            found = [span for target in group.targets if (span := _streamed_span(target, spans))]
            if len(found) == len(group.targets):
                self._spans.append((Span(min(s.first for s in found), max(s.last for s in found)), group))
            else:
                lasting.append(group)
        self._thread = ThreadPoolExecutor(1, "cpmpi-weights", torch.set_num_threads, (1,))  # the cores are computing
        self._coming: Future[dict[str, torch.Tensor]] | None = None
        reader.load(lasting)

    def enter(self, stage: int) -> None:
        """The weights of ``stage`` are in place when this returns."""
        coming = self._coming or self._read(stage)
        self._weights.install(coming.result())
        self._coming = self._read(stage + 1)

    def leave(self, stage: int) -> None:
        """``stage`` is done: free what ends with it."""
        self._free([group for span, group in self._spans if span.last == stage])

    def close(self) -> None:
        """Free all streamed weights."""
        self._free([group for _, group in self._spans])
        self._coming = None

    def _free(self, groups: Sequence[Group]) -> None:
        self._weights.install({name: self._weights.meta[name] for group in groups for name in group.targets})

    def _read(self, stage: int) -> Future[dict[str, torch.Tensor]]:
        groups = [group for span, group in self._spans if span.first == stage]
        return self._thread.submit(self._weights.read, groups)


@torch.inference_mode()
def spans_of(causal_lm: torch.nn.Module) -> dict[str, Span]:
    """The stages in which each module of the decoder runs, by name; modules that do not run are left out."""
    spans: dict[str, Span] = {}
    stage = 0

    def note(layer: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        nonlocal stage
        stage = layer + 1
        return no_attention(layer, calls)

    def begins(name: str) -> None:
        spans[name] = Span(min(stage, spans[name].first) if name in spans else stage, stage)

    def ends(name: str) -> None:
        spans[name] = Span(spans[name].first, stage)

    hooks = []
    for name, module in causal_lm.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begins(name)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: ends(name)))
    try:
        with ImaginedValues():  # type: ignore[no-untyped-call]
            ids_T = torch.zeros(TOKENS, dtype=torch.int64)
            layer_major(decoder_of(causal_lm), ids_T, [Piece(0, TOKENS)], note)
    finally:
        for hook in hooks:
            hook.remove()
    return spans


def weight_bytes(model: torch.nn.Module) -> WeightBytes:
    """Bytes of a model's weights, from a model without weights; tied ones count once."""
    spans = spans_of(model)
    lasting, used, begun = 0, Counter[int](), Counter[int]()
    for name, weight in model.named_parameters():
        span = _streamed_span(name, spans)
        if span is None:
            lasting += weight.nbytes
        else:
            begun[span.first] += weight.nbytes
            for stage in range(span.first, span.last + 1):
                used[stage] += weight.nbytes
    total = sum(weight.nbytes for weight in model.parameters())
    streamed = max((size + begun[stage + 1] for stage, size in used.items()), default=0)
    return WeightBytes(total=total, lasting=lasting, streamed=streamed)


def _streamed_span(target: str, spans: dict[str, Span]) -> Span | None:
    """When a parameter is used, if it belongs to a layer: as long as its module runs, or the nearest one around it."""
    name = target.rpartition(".")[0]
    while IN_LAYER.search(f"{name}."):
        if name in spans:
            return spans[name]
        name = name.rpartition(".")[0]
    return None
