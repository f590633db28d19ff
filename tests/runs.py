"""Whole runs with random contents, made in one process the way a job makes them, for tests that read runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpmpi.attention.layout import Layout
from cpmpi.run.folder import start_index
from cpmpi.run.shard import prepare_shard
from cpmpi.run.spec import DocumentSpec, KVSpec, RunSpec, token_digest
from cpmpi.run.writer import ShardWriter

HIDDEN = 8
KV = KVSpec.alike(layers=3, heads=2, key_dim=4, value_dim=3)


def make_spec(lengths=(50, 2, 7), world: int = 3, segments: int = 4, kv: KVSpec | None = KV, **changes: Any) -> RunSpec:
    """A run of documents d0, d1, ... with these lengths. ``changes`` replace fields."""
    documents = tuple(
        DocumentSpec(
            id=f"d{i}",
            source=f"corpus.jsonl:{i}",
            n_tokens=n,
            layout=Layout(n_tokens=n, world=world, segments=segments),
            token_ids_sha256=token_digest(outputs_of(i, n)["token_ids"]),
        )
        for i, n in enumerate(lengths)
    )
    fields = {
        "model": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', "model_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64, "dtype": "float32", "kv": kv, "world_size": world, "hidden_size": HIDDEN,
        "documents": documents, "topology": '{"nodes": 1}', "command": "cpmpi prefill ...",
    }  # fmt: skip
    return RunSpec(**{**fields, **changes})


def outputs_of(document: int, n_tokens: int) -> dict[str, Any]:
    """What the model says of a document; the same every time."""
    random = np.random.default_rng(document)
    logprobs = -random.exponential(2.0, n_tokens).astype(np.float32)
    logprobs[0] = np.nan
    return {
        "token_ids": random.integers(0, 30000, n_tokens, dtype=np.int32),
        "logprobs": logprobs,
        "last_hidden": random.standard_normal(HIDDEN).astype(np.float32),
    }


def kv_of(document: int, layer: int, n_tokens: int, kv: KVSpec = KV) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole document's keys and values of a layer in float32; the same every time."""
    generator = torch.Generator().manual_seed(1000 * document + layer)
    heads, key_dim, value_dim = kv.shapes[layer]
    key_TGD = torch.randn(n_tokens, heads, key_dim, generator=generator)
    return key_TGD, torch.randn(n_tokens, heads, value_dim, generator=generator)


def held(document: DocumentSpec, rank: int) -> list[int]:
    """The positions that a rank holds, in order."""
    return [position for piece in document.pieces(rank) for position in range(piece.start, piece.stop)]


def number_of(document: DocumentSpec) -> int:
    """What ``outputs_of`` and ``kv_of`` call a document of ``make_spec``, whatever its place in the list."""
    line = document.source.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def write_document(index, writers: list[ShardWriter], i: int) -> None:
    """All ranks' part in one document."""
    spec, document = index.spec, index.spec.documents[i]
    digests = []
    for rank, writer in enumerate(writers):
        assert spec.kv is not None
        for layer, shape in enumerate(spec.kv.shapes):
            heads = slice(*document.heads(rank, shape.heads))
            mine = (
                x[held(document, rank), heads] for x in kv_of(number_of(document), layer, document.n_tokens, spec.kv)
            )
            writer.put(i, layer, *mine)
        digests.append(writer.finish(i))
    index.write_outputs(i, **outputs_of(number_of(document), document.n_tokens), digests=digests)


def open_writers(folder: Path, index) -> list[ShardWriter]:
    """Every rank's writer, on shards that are laid out where they are missing."""
    spec = index.spec
    if spec.kv is None or len(index.finished) == len(spec.documents):
        return []
    paths = [prepare_shard(folder, spec, rank, index.finished) for rank in range(spec.world_size)]
    index.write_manifest([path.stat().st_size for path in paths])
    return [ShardWriter(path, spec, rank) for rank, path in enumerate(paths)]


def make_run(folder: Path, spec: RunSpec | None = None, stop_after: int | None = None) -> RunSpec:
    """Start or resume a run and do its documents, or the next ``stop_after`` of them."""
    index = start_index(folder, spec or make_spec())
    todo = [i for i in range(len(index.spec.documents)) if i not in index.finished][:stop_after]
    writers = open_writers(folder, index)
    try:
        for i in todo:
            write_document(index, writers, i)
    finally:
        for writer in writers:
            writer.close()
    if len(index.finished) == len(index.spec.documents):
        index.finish()
    return index.spec
