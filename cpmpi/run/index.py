"""``run.h5``: what anyone opens. Written by rank 0: laid out first, then filled a finished document at a time.

Shapes: ``L`` layers, ``T`` tokens of a document, ``N`` ranks, ``G`` KV heads, ``D`` key dim, ``E`` value dim.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5t

from cpmpi.errors import UserError
from cpmpi.run.hdf5 import (
    RawArray,
    VirtualBlock,
    changed_file,
    create_contiguous,
    create_virtual,
    created_file,
    dataset_offset,
    open_file,
    pwrite_all,
    set_attribute,
)
from cpmpi.run.paths import RunPaths, document_name, shard_name
from cpmpi.run.publish import make_folder, naming, publish_text, sync_path
from cpmpi.run.shard import LABELS
from cpmpi.run.spec import DocumentSpec, RunSpec, token_digest

FORMAT = "cpmpi-run"
FORMAT_VERSION = 1
OUTPUTS = ("token_ids", "logprobs", "last_hidden")
SUMMARY_COLUMNS = ("index", "id", "source", "n_tokens", "nll", "perplexity")


def create_index(folder: Path, spec: RunSpec) -> RunIndex:
    """Lay out ``run.h5`` for all documents of a run, in a folder that may not exist yet."""
    make_folder(folder)
    with created_file(RunPaths(folder).index) as file:
        _lay_out_run(file, spec)
        for index, document in enumerate(spec.documents):
            _lay_out_document(file.create_group(document_name(index)), index, document, spec)
    return RunIndex(folder, spec)


def _lay_out_run(file: Any, spec: RunSpec) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["cpmpi_version"] = spec.version
    file.attrs["run_id"] = spec.run_id
    file.attrs["model"] = spec.model
    file.attrs["model_sha256"] = spec.model_sha256
    file.attrs["tokenizer_sha256"] = spec.tokenizer_sha256
    file.attrs["dtype"] = spec.dtype
    file.attrs["kv_dtype"] = kv_dtype(spec)
    file.attrs["world_size"] = spec.world_size
    file.attrs["hidden_size"] = spec.hidden_size
    file.attrs["topology"] = spec.topology
    file.attrs["command"] = spec.command
    file.attrs["complete"] = False
    if spec.kv is not None:
        shards = file.create_group("shards")
        shards.create_dataset("name", data=[shard_name(rank) for rank in range(spec.world_size)])
        create_contiguous(shards, "size", (spec.world_size,), h5t.STD_I64LE, fill=np.int64(-1), labels=("rank",))


def _lay_out_document(group: Any, index: int, document: DocumentSpec, spec: RunSpec) -> None:
    tokens = document.n_tokens
    group.attrs["id"] = document.id
    group.attrs["source"] = document.source
    group.attrs["n_tokens"] = tokens
    group.attrs["token_ids_sha256"] = document.token_ids_sha256
    group.attrs["segments"] = document.layout.segments
    group.attrs["first_rank"] = document.first_rank
    group.attrs["n_ranks"] = document.n_ranks
    group.attrs["tp"] = document.grid.tp
    group.attrs["head_groups"] = document.grid.head_groups
    group.attrs["nll"] = np.nan
    group.attrs["perplexity"] = np.nan
    group.attrs["outputs_xxh3"] = np.uint64(0)
    group.attrs["complete"] = False
    nan, hidden = np.float32(np.nan), spec.hidden_size
    create_contiguous(group, "token_ids", (tokens,), h5t.STD_I32LE, fill=np.int32(-1), labels=("token",))
    create_contiguous(group, "logprobs", (tokens,), h5t.IEEE_F32LE, fill=nan, labels=("token",))
    create_contiguous(group, "last_hidden", (hidden,), h5t.IEEE_F32LE, fill=nan, labels=("hidden",))
    if spec.kv is None:
        return
    kv = group.create_group("kv")
    blocks = _virtual_blocks(document, spec)
    for name, dim in (("key", spec.kv.key_dim), ("value", spec.kv.value_dim)):
        shape = (spec.kv.layers, tokens, spec.kv.heads, dim)
        create_virtual(kv, name, shape, spec.kv.stored.h5type(), blocks, f"{document_name(index)}/{name}", LABELS)
    create_contiguous(kv, "shard_digest", (spec.world_size,), h5t.STD_U64LE, fill=np.uint64(0), labels=("rank",))


def _virtual_blocks(document: DocumentSpec, spec: RunSpec) -> list[VirtualBlock]:
    """Every piece of every rank: where it is in the document, and where in its rank's shard."""
    assert spec.kv is not None
    blocks = []
    for rank in range(spec.world_size):
        pieces = document.pieces(rank)
        heads = document.heads(rank, spec.kv.heads)
        held = sum(piece.size for piece in pieces)
        first = 0
        for piece in pieces:
            block = VirtualBlock(
                start=piece.start, count=piece.size, head=heads.start, heads=heads.size, file=shard_name(rank),
                source_rows=held, source_start=first,
            )  # fmt: skip
            blocks.append(block)
            first += piece.size
    return blocks


def kv_dtype(spec: RunSpec) -> str:
    """The attribute ``kv_dtype``: the stored type, or ``none``."""
    return "none" if spec.kv is None else spec.kv.dtype


class RunIndex:
    """The ``run.h5`` of a run in progress, on rank 0."""

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        """Open the laid out ``run.h5`` in ``folder``.

        Args:
            folder: the run folder.
            spec: what the file was laid out from, but for the run id, which is taken from the file.
        """
        self._paths = RunPaths(folder)
        with open_file(self._paths.index) as file:
            self.spec = replace(spec, run_id=file.attrs["run_id"])
            self._finished = {i for i in range(len(spec.documents)) if file[document_name(i)].attrs["complete"]}

    @property
    def finished(self) -> frozenset[int]:
        """Indices of the documents that are complete and are never done again."""
        return frozenset(self._finished)

    def write_manifest(self, sizes: Sequence[int]) -> None:
        """Record the size in bytes of every rank's shard as laid out; it never changes.

        Raises:
            UserError: documents are finished, and a shard has another size than the run recorded.
        """
        assert self.spec.kv is not None
        assert len(sizes) == self.spec.world_size
        if self._finished:
            with open_file(self._paths.index) as file:
                recorded = file["shards/size"][:]
            for rank in np.flatnonzero(recorded != sizes).tolist():
                raise UserError(
                    f"{self._paths.shard(rank)}: has {sizes[rank]} bytes, but the run recorded {recorded[rank]}: "
                    "truncated or replaced; put it back, or start again with --overwrite"
                )
        self._write_datasets("/shards", {"size": np.array(sizes, "<i8")})

    def write_outputs(
        self,
        document_index: int,
        *,
        token_ids: npt.ArrayLike,
        logprobs: npt.ArrayLike,
        last_hidden: npt.ArrayLike,
        digests: Sequence[int] = (),
    ) -> None:
        """Write the outputs of a document, make them durable, then mark it complete.

        Args:
            document_index: place of the document in the run.
            token_ids: (T,) integers.
            logprobs: (T,) natural logarithms; the first, which nothing predicts, is NaN.
            last_hidden: (hidden,) of the last token, after the final norm.
            digests: of every rank's shard (``ShardWriter.finish``), in rank order; empty without KV.

        Raises:
            UserError: a log-probability or hidden value is not finite, or the token ids are not those of the spec.
        """
        assert document_index not in self._finished, document_index
        document = self.spec.documents[document_index]
        outputs = {
            "token_ids": np.asarray(token_ids, "<i4"),
            "logprobs": np.asarray(logprobs, "<f4"),
            "last_hidden": np.asarray(last_hidden, "<f4"),
        }
        if self.spec.kv is not None:
            outputs["kv/shard_digest"] = np.array(digests, "<u8")
        _check_outputs(document, outputs)
        nll = sum_nll(outputs["logprobs"])
        name = document_name(document_index)
        self._write_datasets(name, outputs)
        with changed_file(self._paths.index) as file:
            set_attribute(file[name], "nll", nll)
            set_attribute(file[name], "perplexity", perplexity(nll, document.n_tokens))
            set_attribute(file[name], "outputs_xxh3", outputs_digest(outputs))
            self._sync(file)
            set_attribute(file[name], "complete", True)
        sync_path(self._paths.index)
        self._finished.add(document_index)

    def finish(self) -> None:
        """Write ``summary.csv`` and mark the run complete, last."""
        assert len(self._finished) == len(self.spec.documents)
        with changed_file(self._paths.index) as file:
            publish_text(self._paths.summary, _summary(file))
            self._sync(file)
            set_attribute(file, "complete", True)
        sync_path(self._paths.index)

    def _write_datasets(self, group: str, arrays: dict[str, RawArray]) -> None:
        """Write whole datasets at their offsets, past HDF5, and make them durable."""
        with open_file(self._paths.index, locking=False) as file:
            if file.attrs["run_id"] != self.spec.run_id:
                raise UserError(f"{self._paths.index}: another job has started this run anew; nothing more is written")
            places = {name: file[f"{group}/{name}"] for name in arrays}
            for name, array in arrays.items():
                assert places[name].shape == array.shape, (name, places[name].shape, array.shape)
            offsets = {name: dataset_offset(place) for name, place in places.items()}
        descriptor = os.open(self._paths.index, os.O_WRONLY)
        try:
            with naming(self._paths.index):
                for name, array in arrays.items():
                    pwrite_all(descriptor, np.ascontiguousarray(array), offsets[name])
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _sync(self, file: h5py.File) -> None:
        file.flush()
        sync_path(self._paths.index)


def _check_outputs(document: DocumentSpec, outputs: dict[str, RawArray]) -> None:
    logprobs, who = outputs["logprobs"], f"document {document.id!r} ({document.source})"
    bad = np.flatnonzero(~np.isfinite(logprobs[1:])) + 1
    if len(bad):
        raise UserError(f"{who}: {len(bad)} log-probabilities are not finite, the first at token {bad[0]}")
    assert np.isnan(logprobs[0]), "nothing predicts the first token"
    if not np.isfinite(outputs["last_hidden"]).all():
        raise UserError(f"{who}: the last hidden state is not finite")
    digest = token_digest(outputs["token_ids"])
    if document.token_ids_sha256 not in ("", digest):
        raise UserError(f"{who}: its token ids have SHA-256 {digest}, expected {document.token_ids_sha256}")


def outputs_digest(outputs: Mapping[str, RawArray]) -> int:
    """xxh3_64 of the bytes of a document's outputs as they are stored."""
    return xxhash.xxh3_64_intdigest(b"".join(outputs[name].tobytes() for name in OUTPUTS))


def sum_nll(logprobs_T: RawArray) -> float:
    """The negative log-likelihood of tokens 1 .. T-1, summed in float64."""
    return -float(np.sum(logprobs_T[1:], dtype=np.float64))


def perplexity(nll: float, n_tokens: int) -> float:
    """exp(nll / (T - 1)); NaN for a single token, of which nothing is predicted."""
    return float(np.exp(np.float64(nll) / (n_tokens - 1))) if n_tokens > 1 else float("nan")


def _summary(file: Any) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow(SUMMARY_COLUMNS)
    for index in range(len(file["documents"])):
        attributes = file[document_name(index)].attrs
        table.writerow((index, *(attributes[column] for column in SUMMARY_COLUMNS[1:])))
    return text.getvalue()
