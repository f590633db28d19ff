"""What a model hands to its attention function, and what it means.

transformers asks two functions of an attention implementation: one that makes masks, called by the model before its
layers, and one that attends. Ours makes no mask: it hands the model a `Visible`, which the model passes on to its
layers untouched, and which still knows the model's own rule of who sees whom. So windows and chunks come from the rule
that the model states, not from a table of models; a model that computes with its masks itself is refused.

Legend: C tokens of a chunk, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cpmpi.attention.execute import Heads, Rule
from cpmpi.errors import UserError
from cpmpi.kernels.mask import Mask

ATTENTION = "cpmpi"
# Arguments that say nothing about the scores of causal attention over one whole document.
NEUTRAL = frozenset({"position_ids", "position_embeddings", "use_cache", "output_attentions", "cache_position"})


class Call(NamedTuple):
    """A model's call of its attention function for one chunk: what the layer hands over.

    ``mask`` is what the model's mask function returned, and ``arguments`` are the keyword arguments of transformers'
    attention interface.
    """

    module: torch.nn.Module
    q_1HCD: torch.Tensor
    k_1GCD: torch.Tensor
    v_1GCE: torch.Tensor
    mask: Visible | None
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Who calls, for messages."""
        return type(self.module).__name__


@dataclass(frozen=True)
class Visible:
    """The model's own rule of which query sees which key, in place of a mask.

    Args:
        sees: the rule, as transformers' mask functions state it: (batch, head, query, key) to bool.
        local_size: the window, or the size of the chunks, where the rule has either.
    """

    sees: Callable[..., torch.Tensor]
    local_size: int | None

    def mask(self, n_tokens: int) -> Mask:
        """The rule for a document of ``n_tokens`` tokens, found among those that cpmpi knows.

        Raises:
            UserError: it is none of them.
        """
        size = self.local_size
        known = [Mask()]
        if size is not None:
            known += [Mask(window=size), Mask(documents=tuple(range(size, n_tokens + size, size)))]
        starts = (0, n_tokens // 2, n_tokens)
        edges = {start + k * (size or 0) for start in starts for k in range(4)}
        near = {edge + d for edge in edges for d in (-2, -1, 0, 1, 2)}
        at = torch.tensor(sorted(i for i in near if 0 <= i <= n_tokens))
        try:
            zero = torch.zeros((), dtype=torch.int64)
            seen = self.sees(zero, zero, at[:, None], at[None, :])
        except IndexError as error:
            raise UserError("the model's mask depends on the tokens, not only on their positions") from error
        for mask in known:
            first = torch.tensor([mask.first_key(i) for i in at.tolist()])
            if torch.equal(seen, (first[:, None] <= at) & (at <= at[:, None])):
                return mask
        raise UserError("the model's mask is neither causal, nor causal with a window or chunks")


def make_mask(
    *, mask_function: Callable[..., torch.Tensor], attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, **_: Any,
) -> Visible:  # fmt: skip
    """The mask function of cpmpi's attention; see transformers' mask interface.

    A mask without values, in `cpmpi.model.probe`, passes: it is looked at when the model runs.
    """
    if attention_mask is not None and not attention_mask.is_meta and not bool(attention_mask.all()):
        raise UserError("the model masks tokens by itself")
    return Visible(mask_function, local_size)


def rule_of(call: Call, n_tokens: int) -> Rule:
    """How this layer's scores become weights in a document of ``n_tokens`` tokens.

    Raises:
        UserError: an argument that could change the result and is not known.
    """
    given = {k: v for k, v in call.arguments.items() if v is not None and k not in NEUTRAL}
    scale = given.pop("scaling", call.q_1HCD.shape[-1] ** -0.5)
    window, softcap, sinks_H = (given.pop(k, None) for k in ("sliding_window", "softcap", "s_aux"))
    if given.pop("is_causal", getattr(call.module, "is_causal", True)) is False:
        raise UserError(f"{call.name} asks for attention that is not causal")
    if given.pop("dropout", 0.0):
        raise UserError(f"{call.name} asks for dropout")
    if given:
        raise UserError(
            f"{call.name} passes arguments that cpmpi's attention does not know: {', '.join(sorted(given))}"
        )
    mask = Mask(window=window) if call.mask is None else call.mask.mask(n_tokens)
    return Rule(mask=mask, scale=scale, softcap=softcap, sinks_H=sinks_H)


def heads_of(call: Call) -> Heads:
    """Shapes and type of a call's queries, keys and values.

    Raises:
        UserError: there is not one key for each query (some keys are pooled, shared or made up).
    """
    (b, h, c, d), (_, g, s, _), e = call.q_1HCD.shape, call.k_1GCD.shape, call.v_1GCE.shape[-1]
    if b != 1 or s != c:
        raise UserError(f"{call.name} attends with {c} queries to {s} keys, not one for each token")
    return Heads(query_heads=h, kv_heads=g, key_dim=d, value_dim=e, dtype=call.k_1GCD.dtype)
