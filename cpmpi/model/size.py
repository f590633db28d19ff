"""How large a model is, from its config: parameters, arithmetic per token, and the attention of every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpmpi.kernels.mask import Mask
from cpmpi.model.checkpoint import DTYPES, Blueprint, Checkpoint
from cpmpi.model.head import decoder_of
from cpmpi.model.probe import DOCUMENT_TOKENS, Layer, probe
from cpmpi.model.stages import IN_LAYER


@dataclass(frozen=True)
class LayerKind:
    """The attention of some layers that are alike. ``window`` is None where there is none."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    mask: Mask

    @property
    def token_numbers(self) -> int:
        """Numbers of one token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a plan needs of a model.

    Attributes:
        name: the model type and the number of layers.
        layers: how many layers there are of each kind, the costliest kind first.
        parameters: all of them.
        outside: those outside of layers, which ranks do not share: embeddings, head, the last norm.
        active: parameters that multiply each token's state in the decoder; of experts, those that a token goes to.
        head: parameters of the head.
        hidden, vocabulary, inner: sizes of a token's state, of the vocabulary, and of the widest inner product.
        max_positions: tokens that the model was made for; None where it does not say.
    """

    name: str
    layers: tuple[tuple[LayerKind, int], ...]
    parameters: int
    outside: int
    active: int
    head: int
    hidden: int
    vocabulary: int
    inner: int
    max_positions: int | None

    @property
    def n_layers(self) -> int:
        """Layers in all."""
        return sum(count for _, count in self.layers)

    def kv_numbers(self) -> int:
        """Numbers of one token's keys and values in all layers."""
        return sum(kind.token_numbers * count for kind, count in self.layers)


def model_size(blueprint: Blueprint, dtype: str = "bfloat16", tokens: int = DOCUMENT_TOKENS) -> ModelSize:
    """The size of a model, from its own code on shapes alone; masks are those of a document of ``tokens`` tokens.

    Raises:
        UserError: it is no model that cpmpi runs.
    """
    causal_lm = blueprint.skeleton(DTYPES[dtype])
    kinds: Counter[LayerKind] = Counter()
    for heads, rule, _ in probe(causal_lm, tokens):
        kinds[LayerKind(heads.query_heads, heads.kv_heads, heads.key_dim, heads.value_dim, rule.mask)] += 1
    vocabulary, hidden = blueprint.vocab_size, int(blueprint.text_config_value("hidden_size"))
    largest = sorted(kinds.items(), key=lambda entry: (entry[0].mask != Mask(), -entry[0].query_heads))
    return ModelSize(
        name=f"{blueprint.config.model_type}, {sum(kinds.values())} layers", layers=tuple(largest),
        parameters=sum(p.numel() for p in causal_lm.parameters()), active=active_parameters(causal_lm, blueprint),
        outside=sum(p.numel() for name, p in causal_lm.named_parameters() if not IN_LAYER.search(name)),
        head=vocabulary * hidden, hidden=hidden, vocabulary=vocabulary, inner=inner_width(causal_lm),
        max_positions=blueprint.max_positions,
    )  # fmt: skip


def active_parameters(causal_lm: torch.nn.Module, checkpoint: Checkpoint) -> int:
    """Parameters that multiply each token's state in the decoder; of experts, those that a token goes to."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in counts if (n := checkpoint.text_config_value(name))), 1)
    chosen = checkpoint.text_config_value("num_experts_per_tok") or experts
    tables = {id(m.weight) for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)}
    active = 0.0
    for name, parameter in decoder_of(causal_lm).named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in tables:
            active += parameter.numel() * (chosen / experts if ".experts." in name else 1.0)
    return round(active)


def pair_weight(causal_lm: torch.nn.Module, checkpoint: Checkpoint, layers: Sequence[Layer]) -> float:
    """Arithmetic of attention for a pair of tokens over that of everything else for one token, in all layers."""
    pair = sum(2 * layer.heads.query_heads * (layer.heads.key_dim + layer.heads.value_dim) for layer in layers)
    return pair / (2 * max(1, active_parameters(causal_lm, checkpoint)))


def inner_width(causal_lm: torch.nn.Module) -> int:
    """Numbers of a token's widest state within a layer: the longest side of a weight that multiplies it."""
    tables = {id(m.weight) for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)}
    weights = [p for p in decoder_of(causal_lm).parameters() if p.ndim >= 2 and id(p) not in tables]
    return max((side for weight in weights for side in weight.shape[-2:]), default=1)
