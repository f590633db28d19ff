"""What a job computes on a rank, as far as its schedule and its memory depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cpmpi.attention.grid import Grid
from cpmpi.comm.carrier import Carrier
from cpmpi.cost.shape import AttentionShape
from cpmpi.kernels.backend import Backend
from cpmpi.model.probe import Layer


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A document, or what follows a stored one, on its way through a model's layers.

    Attributes:
        layers: with this rank's share of the heads.
        backends: the attention kernel of each.
        grid: how ranks share heads and tokens.
        device: that computes.
        carrier: of messages between ranks.
        tokens: that go through the layers, of all ranks.
        segments: that they, and the stored ones, are cut into.
        stored: tokens before them, whose keys and values are there already.
    """

    layers: tuple[Layer, ...]
    backends: tuple[Backend, ...]
    grid: Grid
    device: torch.device
    tokens: int
    segments: int
    stored: int = 0
    carrier: Carrier = field(default_factory=Carrier)

    def shape(self, layer: Layer) -> AttentionShape:
        """A layer's attention as a rank of a head group has it."""
        heads, rule, _ = layer
        return AttentionShape(
            new=self.tokens, stored=self.stored, query_heads=heads.query_heads, kv_heads=heads.kv_heads,
            key_dim=heads.key_dim, value_dim=heads.value_dim, itemsize=heads.dtype.itemsize, segments=self.segments,
            stored_segments=self.segments, mask=rule.mask, copies=self.grid.copies,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenSizes:
    """What a token takes beside its attention, in numbers, and how many go together.

    Attributes:
        hidden: of its state.
        inner: of its widest state within a layer.
        vocabulary: of its logits.
        chunk_tokens: tokens that go through the model at a time.
        stored_itemsize: bytes of a number of the keys and values that are written; 0 where they are not.
        checkpoint_bytes: of a token's hidden state that is written as a checkpoint; 0 without checkpoints.
        kept_bytes: of a token's scores besides its log-probability.
    """

    hidden: int
    inner: int
    vocabulary: int
    chunk_tokens: int
    stored_itemsize: int
    checkpoint_bytes: int
    kept_bytes: int = 0
