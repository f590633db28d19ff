"""Lays out ``run.h5``: every dataset and attribute in its place, empty, but for what finished documents bring along.

Shapes: ``L`` layers, ``T`` tokens of a document, ``N`` ranks, ``G`` KV heads, ``D`` key dim, ``E`` value dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5t

from cpmpi.run.extras import copy_extras, lay_out_extras
from cpmpi.run.hdf5 import VirtualBlock, create_contiguous, create_virtual, created_file, set_attribute
from cpmpi.run.paths import RunPaths, document_name, shard_name
from cpmpi.run.publish import make_folder
from cpmpi.run.results import GREEDY, OUTPUTS, Results, outputs_digest, read_results, result_digest
from cpmpi.run.shard import LABELS
from cpmpi.run.spec import APPENDED, DocumentSpec, Part, RunSpec, ShardSet

FORMAT = "cpmpi-run"
FORMAT_VERSION = 2
OLDER_VERSIONS = (1,)
# What is written into a document's attributes when it is done, and where it failed; `complete` also of the run.
WRITTEN_LATER = ("nll", "perplexity", "outputs_xxh3", "result_xxh3", "failed", "complete")
REASON_BYTES = 480


def lay_out_index(folder: Path, spec: RunSpec, finished: Mapping[str, Any]) -> None:
    """Make ``run.h5`` for all documents of a run, in a folder that may not exist yet; one that is there is replaced.

    Args:
        folder: the run folder.
        spec: what the run will hold.
        finished: for each group of a document that is done, its results, or the group in the file they are from.
    """
    make_folder(folder)
    groups = {document_name(i): (i, document) for i, document in enumerate(spec.documents)}
    groups |= {document_name(i, set_aside=True): (i, document) for i, document in enumerate(spec.set_aside)}
    places = 2 + len(spec.earlier_sets) + 1 + len(groups) * (len(WRITTEN_LATER) + len(OUTPUTS) + 3)
    places += sum(len(document.extras) for _, document in groups.values())
    with created_file(RunPaths(folder).index, most_places=places, attributes=WRITTEN_LATER) as file:
        _lay_out_run(file, spec)
        for name, (index, document) in groups.items():
            group = file.create_group(name)
            _lay_out_document(group, index, document, spec)
            if name in finished:
                _put_results(finished[name], group)


def kv_dtype(spec: RunSpec) -> str:
    """The attribute ``kv_dtype``: the stored type, or ``none``."""
    return "none" if spec.kv is None else spec.kv.dtype


def _lay_out_run(file: Any, spec: RunSpec) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["cpmpi_version"] = spec.version
    file.attrs["run_id"] = spec.run_id
    file.attrs["model"] = spec.model
    file.attrs["model_path"] = spec.model_path
    file.attrs["model_sha256"] = spec.model_sha256
    file.attrs["tokenizer_sha256"] = spec.tokenizer_sha256
    if spec.files:
        file.attrs["checkpoint_files"] = json.dumps(dict(spec.files))
    file.attrs["dtype"] = spec.dtype
    file.attrs["kv_dtype"] = kv_dtype(spec)
    file.attrs["world_size"] = spec.world_size
    file.attrs["hidden_size"] = spec.hidden_size
    file.attrs["topology"] = spec.topology
    file.attrs["command"] = spec.command
    file.attrs["complete"] = False
    for name, value in asdict(spec.scoring).items():
        file.attrs[name] = value
    if spec.kv is not None:
        shards = file.create_group("shards")
        for shard_set in spec.used_sets():
            _lay_out_shards(shards.create_group(f"{shard_set.number:06d}"), shard_set)


def _lay_out_shards(group: Any, shard_set: ShardSet) -> None:
    ranks = range(shard_set.world_size)
    group.attrs["set_id"] = shard_set.id
    group.create_dataset("name", data=[shard_name(rank, shard_set.number) for rank in ranks])
    sizes = create_contiguous(group, "size", (len(ranks),), h5t.STD_I64LE, fill=np.int64(-1), labels=("rank",))
    if shard_set.sizes:
        sizes[...] = shard_set.sizes


def _lay_out_document(group: Any, index: int, document: DocumentSpec, spec: RunSpec) -> None:
    tokens = document.n_tokens
    shard_set, number = spec.place(document, index)
    attributes = {
        "id": document.id, "source": document.source, "n_tokens": tokens, "token_ids_sha256": document.token_ids_sha256,
        "segments": document.layout.segments, "world_size": spec.world_of(document),
        "first_rank": document.first_rank, "n_ranks": document.n_ranks, "tp": document.grid.tp,
        "head_groups": document.grid.head_groups, "nll": np.nan, "perplexity": np.nan,
        "outputs_xxh3": np.uint64(0), "result_xxh3": np.uint64(0), "complete": False,
    }  # fmt: skip
    attributes |= dict(document.continues) | dict(document.text)
    if not document.scored:
        attributes["scored"] = False
    if document.appended:
        attributes["first_sha256"] = document.first_sha256
    if spec.kv is not None:
        attributes |= {"shard_set": shard_set.number, "shard_document": number}
    for name, value in attributes.items():
        group.attrs[name] = value
    group.attrs.create("failed", b"", dtype=h5py.string_dtype("utf-8", REASON_BYTES))
    nan, hidden = np.float32(np.nan), spec.hidden_size
    create_contiguous(group, "token_ids", (tokens,), h5t.STD_I32LE, fill=np.int32(-1), labels=("token",))
    create_contiguous(group, "logprobs", (tokens,), h5t.IEEE_F32LE, fill=nan, labels=("token",))
    create_contiguous(group, "last_hidden", (hidden,), h5t.IEEE_F32LE, fill=nan, labels=("hidden",))
    if document.continues:
        create_contiguous(group, GREEDY, (tokens,), h5t.STD_U8LE, fill=np.uint8(0), labels=("token",))
    lay_out_extras(group, document.extras)
    if spec.kv is not None:
        _lay_out_kv(group.create_group("kv"), index, document, spec)
    for number, part in enumerate(document.appended, start=1):
        _lay_out_appended(group.create_group(f"{APPENDED}/{number:06d}"), part)


def _lay_out_appended(group: Any, part: Part) -> None:
    """Which tokens were appended, how they were dealt, and where their keys and values are."""
    assert part.origin is not None
    attributes = {
        "id": part.id, "start": part.layout.start, "n_tokens": part.layout.n_tokens,
        "token_ids_sha256": part.token_ids_sha256, "segments": part.layout.segments,
        "world_size": part.origin.world_size, "first_rank": part.first_rank, "n_ranks": part.n_ranks,
        "tp": part.grid.tp, "head_groups": part.grid.head_groups, "shard_set": part.origin.shard_set,
        "shard_document": part.origin.number,
    }  # fmt: skip
    for name, value in attributes.items():
        group.attrs[name] = value


def _lay_out_kv(kv: Any, index: int, document: DocumentSpec, spec: RunSpec) -> None:
    assert spec.kv is not None
    places = [(part, *spec.place(part, index)) for part in document.parts]
    for one in spec.kv.groups():
        for name, dim in ((one.key, one.shape.key_dim), (one.value, one.shape.value_dim)):
            shape = (len(one.layers), document.n_tokens, one.shape.heads, dim)
            blocks = [
                block
                for part, shard_set, number in places
                for block in _virtual_blocks(part, one.shape.heads, shard_set.number, f"{document_name(number)}/{name}")
            ]
            dataset = create_virtual(kv, name, shape, spec.kv.stored.h5type(), blocks, LABELS)
            dataset.attrs["layers"] = np.array(one.layers, np.int64)
    ranks = sum(spec.world_of(part) for part in document.parts)
    create_contiguous(kv, "shard_digest", (ranks,), h5t.STD_U64LE, fill=np.uint64(0), labels=("rank",))


def _virtual_blocks(part: Part, kv_heads: int, shard_set: int, source: str) -> list[VirtualBlock]:
    """Every piece of every rank: where it is in the document, and where in its rank's shard."""
    blocks = []
    for rank in range(part.first_rank, part.first_rank + part.n_ranks):
        pieces = part.pieces(rank)
        heads = part.heads(rank, kv_heads)
        held = sum(piece.size for piece in pieces)
        first = 0
        for piece in pieces:
            block = VirtualBlock(
                start=piece.start, count=piece.size, head=heads.start, heads=heads.size,
                file=shard_name(rank, shard_set), source=source, source_rows=held, source_start=first,
            )  # fmt: skip
            blocks.append(block)
            first += piece.size
    return blocks


def _put_results(source: Any, group: Any) -> None:
    """Put the results of a document in place, or take them over from a group, also of an older format.

    The reason why a document failed is taken over as well.
    """
    if not isinstance(source, Results) and not source.attrs["complete"]:
        for name in ("failed", "result_xxh3"):
            set_attribute(group, name, source.attrs[name])
        return
    results = source if isinstance(source, Results) else read_results(source)
    for name, array in results.arrays.items():
        group[name][...] = array
    if not isinstance(source, Results):
        copy_extras(source, group)
    outputs = outputs_digest(results.arrays) if isinstance(source, Results) else source.attrs["outputs_xxh3"]
    for name, value in (("nll", results.nll), ("perplexity", results.perplexity), ("outputs_xxh3", outputs)):
        set_attribute(group, name, value)
    set_attribute(group, "result_xxh3", result_digest(results))
    set_attribute(group, "complete", True)
