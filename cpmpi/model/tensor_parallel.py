"""Tensor parallelism: a rank holds a share of every layer's weights, and two sums a layer put the results together.

The checkpoint's own plan (transformers' ``tp_plan``) says which projections are cut by their outputs (colwise: queries,
keys, values, gate, up) and which by their inputs (rowwise: the attention's output, down). A rowwise projection makes
partial sums, which an all-reduce over the ranks that share the weights completes; nothing else travels. Only plans
that need no other message are taken, and whatever a plan leaves out (norms, routers, embeddings, head) is whole on
every rank.

Heads stay whole. The KV heads are cut ``head_groups`` ways (see `cpmpi.attention.grid`), everything else
in a layer tp ways.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cpmpi.attention.execute import Heads
from cpmpi.attention.grid import Grid, shares_heads
from cpmpi.errors import UserError
from cpmpi.model.probe import Layer, probe

STYLES = ("colwise", "rowwise", "packed_colwise", "moe_tp_experts", "replicated_with_grad_allreduce")
SUMS_A_LAYER = 2
LAYER_PREFIX = re.compile(r".*?\.\d+\.")


class Cut(NamedTuple):
    """Part ``part`` of ``parts`` equal ones of a tensor along ``dim``, a negative number.

    ``packed``: the tensor is two of equal size, one after the other (gate and up), and each is cut.
    """

    dim: int
    parts: int
    part: int
    packed: bool = False

    def ranges(self, size: int) -> list[slice]:
        """What is taken of a dimension of ``size``."""
        blocks = 2 if self.packed else 1
        block = size // blocks
        each = block // self.parts
        return [slice(b * block + each * self.part, b * block + each * (self.part + 1)) for b in range(blocks)]

    def shape(self, whole: Sequence[int]) -> list[int]:
        """The shape of the part of a tensor of shape ``whole``."""
        cut = list(whole)
        cut[self.dim] //= self.parts
        return cut

    def whole(self, part: Sequence[int]) -> list[int]:
        """The shape of a tensor whose part is of shape ``part``."""
        whole = list(part)
        whole[self.dim] *= self.parts
        return whole


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a rank of a tensor-parallel group holds of a model; by default all of it, as the only one.

    Attributes:
        grid: of the ranks.
        cuts: of the parameters that are cut, by name.
        dropped: parameters that another rank of the group holds: a bias is added once.
        summed: modules whose outputs are partial sums.
    """

    grid: Grid = field(default_factory=Grid)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    summed: tuple[str, ...] = ()

    def narrow(self, model: torch.nn.Module) -> None:
        """Make a model without weights one of this share."""
        for name, cut in self.cuts.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            whole = module._parameters[leaf]
            assert whole is not None
            part = torch.empty(cut.shape(whole.shape), dtype=whole.dtype, device="meta")
            module._parameters[leaf] = torch.nn.Parameter(part, requires_grad=False)
            if isinstance(module, torch.nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = part.shape
        for name in self.dropped:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = None

    def layers(self, narrow: torch.nn.Module, whole: Sequence[Layer], tokens: int) -> tuple[Layer, ...]:
        """The layers of a narrowed model, from those of the whole one, for documents of up to so many tokens.

        Raises:
            UserError: the model's code does not work with a share of its heads, or its plan does not split them.
        """
        name, tp = type(narrow).__name__, self.grid.tp
        try:
            layers = probe(narrow, tokens)
        except UserError as error:
            raise UserError(f"--tp {tp}: {name} does not work with a share of its weights: {error}") from error
        for a, b in zip((layer.heads for layer in whole), (layer.heads for layer in layers), strict=True):
            if (b.query_heads, b.kv_heads) != (a.query_heads // tp, a.kv_heads // self.grid.head_groups):
                raise UserError(f"--tp {tp}: the tensor-parallel plan of {name} does not split its attention")
        return layers


WHOLE = Sharing()


def share(model: Any, layers: Sequence[Layer], tp: int, index: int) -> Sharing:
    """What rank ``index`` of ``tp`` that share the weights holds.

    Args:
        model: a causal-LM model without weights.
        layers: of its probe.
        tp: ranks that share the weights.
        index: of this rank among them.

    Raises:
        UserError: the model has no plan, or one that needs other messages than two sums a layer (named), or tp does
            not divide it (the values that do are listed).
    """
    name = type(model).__name__
    styles = _styles(model, name)
    parts = {k: p for module, style in styles.items() for k, p in _parts(model, module, style, layers, name).items()}
    heads = [layer.heads for layer in layers]
    valid = [n for n in range(1, max(h.query_heads for h in heads) + 1) if _divides(n, heads, parts.values())]
    if tp not in valid:
        sizes = ", ".join(f"{h.query_heads} query and {h.kv_heads} KV heads" for h in dict.fromkeys(heads))
        raise UserError(f"--tp {tp} does not divide {name} ({sizes}); choose one of {', '.join(map(str, valid))}")
    grid = Grid(tp=tp, head_groups=min(tp, heads[0].kv_heads))
    cuts = {}
    for k, part in parts.items():
        n, i = (grid.head_groups, grid.group(index)) if part.of_kv_heads else (tp, index)
        cuts[k] = Cut(part.dim, n, i, part.packed)
    summed = tuple(m for m, style in styles.items() if style in ("rowwise", "moe_tp_experts"))
    _check_sums(name, summed)
    biases = [f"{m}.bias" for m in summed if getattr(model.get_submodule(m), "bias", None) is not None]
    return Sharing(grid=grid, cuts=cuts, dropped=frozenset(biases if index else ()), summed=summed)


class _Part(NamedTuple):
    """How a parameter can be cut: which dimension, how large, in two blocks or one, and whether by KV heads."""

    dim: int
    size: int
    packed: bool
    of_kv_heads: bool


def _styles(model: Any, name: str) -> dict[str, str]:
    """The style of every module in a layer that the plan names.

    Raises:
        UserError: there is no plan, or a style is not among ``STYLES``.
    """
    plan = {k: v for k, v in (model.tp_plan or {}).items() if ".*." in k}
    if not plan:
        raise UserError(f"--tp: {name} has no tensor-parallel plan in transformers")
    named = ((n, plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", n))) for n, _ in model.named_modules())
    styles = {n: style for n, style in named if style is not None}
    other = sorted({f"{style} for {n.rpartition('.')[2]}" for n, style in styles.items() if style not in STYLES})
    if other:
        raise UserError(f"--tp: the plan of {name} needs more than two sums a layer ({', '.join(other)})")
    routed = [n.rpartition(".")[0] for n, style in styles.items() if style == "moe_tp_experts"]
    beside = tuple(f"{n}." for n in routed)
    # An expert that all tokens go to, beside the routed ones, stays whole: its sum would be a third.
    return {n: style for n, style in styles.items() if style == "moe_tp_experts" or not n.startswith(beside)}


def _parts(model: Any, module_name: str, style: str, layers: Sequence[Layer], name: str) -> dict[str, _Part]:
    """The parameters of a module that are cut."""
    module = model.get_submodule(module_name)
    if style == "replicated_with_grad_allreduce":
        return {}
    if style == "moe_tp_experts":
        return _expert_parts(model, module_name, name)
    if not isinstance(module, torch.nn.Linear):
        raise UserError(f"--tp: {module_name} of {name} is a {type(module).__name__}, not a linear projection")
    of_kv_heads = style == "colwise" and _makes_kv(module_name, module.out_features, layers)
    if style == "rowwise":
        return {f"{module_name}.weight": _Part(-1, module.in_features, False, False)}
    packed = style == "packed_colwise"
    parts = {f"{module_name}.weight": _Part(-2, module.out_features, packed, of_kv_heads)}
    if module.bias is not None:
        parts[f"{module_name}.bias"] = _Part(-1, module.out_features, packed, of_kv_heads)
    return parts


def _expert_parts(model: Any, module_name: str, name: str) -> dict[str, _Part]:
    """Experts in stacked tensors: gate and up (experts, 2 x width, hidden) and down (experts, hidden, width)."""
    plan, found = model.tp_plan, {}
    for leaf, parameter in model.get_submodule(module_name).named_parameters():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", f"{module_name}.{leaf}"))
        if parameter.ndim != 3 or style not in ("packed_colwise", "colwise", "rowwise"):
            raise UserError(f"--tp: the plan of {name} does not say how to cut {leaf} of its experts")
        dim = -1 if style == "rowwise" else -2
        found[f"{module_name}.{leaf}"] = _Part(dim, parameter.shape[dim], style == "packed_colwise", False)
    return found


def _makes_kv(module_name: str, width: int, layers: Sequence[Layer]) -> bool:
    """Whether a colwise projection in an attention makes keys or values rather than queries."""
    for heads, _, attention in layers:
        if module_name.startswith(f"{attention}."):
            kv_widths = {heads.kv_heads * heads.key_dim, heads.kv_heads * heads.value_dim}
            return heads.kv_heads < heads.query_heads and width in kv_widths
    return False


def _divides(tp: int, heads: Iterable[Heads], parts: Iterable[_Part]) -> bool:
    """Whether a model can be shared by ``tp`` ranks: heads stay whole, and all ranks get as much."""
    groups = {min(tp, h.kv_heads) for h in heads}
    if len(groups) > 1 or not all(shares_heads(tp, h.query_heads, h.kv_heads) for h in heads):
        return False
    (group,) = groups
    return all(p.size % ((group if p.of_kv_heads else tp) * (2 if p.packed else 1)) == 0 for p in parts)


def _check_sums(name: str, summed: Sequence[str]) -> None:
    """Refuse a plan that needs more sums than two in a layer."""
    sums = Counter(match[0] for module in summed if (match := LAYER_PREFIX.match(module)))
    for layer, count in sums.items():
        if count > SUMS_A_LAYER:
            raise UserError(f"--tp: {name} needs {count} sums in {layer.rstrip('.')}, more than {SUMS_A_LAYER}")
