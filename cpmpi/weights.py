"""Weights that are in memory only while they are used: read from the checkpoint as the document goes through the model.

The chunks of a document meet at every attention, so the time between two meetings is a *stage*: the second half of one
layer and the first half of the next, for all chunks. Stage s lies before attention s; a model of L attentions has
stages 0 to L. A probe without weights shows in which stages each module runs. While attention s is computed, the
weights that end with stage s are freed and those that begin with stage s + 1 are read, so about one layer is in memory
at a time.

Keys of the checkpoint become parameters by transformers' own renamings and conversions. Files are memory-mapped: where
the type fits, a weight is a view of the page cache, which the ranks of a node share.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpmpi.attention_call import Call
from cpmpi.errors import UserError
from cpmpi.fingerprint import weight_files
from cpmpi.forward import decoder_of, layer_major
from cpmpi.layout import Piece
from cpmpi.memory import WeightBytes
from cpmpi.probe import TOKENS, ImaginedValues, no_attention

IN_LAYER = re.compile(r"\.\d+\.")


class Span(NamedTuple):
    """The stages in which something is used, both included."""

    first: int
    last: int


@dataclass
class Group:
    """Parameters that are made together: of which keys (and patterns), by which conversion, and when they are used."""

    conversion: Any
    targets: list[str]
    keys: list[tuple[str, str]] = field(default_factory=list)
    span: Span | None = None


class StreamedWeights:
    """The weights of a model on the meta device, brought and freed stage by stage.

    Args:
        model: a causal-LM model without weights.
        spans: the stages in which its modules run.
        folder: the checkpoint.
        device: where to compute.
        check_finite: whether weights are searched for NaN and infinities when they are read.

    Raises:
        UserError: tensors are missing or of the wrong shape (named), or the model cannot be streamed (why).
    """

    def __init__(
        self, model: Any, spans: dict[str, Span], folder: Path, device: torch.device, *, check_finite: bool = False
    ) -> None:
        self.check_finite = check_finite
        self.model, self.folder, self.device = model, folder, device
        if model._get_dtype_plan(next(model.parameters()).dtype):
            raise UserError(f"{folder}: keeps some weights in float32, which --weights stream cannot; use resident")
        self._meta = dict(model.state_dict(keep_vars=True))
        self._file_of = _files_of_keys(folder)
        self._groups = _groups(model, self._file_of)
        for group in self._groups:
            found = [span for target in group.targets if (span := _streamed_span(target, spans))]
            if len(found) == len(group.targets):
                group.span = Span(min(s.first for s in found), max(s.last for s in found))
        self._reader = ThreadPoolExecutor(1, "cpmpi-weights")
        self._coming: Future[dict[str, torch.Tensor]] | None = None
        self._load_lasting()

    def enter(self, stage: int) -> None:
        """The weights of ``stage`` are in place when this returns."""
        if self._coming is None:
            self._prefetch(stage)
        assert self._coming is not None
        self._install(self._coming.result())
        self._coming = None

    def leave(self, stage: int) -> None:
        """``stage`` is done: free what ends with it and start to read what begins with the next."""
        for group in self._groups:
            if group.span is not None and group.span.last == stage:
                self._install({target: self._meta[target] for target in group.targets})
        self._prefetch(stage + 1)

    def close(self) -> None:
        """Free all streamed weights."""
        for group in self._groups:
            if group.span is not None:
                self._install({target: self._meta[target] for target in group.targets})
        self._coming = None

    def _prefetch(self, stage: int) -> None:
        groups = [g for g in self._groups if g.span is not None and g.span.first == stage]
        self._coming = self._reader.submit(self._read, groups)

    def _read(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        """The parameters of some groups, by name."""
        from safetensors import safe_open

        files: dict[Path, Any] = {}
        made: dict[str, torch.Tensor] = {}
        for group in groups:
            conversion = deepcopy(group.conversion)
            first = group.targets[0]
            for key, pattern in group.keys:
                path = self._file_of[key]
                if path not in files:
                    files[path] = safe_open(path, framework="pt")
                conversion.add_tensor(first, key, pattern, _reading(files[path], key, self._meta[first].dtype))
            for name, tensor in conversion.convert(first, model=self.model, config=self.model.config).items():
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                if tensor.shape != self._meta[name].shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(self._meta[name].shape)}"
                    raise UserError(f"{self.folder}: tensor {name} has the wrong shape: {shapes}")
                made[name] = tensor.to(self.device)
                if self.check_finite:
                    finite(made[name], f"{self.folder}: tensor {name}")
        return made

    def _install(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            elif isinstance(tensor, torch.nn.Parameter):
                module._parameters[leaf] = tensor
            else:
                module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

    def _load_lasting(self) -> None:
        """What stays throughout: weights outside of layers, tied ones, and buffers."""
        self._install(self._read([g for g in self._groups if g.span is None]))
        self.model.tie_weights()
        given = {target for group in self._groups for target in group.targets}
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        missing = [k for k, t in self.model.state_dict().items() if t.is_meta and k not in given]
        if missing:
            raise UserError(f"{self.folder}: {len(missing)} tensors missing in the weights: {', '.join(missing[:4])}")


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


def finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor with NaN or infinities.

    Raises:
        UserError: naming it, and how many of its numbers are not finite.
    """
    if tensor.is_floating_point() and (bad := tensor.numel() - int(tensor.isfinite().sum())):
        raise UserError(f"{name}: {bad} of {tensor.numel()} numbers are NaN or infinite")


def weight_bytes(model: torch.nn.Module) -> WeightBytes:
    """Bytes of a model's weights, from a model without weights; tied ones count once."""
    spans = spans_of(model)
    lasting, at = 0, defaultdict[int, int](int)
    for name, weight in model.named_parameters():
        span = _streamed_span(name, spans)
        if span is None:
            lasting += weight.nbytes
        else:
            for stage in range(span.first, span.last + 1):
                at[stage] += weight.nbytes
    total = sum(weight.nbytes for weight in model.parameters())
    return WeightBytes(total=total, lasting=lasting, stage=max(at.values(), default=0))


def _streamed_span(target: str, spans: dict[str, Span]) -> Span | None:
    """When a parameter is used, if it belongs to a layer: as long as its module runs, or the nearest one around it."""
    name = target.rpartition(".")[0]
    while IN_LAYER.search(f"{name}."):
        if name in spans:
            return spans[name]
        name = name.rpartition(".")[0]
    return None


def _files_of_keys(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _groups(model: Any, file_of: dict[str, Path]) -> list[Group]:
    """The checkpoint's keys by the parameters that they become, as transformers maps them when it loads a model."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(file_of, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = loading.rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        conversion = by_pattern[pattern] if pattern else loading.WeightRenaming(key, name)
        targets = [name]
        if pattern and len(conversion.target_patterns) > 1:
            first = next(t for t in conversion.target_patterns if t in name)
            targets = [name.replace(first, t) for t in conversion.target_patterns]
        groups.setdefault(name, Group(conversion, targets)).keys.append((key, pattern or key))
    return list(groups.values())


def _reading(file: Any, key: str, dtype: torch.dtype) -> Any:
    return lambda: file.get_tensor(key).to(dtype)
