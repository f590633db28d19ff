"""A safetensors file with the keys and values of a document, made by ``cpmpi export`` or elsewhere, read in parts.

It has ``token_ids`` (T,) and for each layer ``layers.0.key``, ``layers.0.value`` and so on: keys (T, G, D) and values
(T, G, E), or as transformers caches them (1, G, T, D) and (1, G, T, E). ``logprobs`` (T,) and ``last_hidden`` (hidden,)
may be there.

Shapes: T tokens, G KV heads, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from cpmpi.errors import UserError, one_line, some
from cpmpi.run.export.tensors import DTYPES
from cpmpi.run.spec import KVShape

STORED = {name: dtype for dtype, name in DTYPES.items()}
INTEGERS = ("I64", "I32")
PARTS = ("key", "value")
RESULTS = ("token_ids", "logprobs", "last_hidden")


class KVFile:
    """A file that is open for reading.

    Raises:
        UserError: it is no safetensors file, is damaged, or has no token ids.
    """

    def __init__(self, path: Path) -> None:
        """Open the file."""
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: is not a file")
        try:
            opened: Any = safe_open(path, "pt")
            self._file: Any = opened.__enter__()
            self.names = frozenset(self._file.keys())
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except (OSError, SafetensorError) as problem:
            raise UserError(f"{path}: is no safetensors file, or damaged: {one_line(problem)}") from problem
        self.token_ids = self._read_token_ids()
        """(T,) int64."""

    def _read_token_ids(self) -> npt.NDArray[np.int64]:
        if "token_ids" not in self.names:
            raise UserError(
                f"{self.path}: has no tensor token_ids; it has {some(sorted(self.names)) or 'none'}. A file of keys "
                "and values needs token_ids, layers.0.key, layers.0.value and so on (docs/export.md)"
            )
        shape, dtype = self._shape("token_ids")
        if len(shape) != 1 or not shape[0] or dtype not in INTEGERS:
            raise UserError(f"{self.path}: token_ids must be (T,) of int32 or int64, not {list(shape)} of {dtype}")
        ids: npt.NDArray[np.int64] = self._file.get_tensor("token_ids").numpy().astype(np.int64)
        return ids

    @property
    def id(self) -> str:
        """The document's name: what the file says, else its own name."""
        return self.metadata.get("id") or self.path.stem

    @property
    def n_tokens(self) -> int:
        """The document's length."""
        return len(self.token_ids)

    @property
    def as_cached(self) -> bool:
        """Whether the layout is that of transformers' caches."""
        return len(self._shape("layers.0.key")[0]) == 4

    @property
    def dtype(self) -> str:
        """The type of the keys and values; the same in all layers once ``check`` has passed."""
        return STORED.get(self._shape("layers.0.key")[1], "")

    @property
    def others(self) -> list[str]:
        """Tensors that no run has a place for."""
        return sorted(n for n in self.names if n not in RESULTS and not n.startswith("layers."))

    def check(self, shapes: Sequence[KVShape], hidden_size: int, vocab_size: int) -> None:
        """Compare the file with a model.

        Raises:
            UserError: a tensor is missing or left over, or has another shape or type than the model asks for, or a
                token id is outside the vocabulary.
        """
        expected = {f"layers.{layer}.{part}": (layer, part) for layer in range(len(shapes)) for part in PARTS}
        if missing := [name for name in expected if name not in self.names]:
            raise UserError(f"{self.path}: lacks {some(missing)}: the model has {len(shapes)} layers")
        if more := sorted(n for n in self.names if n.startswith("layers.") and n not in expected):
            raise UserError(f"{self.path}: has {some(more)}, but the model has {len(shapes)} layers")
        for name, (layer, part) in expected.items():
            self._check_tensor(name, shapes[layer], part)
        for name, size in (("logprobs", self.n_tokens), ("last_hidden", hidden_size)):
            if name in self.names and self._shape(name) != ((size,), "F32"):
                found, dtype = self._shape(name)
                raise UserError(f"{self.path}: {name} must be {[size]} of F32, not {list(found)} of {dtype}")
        bad = np.flatnonzero((self.token_ids < 0) | (self.token_ids >= vocab_size))
        if len(bad):
            raise UserError(
                f"{self.path}: token id {self.token_ids[bad[0]]} at index {bad[0]}: the vocabulary has {vocab_size} "
                f"tokens, 0 to {vocab_size - 1}"
            )

    def _check_tensor(self, name: str, shape: KVShape, part: str) -> None:
        dim, n = shape.key_dim if part == "key" else shape.value_dim, self.n_tokens
        found, dtype = self._shape(name)
        wanted = (1, shape.heads, n, dim) if self.as_cached else (n, shape.heads, dim)
        if found != wanted:
            window = self.as_cached and len(found) == 4 and found[2] < n
            why = ": a cache that keeps the last tokens of a window alone is no whole one" if window else ""
            raise UserError(f"{self.path}: {name} is {list(found)}, but must be {list(wanted)}{why}")
        if STORED.get(dtype) is None or STORED[dtype] != self.dtype:
            raise UserError(
                f"{self.path}: {name} is of {dtype}; all keys and values must be of one of {', '.join(STORED)}"
            )

    def kv(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (t, G, D) and values (t, G, E) of a layer at the positions ``start .. stop``, in the file's type."""
        parts = []
        for part in PARTS:
            rows = self._file.get_slice(f"layers.{layer}.{part}")
            parts.append(rows[0, :, start:stop].transpose(0, 1) if self.as_cached else rows[start:stop])
        return parts[0], parts[1]

    def result(self, name: str) -> npt.NDArray[np.float32] | None:
        """``logprobs`` or ``last_hidden``, where the file has it."""
        return self._file.get_tensor(name).numpy() if name in self.names else None

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__(None, None, None)

    def _shape(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self.names:
            return (), ""
        found = self._file.get_slice(name)
        return tuple(found.get_shape()), str(found.get_dtype())
