"""A document as a safetensors file: its keys and values, layer by layer in the stored type, and its results.

Names: ``layers.0.key``, ``layers.0.value``, ``layers.1.key`` and so on, then ``token_ids``, ``logprobs``,
``last_hidden`` and what else is stored for each token.

Shapes: T tokens, G KV heads, D key dim, E value dim. Layout ``safetensors`` has keys (T, G, D) and values (T, G, E), as
they are stored; ``transformers`` has (1, G, T, D) and (1, G, T, E), which its caches take.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpmpi.errors import UserError
from cpmpi.run.document import Document
from cpmpi.run.export.columns import stored_columns
from cpmpi.run.safetensors_file import TensorFile, TensorSpec, created_tensor_file, file_bytes

FORMAT = "cpmpi-kv"
LAYOUTS = ("transformers", "safetensors")
BLOCK_BYTES = 32 << 20  # of keys and values that are in memory at a time, about
BLOCK_TOKENS = 1024  # at least: shards have a checksum for so many
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KINDS = {"f": "F", "i": "I", "u": "U"}


def tensor_bytes(document: Document, layout: str) -> int:
    """The size of the file that ``write_tensors`` makes."""
    return file_bytes(_tensors(document, layout), metadata_of(document, layout))


def write_tensors(document: Document, path: Path, layout: str) -> None:
    """Write a document with its keys and values to ``path``, which is replaced; everything read is verified.

    Raises:
        UserError: the run keeps no KV, the document is not complete, a shard is damaged, or the file cannot be written.
    """
    tensors = _tensors(document, layout)
    with created_tensor_file(path, tensors, metadata_of(document, layout)) as file:
        for name, dataset in stored_columns(document).items():
            block = max(1, BLOCK_BYTES // max(1, dataset.nbytes // len(dataset)))
            for a in range(0, len(dataset), block):
                rows = np.ascontiguousarray(dataset[a : a + block])
                file.write(name, a * (rows.size // len(rows)), rows)
        file.write("last_hidden", 0, document.last_hidden)
        for layer in range(len(document.kv_shapes or ())):
            _write_layer(document, layer, file, layout)


def _write_layer(document: Document, layer: int, file: TensorFile, layout: str) -> None:
    assert document.kv_shapes is not None
    shape = document.kv_shapes[layer]
    block = max(BLOCK_TOKENS, BLOCK_BYTES // (4 * shape.numbers))
    for a in range(0, document.n_tokens, block):
        parts = document.kv(layer, a, min(a + block, document.n_tokens), raw=True)
        for name, rows_TGD in zip(("key", "value"), parts, strict=True):
            _, heads, dim = rows_TGD.shape
            if layout == "safetensors":
                file.write(f"layers.{layer}.{name}", a * heads * dim, rows_TGD)
                continue
            for head in range(heads):
                first = (head * document.n_tokens + a) * dim
                file.write(f"layers.{layer}.{name}", first, np.ascontiguousarray(rows_TGD[:, head]))


def metadata_of(document: Document, layout: str) -> dict[str, str]:
    """What the file says of itself."""
    attributes = document.run.attributes
    return {
        "format": FORMAT, "layout": layout, "id": document.id, "source": document.source,
        "n_tokens": str(document.n_tokens), "layers": str(len(document.kv_shapes or ())),
        "model_sha256": str(attributes["model_sha256"]), "tokenizer_sha256": str(attributes["tokenizer_sha256"]),
        "dtype": str(attributes["dtype"]),
    }  # fmt: skip


def _tensors(document: Document, layout: str) -> dict[str, TensorSpec]:
    if document.kv_shapes is None or document.run.kv_dtype is None:
        raise UserError(
            f"{document.run.paths.index}: the run keeps no KV (it was made by `cpmpi score` or `cpmpi extend`); "
            "parquet and csv have what is stored"
        )
    dtype, n = DTYPES[document.run.kv_dtype], document.n_tokens
    found: dict[str, TensorSpec] = {}
    for layer, shape in enumerate(document.kv_shapes):
        for name, dim in (("key", shape.key_dim), ("value", shape.value_dim)):
            size = (1, shape.heads, n, dim) if layout == "transformers" else (n, shape.heads, dim)
            found[f"layers.{layer}.{name}"] = TensorSpec(dtype, size)
    for name, dataset in stored_columns(document).items():
        found[name] = TensorSpec(f"{KINDS[dataset.dtype.kind]}{8 * dataset.dtype.itemsize}", dataset.shape)
    found["last_hidden"] = TensorSpec("F32", document.last_hidden.shape)
    return found
