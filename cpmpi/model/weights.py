"""Weights that are in memory only while they are used: read from the checkpoint as the document goes through the model.

While a stage (see `cpmpi.model.stages`) and the attention after it are computed, a thread reads the weights that begin
with the next stage; those that end with a stage are freed when it is done. So about two layers are in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cpmpi.model.weight_reader import Group, WeightReader


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of a model's weights: all of them, those outside of layers, and most of what streaming the rest holds."""

    total: int
    lasting: int
    streamed: int


class Weights:
    """The weights of a model that stay in memory throughout; the base of those that do not.

    Attributes:
        model: the causal-LM model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def begin(self, stage: int, done: Sequence[str] = ()) -> None:
        """A document begins with ``stage``, whose weights are in place when this returns; those of the modules in
        ``done`` are not needed."""

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
    """

    def __init__(self, reader: WeightReader) -> None:
        super().__init__(reader.model)
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, "cpmpi-weights", torch.set_num_threads, (1,))  # the cores are computing
        self._coming: Future[dict[str, torch.Tensor]] | None = None
        self._left: torch.cuda.Event | None = None
        self._done: tuple[str, ...] = ()
        reader.load([group for group in reader.groups if group.stages is None])

    def begin(self, stage: int, done: Sequence[str] = ()) -> None:
        """See `Weights`; what is used from an earlier stage on is read now, too."""
        self._done = tuple(f"{name}." for name in done)
        lasting = [g for g in self._needed() if g.stages and g.stages.first < stage <= g.stages.last]
        self._reader.install(self._thread.submit(self._reader.read, lasting).result())
        self._coming = None
        self.enter(stage)

    def enter(self, stage: int) -> None:
        """The weights of ``stage`` are in place when this returns, and those of the next are being read."""
        coming = self._coming or self._read(stage)
        self._reader.install(coming.result())
        if self._left is not None:  # a device may be behind: what it still uses is not free yet
            self._left.synchronize()
        self._coming = self._read(stage + 1)

    def leave(self, stage: int) -> None:
        """``stage`` is done: free what ends with it."""
        self._free([group for group in self._reader.groups if group.stages and group.stages.last == stage])
        if self._reader.device.type == "cuda":
            self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._left.record()

    def close(self) -> None:
        """Free all streamed weights."""
        self._free([group for group in self._reader.groups if group.stages])
        self._coming = None

    def _free(self, groups: Sequence[Group]) -> None:
        self._reader.install({name: self._reader.meta[name] for group in groups for name in group.targets})

    def _needed(self) -> list[Group]:
        """The groups of this document: not those of modules that do not run."""
        return [g for g in self._reader.groups if not all(name.startswith(self._done) for name in g.targets)]

    def _read(self, stage: int) -> Future[dict[str, torch.Tensor]]:
        groups = [group for group in self._needed() if group.stages and group.stages.first == stage]
        return self._thread.submit(self._reader.read, groups)


def weight_bytes(reader: WeightReader) -> WeightBytes:
    """Bytes of a model's weights, before any is read; tied ones count once."""
    used, begun = Counter[int](), Counter[int]()
    streamed = converted = 0
    for group in reader.groups:
        if group.stages is None:
            continue
        size = sum(reader.meta[name].nbytes for name in group.targets)
        streamed += size
        begun[group.stages.first] += size
        for stage in range(group.stages.first, group.stages.last + 1):
            used[stage] += size
        if group.operations:
            converted = max(converted, size)  # what it is made of is there beside it
    total = sum(weight.nbytes for weight in reader.model.parameters())
    most = max((size + begun[stage + 1] for stage, size in used.items()), default=0)
    return WeightBytes(total=total, lasting=total - streamed, streamed=most + converted)
