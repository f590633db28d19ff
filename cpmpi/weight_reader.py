"""Read weights from a checkpoint into a model that has none: all of them, some of them, or a rank's share of them.

Keys of the checkpoint become parameters by transformers' own renamings and conversions. Files are memory-mapped: where
the type fits, a weight is a view of the page cache, which the ranks of a node share. It is read before it is handed
out, not where the model first touches it. Of a weight that is cut among ranks (see `cpmpi.tensor_parallel`) only the
rank's part is read.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpmpi.errors import UserError
from cpmpi.fingerprint import weight_files
from cpmpi.finite import finite
from cpmpi.tensor_parallel import Cut, Sharing


@dataclass
class Group:
    """Parameters that are made together: of which keys (and patterns), by which conversion."""

    conversion: Any
    targets: list[str]
    keys: list[tuple[str, str]] = field(default_factory=list)

    @property
    def operations(self) -> list[str]:
        """The names of what the conversion does beside renaming."""
        return [type(operation).__name__ for operation in getattr(self.conversion, "operations", None) or ()]


class WeightReader:
    """Reads the weights of a checkpoint for one model.

    Args:
        model: a causal-LM model without weights; one that was made narrow has its ``sharing``.
        folder: the checkpoint.
        device: where to compute.
        sharing: this rank's share of the weights; None: all.
        check_finite: whether weights are searched for NaN and infinities when they are read.

    Raises:
        UserError: the checkpoint stores weights in a way that cannot be read like this (why).
    """

    def __init__(
        self, model: Any, folder: Path, device: torch.device, *, sharing: Sharing | None = None,
        check_finite: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.folder, self.device, self.check_finite = model, folder, device, check_finite
        if model._get_dtype_plan(next(model.parameters()).dtype):
            raise UserError(
                f"{folder}: keeps some weights in float32, which neither --weights stream nor --tp can; use resident"
            )
        self.meta = dict(model.state_dict(keep_vars=True))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._cuts = {} if sharing is None else sharing.cuts
        self._file_of = _files_of_keys(folder)
        self.groups = _groups(model, self._file_of)
        for group in self.groups:
            odd = sorted({*group.operations} - {"MergeModulelist", "Concatenate"})
            if odd and self._cuts.keys() & set(group.targets):
                raise UserError(f"{folder}: --tp cannot cut {group.targets[0]}, which is stored otherwise ({odd[0]})")

    def read(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        """The parameters of some groups, by name.

        Raises:
            UserError: a tensor is of the wrong shape, or not finite (named).
        """
        from safetensors import safe_open

        files: dict[Path, Any] = {}
        made: dict[str, torch.Tensor] = {}
        for group in groups:
            conversion = deepcopy(group.conversion)
            first = group.targets[0]
            cut = self._cuts.get(first)
            if cut is not None and "Concatenate" in group.operations:
                cut = cut._replace(packed=False)  # gate and up are stored on their own
            for key, pattern in group.keys:
                path = self._file_of[key]
                if path not in files:
                    files[path] = safe_open(path, framework="pt")
                conversion.add_tensor(first, key, pattern, _reading(files[path], key, self.meta[first].dtype, cut))
            for name, tensor in conversion.convert(first, model=self.model, config=self.model.config).items():
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                if tensor.shape != self.meta[name].shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(self.meta[name].shape)}"
                    raise UserError(f"{self.folder}: tensor {name} has the wrong shape: {shapes}")
                made[name] = self._bring(tensor)
                if self.check_finite:
                    finite(made[name], f"{self.folder}: tensor {name}")
        return made

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is in the device's memory when this returns, without waiting for what the device computes."""
        if self._stream is None:
            dense = tensor.detach().contiguous()
            dense.reshape(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE].sum()  # reads a byte of every page
            return dense
        with torch.cuda.stream(self._stream):
            brought = tensor.to(self.device)
        brought.record_stream(torch.cuda.default_stream(self.device))  # where it is used, and when it may be freed
        return brought

    def install(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put parameters and buffers in their places in the model."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            elif isinstance(tensor, torch.nn.Parameter):
                module._parameters[leaf] = tensor
            else:
                module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

    def load(self, groups: Sequence[Group]) -> None:
        """Read and install some groups for good, and all that no file has: tied weights and buffers.

        Raises:
            UserError: tensors are missing (named), or as for `read`.
        """
        self.install(self.read(groups))
        self.model.tie_weights()
        given = {target for group in self.groups for target in group.targets}
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        missing = [k for k, t in self.model.state_dict().items() if t.is_meta and k not in given]
        if missing:
            raise UserError(f"{self.folder}: {len(missing)} tensors missing in the weights: {', '.join(missing[:4])}")


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


def _reading(file: Any, key: str, dtype: torch.dtype, cut: Cut | None) -> Callable[[], torch.Tensor]:
    """Read one tensor, or the part of it that a cut leaves."""

    def read() -> torch.Tensor:
        if cut is None:
            whole: torch.Tensor = file.get_tensor(key)
            return whole.to(dtype)
        stored = file.get_slice(key)
        shape = stored.get_shape()
        at = len(shape) + cut.dim
        parts = [stored[(*[slice(None)] * at, rows)] for rows in cut.ranges(shape[at])]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, at)).to(dtype)

    return read
