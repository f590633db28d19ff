"""The stored keys and values of a document, as a rank of another job needs them: its pieces, whoever wrote them.

A job of any number of ranks deals a stored document anew by its own layout. Each rank reads its pieces straight from
the shards that hold them, for all layers at once (``memory``), or a layer ahead of its use (``mapped``: what does not
fit stays on disk).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from cpmpi.attention.execute import Heads, Keys
from cpmpi.attention.layout import Layout, Piece
from cpmpi.run.hdf5 import RawArray
from cpmpi.run.layer_reader import THREADS, Rows
from cpmpi.run.reader import Document


def bits_of(tensor: torch.Tensor) -> RawArray:
    """A tensor's numbers as they are stored: bfloat16, which NumPy has not, as 16-bit integers."""
    bits: RawArray = (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )
    return bits


def convert(stored: torch.dtype, bits: RawArray, wanted: torch.Tensor) -> None:
    """Put stored numbers into a tensor of another type."""
    given = torch.from_numpy(bits.view(np.int16)).view(stored) if stored == torch.bfloat16 else torch.from_numpy(bits)
    wanted.copy_(given)


class StoredKeys:
    """One rank's share of stored documents' keys and values. Use as a context manager, or call ``close``.

    Args:
        document: the stored one.
        layout: which position of a head group holds which of its tokens in this job. The layout's first token is the
            document's, whatever number it has there.
        position: this rank's.
        more: further documents, and their layouts, whose keys and values follow.
        group: this rank's head group; it holds as many KV heads of each layer as ``heads`` say.
        heads: of each layer, with this rank's share.
        device: where they are attended to.
        resident: whether all layers are read at once and stay.
    """

    def __init__(
        self, document: Document, layout: Layout, position: int, *, group: int, heads: tuple[Heads, ...],
        device: torch.device, resident: bool, more: Sequence[tuple[Document, Layout]] = (),
    ) -> None:  # fmt: skip
        self.layout, self._stored = layout, ((document, layout), *more)
        self.layouts = tuple(each for _, each in self._stored)
        self.pieces = tuple(piece for each in self.layouts for piece in each.pieces(position))
        self._position = position
        self._group, self._heads, self._device = group, heads, device
        self._thread = ThreadPoolExecutor(1, "cpmpi-stored-keys", torch.set_num_threads, (1,))  # the cores compute
        self._pool = ThreadPoolExecutor(THREADS, "cpmpi-blocks", torch.set_num_threads, (1,))
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
        heads, stored = self._heads[layer], getattr(torch, str(self._stored[0][0].run.kv_dtype))
        n_tokens = sum(piece.size for piece in self.pieces)
        n_bytes = n_tokens * heads.kv_heads * (heads.key_dim + heads.value_dim) * heads.dtype.itemsize
        # NumPy's memory: it asks for large pages, which the kernel fills several times as fast as small ones.
        flat_B = torch.from_numpy(np.empty(n_bytes, np.uint8)) if n_bytes else torch.empty(0, dtype=torch.uint8)
        keys = Keys.over(self.pieces, heads, flat_B)
        held = Piece(self._group * heads.kv_heads, (self._group + 1) * heads.kv_heads)
        row = 0
        for document, layout in self._stored:
            for piece in layout.pieces(self._position):
                k_CGD, v_CGE = (tensor[row : row + piece.size] for tensor in (keys.k_SGD, keys.v_SGE))
                first = piece.start - layout.start
                if stored == heads.dtype:
                    rows = Rows(first, held, (bits_of(k_CGD), bits_of(v_CGE)))
                else:
                    rows = Rows(first, held, (k_CGD, v_CGE), partial(convert, stored))
                document.read_rows(layer, rows, self._pool)
                row += piece.size
        return Keys.over(self.pieces, heads, keys.flat_B.to(self._device))

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(cancel_futures=True)
        self._pool.shutdown()
        self._kept = None
        self._coming.clear()

    def __enter__(self) -> StoredKeys:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
