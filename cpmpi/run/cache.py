"""The stored keys and values of a document, as a rank of another job needs them: its pieces, whoever wrote them.

A job of any number of ranks deals a stored document anew by its own layout. Each rank reads its pieces straight from
the shards that hold them, for all layers at once (``memory``), or a layer ahead of its use (``mapped``: what does not
fit stays on disk).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cpmpi.attention.execute import Heads, Keys
from cpmpi.attention.layout import Layout
from cpmpi.run.reader import Document


class StoredKeys:
    """One rank's share of a stored document's keys and values. Use as a context manager, or call ``close``.

    Args:
        document: the stored one.
        layout: which position of a head group holds which of its tokens in this job.
        position: this rank's.
        group: this rank's head group; it holds as many KV heads of each layer as ``heads`` say.
        heads: of each layer, with this rank's share.
        device: where they are attended to.
        resident: whether all layers are read at once and stay.
    """

    def __init__(
        self, document: Document, layout: Layout, position: int, *, group: int, heads: tuple[Heads, ...],
        device: torch.device, resident: bool,
    ) -> None:  # fmt: skip
        self.document, self.layout, self.pieces = document, layout, layout.pieces(position)
        self._group, self._heads, self._device = group, heads, device
        self._thread = ThreadPoolExecutor(1, "cpmpi-stored-keys", torch.set_num_threads, (1,))  # the cores compute
        self._coming: dict[int, Future[Keys]] = {}
        self._kept = {i: self._read(i) for i in range(len(heads))} if resident else None

    def layer(self, layer: int) -> Keys:
        """Keys and values of a layer; where they do not stay, the next layer's are being read when this returns."""
        if self._kept is not None:
            return self._kept[layer]
        keys = (self._coming.pop(layer, None) or self._thread.submit(self._read, layer)).result()
        following = (layer + 1) % len(self._heads)
        if following not in self._coming:
            self._coming[following] = self._thread.submit(self._read, following)
        return keys

    def _read(self, layer: int) -> Keys:
        keys = Keys.empty(self.pieces, self._heads[layer], self._device)
        row, kv_heads = 0, self._heads[layer].kv_heads
        held = slice(self._group * kv_heads, (self._group + 1) * kv_heads)
        for piece in self.pieces:
            stored = self.document.kv(layer, piece.start, piece.stop, as_torch=True)
            for tensor, place in zip(stored, (keys.k_SGD, keys.v_SGE), strict=True):
                place[row : row + piece.size] = tensor[:, held]
            row += piece.size
        return keys

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(cancel_futures=True)
        self._kept = None
        self._coming.clear()

    def __enter__(self) -> StoredKeys:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
