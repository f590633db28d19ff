"""Read weights from a checkpoint into a model that has none: all of them, some of them, or a rank's share of them.

Keys of the checkpoint become parameters by transformers' own renamings and conversions. Files are memory-mapped: where
the type fits, a weight is a view of the page cache, which the ranks of a node share. It is read before it is handed
out, not where the model first touches it. Of a weight that is cut among ranks (see
`cpmpi.model.tensor_parallel`) only the rank's part is read.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cpmpi.errors import UserError, one_line, some
from cpmpi.model.finite import finite
from cpmpi.model.stages import Stages, stages_of_all
from cpmpi.model.tensor_parallel import WHOLE, Cut, Sharing
from cpmpi.model.transformers_private import (
    CONCATENATE,
    MERGE,
    Destination,
    convert,
    destinations,
    may_be_missing,
    operations,
    tie,
    unexpected,
)  # fmt: skip
from cpmpi.model.weight_files import Stored

FLOATING = ("F64", "F32", "F16", "BF16")  # types of stored weights, as safetensors names them
MOST_READERS = 8  # threads that read weights where nothing else is done meanwhile


@dataclass
class Group:
    """Parameters that are made together: of which keys (and patterns), by which conversion, used in which stages.

    ``stages`` is None for parameters outside of layers.
    """

    conversion: Any
    targets: list[str]
    keys: list[tuple[str, str]] = field(default_factory=list)
    stages: Stages | None = None

    @property
    def operations(self) -> list[str]:
        """The names of what the conversion does beside renaming."""
        return operations(self.conversion)


class WeightReader:
    """Reads the weights of a checkpoint for one model.

    Args:
        model: a causal-LM model without weights; one that was made narrow has its ``sharing``.
        folder: the checkpoint.
        stored: its tensors.
        device: where to compute.
        spans: the stages in which the model's modules run.
        sharing: this rank's share of the weights.
        check_finite: whether weights are searched for NaN and infinities when they are read.

    Attributes:
        groups: the model's parameters, by how they are made.
        meta: the model's parameters and persistent buffers, by name, without weights.

    Raises:
        UserError: tensors are missing, of the wrong shape or of a type that is not read, or have no place in the model
            (named), or are stored in a way that cannot be shared (why). No weight is read yet.
    """

    def __init__(
        self, model: Any, folder: Path, stored: Mapping[str, Stored], device: torch.device, spans: dict[str, Stages], *,
        sharing: Sharing = WHOLE, check_finite: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.folder, self.device = model, folder, device
        self.sharing, self.check_finite = sharing, check_finite
        self.meta: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._cuts = sharing.cuts
        self._stored = stored
        placed = list(destinations(model, stored))
        self.groups = _groups(to for to in placed if to.conversion is not None)
        for group in self.groups:
            group.stages = stages_of_all(group.targets, spans)
            odd = sorted({*group.operations} - {MERGE, CONCATENATE})
            if odd and self._cuts.keys() & set(group.targets):
                raise UserError(f"{folder}: --tp cannot cut {group.targets[0]}, which is stored otherwise ({odd[0]})")
        self._check()
        self._check_places(placed)

    def _check(self) -> None:
        """Whether the files hold what the model asks for, by their headers."""
        for group in self.groups:
            dtype = self.meta[group.targets[0]].dtype
            for key, _ in group.keys:
                if dtype.is_floating_point and self._stored[key].dtype not in FLOATING:
                    raise UserError(
                        f"{self.folder}: tensor {key} is stored as {self._stored[key].dtype}; "
                        f"cpmpi reads {', '.join(FLOATING)}"
                    )
            whole = self._convert(group, lambda key: torch.empty(self._stored[key].shape, device="meta"))
            for name, tensor in whole.items():
                if name not in self.meta:
                    continue  # one of several that are made together: it has no place
                shape = list(self.meta[name].shape)
                self._check_shape(name, tensor, self._cuts[name].whole(shape) if name in self._cuts else shape)
        if missing := self._tie():
            raise UserError(f"{self.folder}: {len(missing)} tensors missing in the weights: {some(missing)}")

    def _check_places(self, placed: Sequence[Destination]) -> None:
        """Whether the model has a place for all that the files hold, but for what transformers says may be there."""
        odd = [
            key for key, names in unexpected(self.model, placed).items() if not self.sharing.dropped.issuperset(names)
        ]
        if odd:
            raise UserError(
                f"{self.folder}: {len(odd)} tensors of the weights have no place in the model that config.json "
                f"describes: {some(odd)}; is it the config of these weights?"
            )

    def _check_shape(self, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
        if list(tensor.shape) != list(shape):
            raise UserError(
                f"{self.folder}: tensor {name} has the wrong shape: {tuple(tensor.shape)}, not {tuple(shape)}"
            )

    def _tie(self) -> list[str]:
        """Tie what the model ties, as transformers does when it loads; what neither files nor ties give, by name."""
        missing = tie(self.model, self.meta.keys() - {target for group in self.groups for target in group.targets})
        ignored = may_be_missing(self.model)
        return sorted(name for name in missing if self.meta[name].is_meta or not ignored.search(name))

    def read(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        """The parameters of some groups, by name.

        Raises:
            UserError: a tensor is not finite (named), or cannot be read (why).
        """
        return {name: tensor for group in groups for name, tensor in self._make(group).items()}

    def _make(self, group: Group) -> dict[str, torch.Tensor]:
        """The parameters of a group, by name."""
        first = group.targets[0]
        dtype, cut = self.meta[first].dtype, self._cuts.get(first)
        if cut is not None and CONCATENATE in group.operations:
            cut = cut._replace(packed=False)  # gate and up are stored on their own
        made = {}
        with _OpenFiles() as files:  # what is mapped goes with the tensors
            parts = self._convert(group, lambda key: _part(files[self._stored[key].path], key, cut).to(dtype))
            for name, tensor in parts.items():
                self._check_shape(name, tensor, self.meta[name].shape)
                made[name] = self._bring(tensor)
                if self.check_finite:
                    finite(made[name], f"{self.folder}: tensor {name}")
        return made

    def _convert(self, group: Group, stored: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the parameters of a group of its stored tensors."""
        first = group.targets[0]
        parts = [(key, pattern, partial(stored, key)) for key, pattern in group.keys]
        try:
            return convert(group.conversion, self.model, first, parts)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            names = ", ".join(key for key, _ in group.keys[:2]) + (", ..." if len(group.keys) > 2 else "")
            raise UserError(f"{self.folder}: tensor {first} cannot be made of {names}: {one_line(error)}") from error

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
        """Read and install some groups for good, tie what is tied, and bring the buffers.

        Raises:
            UserError: as for `read`.
        """
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(min(threads, MOST_READERS), "cpmpi-weights", torch.set_num_threads, (1,)) as readers:
            try:
                for made in readers.map(self._make, groups):
                    self.install(made)
            finally:
                torch.set_num_threads(threads)  # what a thread sets for itself also holds for threads to come
        self._tie()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)


class _OpenFiles(ExitStack):
    """Weight files by their paths, opened when they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, Any] = {}

    def __getitem__(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self.enter_context(safe_open(path, framework="pt"))
        return self._files[path]


def _groups(placed: Iterable[Destination]) -> list[Group]:
    """The parameters that are made together."""
    groups: dict[str, Group] = {}
    for key, pattern, conversion, targets in placed:
        groups.setdefault(targets[0], Group(conversion, targets)).keys.append((key, pattern))
    return list(groups.values())


def _part(file: Any, key: str, cut: Cut | None) -> torch.Tensor:
    """A stored tensor, or the part of it that a cut leaves."""
    if cut is None:
        whole: torch.Tensor = file.get_tensor(key)
        return whole
    stored = file.get_slice(key)
    shape = stored.get_shape()
    at = len(shape) + cut.dim
    parts = [stored[(*[slice(None)] * at, rows)] for rows in cut.ranges(shape[at])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, at)
