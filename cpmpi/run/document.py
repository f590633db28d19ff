"""One document of a run: its results, and its keys and values.

Shapes: ``T`` tokens, ``G`` KV heads, ``D`` key dim, ``E`` value dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from h5py import h5a

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout, Piece
from cpmpi.errors import UserError
from cpmpi.run.document_scores import DocumentScores
from cpmpi.run.extras import extras_in
from cpmpi.run.hdf5 import STORED_FLOATS, RawArray, tensor_of
from cpmpi.run.layer_reader import Rows, Source, read_layer
from cpmpi.run.publish import saying
from cpmpi.run.results import DIGESTS, Results, outputs_digest, read_outputs, result_digest
from cpmpi.run.sharded_kv import ShardedKV
from cpmpi.run.spec import APPENDED, CONTINUES, TEXT, DocumentSpec, KVGroup, KVShape, Origin, Part

if TYPE_CHECKING:
    from cpmpi.run.reader import Run


class Placed(NamedTuple):
    """A part of a document, the set of shards that it is in, its number there, and the row of its first rank among the
    digests."""

    part: Part
    shard_set: int
    number: int
    first_digest: int


class Document(DocumentScores):
    """One document of a run; ``run.documents`` makes them."""

    def __init__(self, run: Run, index: int, name: str, part: tuple[Run, int] | None = None) -> None:
        """Of ``run``, where it is the group ``name``; or of a part of it, then with the number of its shards here."""
        super().__init__()
        self.run, self.index, self.part = run, index, part
        holder = run if part is None else part[0]
        self._path: Path = holder.paths.index
        with saying(self._path, f"{name} cannot be read"):
            self.group = holder.file[name]
        self._result_checked = False

    def __repr__(self) -> str:
        """What is in it, for a notebook."""
        state = f"perplexity {self.perplexity:.6g}" if self.complete else "not finished"
        state = f"failed: {self.failed}" if self.failed else state
        kv = f", KV of {len(self.kv_shapes)} layers" if self.kv_shapes and self.complete else ""
        return f"<Document {self.id!r}: {self.n_tokens:,} tokens, {state}{kv}>"

    @cached_property
    def _attributes(self) -> dict[str, Any]:
        """Those that never change, and what the others were."""
        with saying(self._path, f"{self.group.name} cannot be read"):
            return dict(self.group.attrs)

    @property
    def id(self) -> str:
        """Its name, unique in the run."""
        return str(self._attributes["id"])

    @property
    def source(self) -> str:
        """Where the text came from."""
        return str(self._attributes["source"])

    @property
    def n_tokens(self) -> int:
        """Its length."""
        return int(self._attributes["n_tokens"])

    @property
    def complete(self) -> bool:
        """Whether its outputs, and its KV if the run keeps it, are all there."""
        return read_truth(self.group, "complete", self._path)

    @property
    def failed(self) -> str:
        """Why it has no result; empty unless it failed."""
        self.check_result()
        return bytes(self.group.attrs.get("failed", b"")).decode(errors="replace")

    @property
    def world_size(self) -> int:
        """Ranks of the job that did it, or is to do it."""
        return int(self._attributes.get("world_size", self.run.world_size))

    @property
    def nll(self) -> float:
        """The negative log-likelihood of the tokens from ``first_scored`` on, in nats; NaN until it is complete."""
        self.check_result()
        return float(self.group.attrs["nll"])

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens scored); NaN until the document is complete."""
        self.check_result()
        return float(self.group.attrs["perplexity"])

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """(T,) token ids."""
        return self._output("token_ids").astype(np.int32, copy=False)

    @property
    def scored(self) -> bool:
        """Whether its log-probabilities are known; not where its keys and values alone were imported."""
        return bool(self._attributes.get("scored", True))

    @property
    def continues(self) -> Mapping[str, Any]:
        """What a continuation follows: ``context_run_id``, ``context_document``, ``context_tokens``, of an answer
        ``question`` and ``answer``, and ``question_sha256`` where tokens stand between the context and it. Empty for
        documents that follow nothing."""
        return {name: self._attributes[name] for name in CONTINUES if name in self._attributes}

    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        """(T,) log p(token i | tokens before i), in nats; NaN before ``first_scored``."""
        return self._output("logprobs").astype(np.float32, copy=False)

    @property
    def last_hidden(self) -> npt.NDArray[np.float32]:
        """(hidden,) of the last token, after the final norm."""
        return self._output("last_hidden").astype(np.float32, copy=False)

    @cached_property
    def spec(self) -> DocumentSpec:
        """How its tokens lie on the ranks that did it, or are to do it."""
        appended = self.appended
        first = self._part({**self._attributes, "n_tokens": self.n_tokens - sum(p.layout.n_tokens for p in appended)})
        return DocumentSpec(
            id=self.id, source=self.source, n_tokens=self.n_tokens,
            layout=replace(first.layout, n_tokens=first.layout.n_tokens + self.run.scoring.prefix), grid=first.grid,
            first_rank=first.first_rank, token_ids_sha256=str(self._attributes["token_ids_sha256"]),
            origin=first.origin, appended=appended, first_sha256=str(self._attributes.get("first_sha256", "")),
            scored=self.scored, continues=tuple(self.continues.items()), extras=extras_in(self.group),
            text=tuple((name, int(self._attributes[name])) for name in TEXT if name in self._attributes),
        )  # fmt: skip

    @cached_property
    def appended(self) -> tuple[Part, ...]:
        """The texts that were added to it later, in order."""
        with saying(self._path, f"{self.group.name} cannot be read"):
            groups = self.group.get(APPENDED, {})
            return tuple(self._part(dict(groups[name].attrs)) for name in sorted(groups))

    def _part(self, attributes: Mapping[str, Any]) -> Part:
        """A part of it, from the attributes that say how it lies on its ranks."""
        grid = Grid(tp=int(attributes.get("tp", 1)), head_groups=int(attributes.get("head_groups", 1)))
        layout = Layout(
            n_tokens=int(attributes["n_tokens"]), start=int(attributes.get("start", 0)),
            world=int(attributes["n_ranks"]) // grid.head_groups, segments=int(attributes["segments"]),
        )  # fmt: skip
        origin = Origin(
            world_size=int(attributes.get("world_size", self.run.world_size)),
            shard_set=int(attributes.get("shard_set", 0)) if self.part is None else self.part[1],
            number=int(attributes.get("shard_document", self.index)),
        )  # fmt: skip
        return Part(
            layout=layout, grid=grid, first_rank=int(attributes["first_rank"]), origin=origin,
            id=str(attributes["id"]), token_ids_sha256=str(attributes["token_ids_sha256"]),
        )  # fmt: skip

    @cached_property
    def places(self) -> tuple[Placed, ...]:
        """Its parts with the shards that they are in, as ``run.h5`` says."""
        first, found = 0, []
        for part in self.spec.parts:
            assert part.origin is not None
            found.append(Placed(part, part.origin.shard_set, part.origin.number, first))
            first += part.origin.world_size
        return tuple(found)

    @cached_property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The datasets of the group ``kv`` and which layers they hold; none when the run keeps no KV."""
        if self.run.kv_dtype is None:
            return ()
        kv, groups = self.group["kv"], []
        for name in sorted((name for name in kv if name.startswith("key")), key=lambda name: (len(name), name)):
            value = "value" + name.removeprefix("key")
            count, _, heads, key_dim = kv[name].shape
            layers = tuple(int(layer) for layer in kv[name].attrs.get("layers", range(count)))
            groups.append(KVGroup(name, value, KVShape(heads, key_dim, kv[value].shape[3]), layers))
        return tuple(groups)

    @cached_property
    def kv_shapes(self) -> tuple[KVShape, ...] | None:
        """(KV heads, key dim, value dim) of every layer; None when the run keeps no KV."""
        shapes = {layer: group.shape for group in self.kv_groups for layer in group.layers}
        return tuple(shapes[layer] for layer in range(len(shapes))) or None

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int] | None:
        """(layers, T, KV heads, key dim, value dim); None when the run keeps no KV.

        Raises:
            UserError: layers differ in shape; see ``kv_shapes``.
        """
        if self.kv_shapes is None:
            return None
        if len(self.kv_groups) > 1:
            raise UserError(f"{self._path}: its layers have keys and values of several shapes; see kv_shapes")
        return len(self.kv_shapes), self.n_tokens, *self.kv_shapes[0]

    def kv(
        self,
        layer: int,
        start: int | None = None,
        stop: int | None = None,
        *,
        as_torch: bool = False,
        raw: bool = False,
        verify: bool = True,
    ) -> tuple[Any, Any]:
        """Keys and values of one layer, for the positions ``start .. stop`` (default: all).

        Args:
            layer: its number.
            start, stop: positions, as in a slice (negative ones count from the end).
            as_torch: give torch tensors of the stored type.
            raw: give NumPy arrays of the stored bits: uint16 for bfloat16.
            verify: compare what is read with its checksums. A slice then reads the blocks of 1,024 tokens that it
                touches in whole (pieces in whole in a run of format version 1).

        Returns:
            key_TGD and value_TGE; by default NumPy arrays, where bfloat16 becomes float32, exactly.

        Raises:
            UserError: the run keeps no KV, the document is not complete, or a shard is missing or damaged.
            IndexError: there is no such layer.
        """
        self._check_complete()
        if self.run.kv_dtype is None or self.kv_shapes is None:
            raise UserError(f"{self._path}: the run keeps no KV (it was made by `cpmpi score`)")
        if not 0 <= layer < len(self.kv_shapes):
            raise IndexError(f"layer {layer} of {len(self.kv_shapes)}")
        heads, *dims = self.kv_shapes[layer]
        first, last, _ = slice(start, stop).indices(self.n_tokens)
        stored = STORED_FLOATS[self.run.kv_dtype]
        key_TGD, value_TGE = (np.empty((max(0, last - first), heads, dim), stored.raw) for dim in dims)
        rows = Rows(first, Piece(0, heads), (key_TGD, value_TGE))
        read_layer(self._sources(layer, first, last, verify), rows)
        if as_torch:
            return tensor_of(key_TGD, self.run.kv_dtype), tensor_of(value_TGE, self.run.kv_dtype)
        return (key_TGD, value_TGE) if raw else (stored.widen(key_TGD), stored.widen(value_TGE))

    def read_rows(self, layer: int, rows: Rows, pool: Executor | None = None) -> None:
        """Fill rows with keys and values of a layer of some positions and KV heads, compared with their checksums.

        Args:
            layer: its number.
            rows: where they go.
            pool: whose threads read; None: one for this call.

        Raises:
            UserError: as `kv`.
        """
        self._check_complete()
        read_layer(self._sources(layer, rows.first, rows.first + len(rows.into[0]), True), rows, pool)

    def _sources(self, layer: int, first: int, last: int, verify: bool) -> Iterator[Source]:
        """The shards that hold some of the positions ``first .. last``."""
        for stored in self._sharded:
            layout = stored.part.layout
            if layout.start < last and first < layout.start + layout.n_tokens:
                yield from stored.sources(layer, first, last, verify=verify)

    @cached_property
    def _sharded(self) -> tuple[ShardedKV, ...]:
        """Its keys and values in the shards, part by part."""
        return tuple(map(self._sharded_part, self.places))

    def _sharded_part(self, placed: Placed) -> ShardedKV:
        assert self.kv_shapes is not None
        assert self.run.kv_dtype is not None
        return ShardedKV(
            name=self.id, part=placed.part, number=placed.number, shapes=self.kv_shapes,
            stored=STORED_FLOATS[self.run.kv_dtype], shard=lambda rank: self.run.shard(rank, placed.shard_set),
            digest=lambda rank: int(self.group[DIGESTS][placed.first_digest + rank]), recorded_in="run.h5",
        )  # fmt: skip

    def check_result(self) -> None:
        """Compare what was recorded of the document, but for its outputs, with its checksum (from format version 2 on).

        Raises:
            UserError: it differs.
        """
        attributes = self.group.attrs
        if self._result_checked or self.run.version == 1 or not (self.complete or attributes["failed"]):
            return
        results = Results(
            arrays={DIGESTS: self.group[DIGESTS][:]} if self.complete and self.run.kv_dtype is not None else {},
            nll=float(attributes["nll"]),
            perplexity=float(attributes["perplexity"]),
            failed=bytes(attributes["failed"]),
        )
        if result_digest(results, int(attributes["outputs_xxh3"])) != attributes["result_xxh3"]:
            raise UserError(
                f"{self._path}: document {self.id!r}: its results do not have the checksum that was recorded"
            )
        self._result_checked = self.complete

    @cached_property
    def outputs_are_sound(self) -> bool:
        """Whether the outputs have their checksum."""
        with saying(self._path, f"document {self.id!r} cannot be read"):
            outputs = read_outputs(self.group)
        return outputs_digest(outputs) == int(self.group.attrs["outputs_xxh3"])

    def _output(self, name: str) -> RawArray:
        self._check_outputs()
        return np.asarray(self.group[name])

    def _check_outputs(self) -> None:
        self._check_complete()
        self.check_result()
        if not self.outputs_are_sound:
            raise UserError(
                f"{self._path}: document {self.id!r}: its outputs do not have the checksum that was recorded"
            )

    def _check_complete(self) -> None:
        if self.complete:
            return
        if self.failed:
            raise UserError(f"{self._path}: document {self.id!r} failed: {self.failed}")
        raise UserError(
            f"{self._path}: document {self.id!r} is not complete; start the same command again to finish it"
        )


def read_truth(owner: Any, name: str, path: Path) -> bool:
    """An attribute that must be 0 or 1, to the bit.

    Raises:
        UserError: it is not.
    """
    stored = np.empty((), np.bool_)  # h5py's own reading would make any byte True
    with saying(path, "cannot be read"):
        h5a.open(owner.id, name.encode()).read(stored)
    value = int(stored.view(np.uint8))
    if value not in (0, 1):
        raise UserError(f"{path}: damaged: `{name}` of {owner.name} is {value}")
    return bool(value)
