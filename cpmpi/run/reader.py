"""Read a run: its documents, their log-probabilities and their KV.

Shapes: ``T`` tokens, ``G`` KV heads, ``D`` key dim, ``E`` value dim. Keys and values are read from the shards at disk
speed, each number bit for bit as it was stored; a shard that is missing or damaged is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import STORED_FLOATS, RawArray, open_file
from cpmpi.run.index import FORMAT, FORMAT_VERSION
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.shard import ShardFile
from cpmpi.run.spec import DocumentSpec

MOST_OPEN = 64  # shards: each takes two descriptors, of which a process may have some 1,000


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder (or its ``run.h5``) for reading. Use as a context manager, or call ``close``.

    Raises:
        UserError: there is no run.
    """
    return Run(Path(path))


class Run:
    """A run, complete or in progress."""

    def __init__(self, path: Path) -> None:
        """Open the run in the folder ``path``."""
        folder = path.parent if path.name == "run.h5" else path
        if not RunPaths(folder).index.exists():
            raise UserError(f"{folder}: no run here (no run.h5)")
        self.paths = RunPaths(folder)
        self.file = open_file(self.paths.index)
        self._shards: dict[int, ShardFile] = {}
        found = (self.file.attrs.get("format"), self.file.attrs.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            self.file.close()
            raise UserError(
                f"{self.paths.index}: format {found[0]!r} version {found[1]}, expected {FORMAT!r} {FORMAT_VERSION}"
            )

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of ``/``: model, dtype, world_size, topology, command and so on."""
        return dict(self.file.attrs)

    @property
    def complete(self) -> bool:
        """Whether the run reached its end."""
        return bool(self.file.attrs["complete"])

    @property
    def world_size(self) -> int:
        """Ranks that made the run."""
        return int(self.file.attrs["world_size"])

    @property
    def kv_dtype(self) -> str | None:
        """The stored type of keys and values; None when the run keeps none."""
        name = str(self.file.attrs["kv_dtype"])
        return None if name == "none" else name

    @cached_property
    def documents(self) -> Documents:
        """All documents, also the unfinished ones."""
        return Documents(self)

    def shard_size(self, rank: int) -> int:
        """The size in bytes that the shard of ``rank`` must have."""
        return int(self.file["shards/size"][rank])

    def shard(self, rank: int) -> ShardFile:
        """The shard of ``rank``; it stays open until many others have been asked for.

        Raises:
            UserError: it is missing, truncated, or belongs to another run.
        """
        if rank not in self._shards:
            while len(self._shards) >= MOST_OPEN:
                self._shards.pop(next(iter(self._shards))).close()
            run_id, size = self.file.attrs["run_id"], self.shard_size(rank)
            self._shards[rank] = ShardFile(self.paths.shard(rank), run_id, rank, size)
        return self._shards[rank]

    def close(self) -> None:
        """Close ``run.h5`` and the shards."""
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()
        self.file.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Documents(Sequence["Document"]):
    """The documents of a run, by place (``documents[0]``) or by id (``documents["contract-17"]``)."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._size = len(run.file["documents"])

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Document]:
        return (Document(self._run, index) for index in range(self._size))

    @overload
    def __getitem__(self, key: int | str) -> Document: ...
    @overload
    def __getitem__(self, key: slice) -> list[Document]: ...
    def __getitem__(self, key: int | str | slice) -> Document | list[Document]:
        if isinstance(key, slice):
            return [Document(self._run, index) for index in range(self._size)[key]]
        if isinstance(key, int):
            return Document(self._run, range(self._size)[key])
        if key not in self._places:
            some = ", ".join(repr(name) for name in list(self._places)[:5])
            raise KeyError(f"no document {key!r} among {self._size} ({some}{', ...' if self._size > 5 else ''})")
        return Document(self._run, self._places[key])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {document.id: document.index for document in self}


class Document:
    """One document of a run."""

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index = run, index
        self.group = run.file[document_name(index)]

    @property
    def id(self) -> str:
        """Its name, unique in the run."""
        return str(self.group.attrs["id"])

    @property
    def source(self) -> str:
        """Where the text came from."""
        return str(self.group.attrs["source"])

    @property
    def n_tokens(self) -> int:
        """Its length."""
        return int(self.group.attrs["n_tokens"])

    @property
    def complete(self) -> bool:
        """Whether its outputs, and its KV if the run keeps it, are all there."""
        return bool(self.group.attrs["complete"])

    @property
    def nll(self) -> float:
        """The negative log-likelihood of tokens 1 .. T-1, in nats; NaN until the document is complete."""
        return float(self.group.attrs["nll"])

    @property
    def perplexity(self) -> float:
        """exp(nll / (T - 1)); NaN until the document is complete."""
        return float(self.group.attrs["perplexity"])

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """(T,) token ids."""
        return self._output("token_ids").astype(np.int32, copy=False)

    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        """(T,) log p(token i | tokens before i), in nats; the first is NaN."""
        return self._output("logprobs").astype(np.float32, copy=False)

    @property
    def last_hidden(self) -> npt.NDArray[np.float32]:
        """(hidden,) of the last token, after the final norm."""
        return self._output("last_hidden").astype(np.float32, copy=False)

    @cached_property
    def spec(self) -> DocumentSpec:
        """How its tokens lie on the ranks that made the run."""
        attributes, n_tokens = self.group.attrs, self.n_tokens
        grid = Grid(tp=int(attributes.get("tp", 1)), head_groups=int(attributes.get("head_groups", 1)))
        return DocumentSpec(
            id=self.id,
            source=self.source,
            n_tokens=n_tokens,
            layout=Layout(
                n_tokens=n_tokens,
                world=int(attributes["n_ranks"]) // grid.head_groups,
                segments=int(attributes["segments"]),
            ),
            grid=grid,
            first_rank=int(attributes["first_rank"]),
            token_ids_sha256=str(attributes["token_ids_sha256"]),
        )

    @cached_property
    def kv_shape(self) -> tuple[int, int, int, int, int] | None:
        """(layers, T, KV heads, key dim, value dim); None when the run keeps no KV."""
        if self.run.kv_dtype is None:
            return None
        layers, tokens, heads, key_dim = self.group["kv/key"].shape
        return layers, tokens, heads, key_dim, self.group["kv/value"].shape[3]

    def kv(
        self,
        layer: int,
        start: int | None = None,
        stop: int | None = None,
        *,
        as_torch: bool = False,
        raw: bool = False,
    ) -> tuple[Any, Any]:
        """Keys and values of one layer, for the positions ``start .. stop`` (default: all).

        Args:
            layer: its number.
            start, stop: positions, as in a slice (negative ones count from the end).
            as_torch: give torch tensors of the stored type.
            raw: give NumPy arrays of the stored bits: uint16 for bfloat16.

        Returns:
            key_TGD and value_TGE; by default NumPy arrays, where bfloat16 becomes float32, exactly.

        Raises:
            UserError: the run keeps no KV, the document is not complete, or a shard is missing or damaged.
            IndexError: there is no such layer.
        """
        self._check_complete()
        if self.run.kv_dtype is None or self.kv_shape is None:
            raise UserError(f"{self.run.paths.index}: the run keeps no KV (it was made by `cpmpi score`)")
        layers, n_tokens, heads, key_dim, value_dim = self.kv_shape
        if not 0 <= layer < layers:
            raise IndexError(f"layer {layer} of {layers}")
        first, last, _ = slice(start, stop).indices(n_tokens)
        stored = STORED_FLOATS[self.run.kv_dtype]
        key_TGD, value_TGE = (np.empty((max(0, last - first), heads, dim), stored.raw) for dim in (key_dim, value_dim))
        self._read(layer, first, last, key_TGD, value_TGE)
        if as_torch:
            return _as_torch(key_TGD, self.run.kv_dtype), _as_torch(value_TGE, self.run.kv_dtype)
        return (key_TGD, value_TGE) if raw else (stored.widen(key_TGD), stored.widen(value_TGE))

    def _read(self, layer: int, first: int, last: int, key_TGD: RawArray, value_TGE: RawArray) -> None:
        """Fill rows for the positions ``first .. last`` from all shards that hold some of them."""
        spec = self.spec
        for rank in range(spec.first_rank, spec.first_rank + spec.n_ranks):
            if not any(piece.start < last and first < piece.stop for piece in spec.pieces(rank)):
                continue
            shard = self.run.shard(rank)
            place = shard.document(self.index)
            heads = slice(*spec.heads(rank, key_TGD.shape[1]))
            for row, piece in zip(place.firsts(), place.pieces):
                start, stop = max(piece.start, first), min(piece.stop, last)
                if start >= stop:
                    continue
                row += layer * place.n_tokens + start - piece.start
                for offset, rows in ((place.key_offset, key_TGD), (place.value_offset, value_TGE)):
                    wanted = rows[start - first : stop - first, heads]
                    read = np.ascontiguousarray(wanted)  # the rows themselves where a shard has all heads
                    shard.read(read, offset + row * read[0].nbytes)
                    if read is not wanted:
                        wanted[...] = read

    def _output(self, name: str) -> RawArray:
        self._check_complete()
        return np.asarray(self.group[name])

    def _check_complete(self) -> None:
        if not self.complete:
            raise UserError(
                f"{self.run.paths.index}: document {self.id!r} is not complete; "
                "start the same command again to finish it"
            )


def _as_torch(raw: RawArray, dtype: str) -> Any:
    import torch

    bits = torch.from_numpy(raw.view(np.int16) if dtype == "bfloat16" else raw)
    return bits.view(torch.bfloat16) if dtype == "bfloat16" else bits
