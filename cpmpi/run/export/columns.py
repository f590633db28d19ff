"""What is stored for each token of a document, and what follows from it: columns of a table, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cpmpi.run.document import Document
from cpmpi.run.extras import recorded_checksums

BATCH_ROWS = 1 << 16
RENAMED = {"token_ids": "token_id", "logprobs": "logprob"}  # a row is of one token
FLAGS = ("greedy", "kept_greedy")  # stored as 0 or 1
KV = "kv"

Texts = Callable[[Any], Iterator[str]]
"""Given token ids (T,), each token's own characters."""


def stored_columns(document: Document) -> dict[str, Any]:
    """The datasets in ``run.h5`` with a row for each token, by name; whatever was kept is among them.

    Raises:
        UserError: the document is not complete, or what is stored does not have its checksum.
    """
    document.token_ids  # noqa: B018 - raises where the outputs do not have their checksum
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if name.split("/")[0] != KV and hasattr(item, "dims") and item.ndim and item.dims[0].label == "token":
            found[name.replace("/", "_")] = item

    document.group.visititems(note)
    for name in recorded_checksums(document.group):
        document.check_extra(name)
    first = [name for name in ("token_ids", "logprobs") if name in found]
    return {name: found[name] for name in (*first, *sorted(found.keys() - set(first)))}


def batches(document: Document, texts: Texts | None, rows: int = BATCH_ROWS) -> Iterator[dict[str, Any]]:
    """The table of a document, some rows at a time: a list or an array for each column, of a row per token.

    The columns are ``document``, ``position``, ``token_id``, with a tokenizer ``text`` and ``char_start``, then
    ``logprob`` and whatever else is stored. ``text`` is what a token adds to the text that the tokenizer makes of the
    document, and ``char_start`` where in it that begins; characters of several tokens belong to the last of them.
    """
    stored = stored_columns(document)
    pieces = iter(texts(document.token_ids)) if texts is not None else None
    start = 0
    for a in range(0, document.n_tokens, rows):
        b = min(a + rows, document.n_tokens)
        table: dict[str, Any] = {
            "document": [document.id] * (b - a), "position": np.arange(a, b, dtype=np.int64),
            "token_id": stored["token_ids"][a:b],
        }  # fmt: skip
        if pieces is not None:
            table["text"] = [next(pieces) for _ in range(b - a)]
            ends = start + np.cumsum([len(text) for text in table["text"]], dtype=np.int64)
            table["char_start"] = np.concatenate([[start], ends[:-1]]).astype(np.int64)
            start = int(ends[-1])
        for name, dataset in stored.items():
            values = dataset[a:b]
            table[RENAMED.get(name, name)] = values.astype(np.bool_) if name in FLAGS else values
        yield table
