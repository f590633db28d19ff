"""What a model's layers will ask for, learned from its code alone, before any weight is read.

The model runs on the meta device, where tensors have shapes but no values. Some models look at values on their way:
positions (rotary embeddings, packed sequences) and which expert a token goes to. So integers that do not depend on
weights are real, and everything else is imagined: a number that is read from an imagined tensor is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cpmpi.attention_call import Call, heads_of, rule_of
from cpmpi.errors import UserError
from cpmpi.execute import Heads, Rule
from cpmpi.forward import decoder_of, layer_major
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.select import select
from cpmpi.layout import Piece

META, CPU = torch.device("meta"), torch.device("cpu")
TOKENS = 4  # of the probe: enough for a convolution over tokens, which some hybrids have
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.conv1d, torch.ops.aten.conv2d)
SCALARS = (torch.ops.aten.item, torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
DOCUMENT_TOKENS = 1 << 16  # length for which masks are looked at: most windows fit in


class Layer(NamedTuple):
    """A layer's attention: its shapes, how its scores become weights, and the name of its module."""

    heads: Heads
    rule: Rule
    module: str


def backends_of(layers: Sequence[Layer], device: torch.device) -> tuple[Backend, ...]:
    """The attention kernel of each layer; layers of the same shape share one."""
    shapes = [(heads.dtype, heads.key_dim, heads.value_dim, rule.softcap) for heads, rule, _ in layers]
    chosen = {
        (dtype, key_dim, value_dim, softcap): select(
            device, dtype, head_dim=key_dim, value_head_dim=value_dim, softcap=softcap
        )
        for dtype, key_dim, value_dim, softcap in dict.fromkeys(shapes)
    }
    return tuple(chosen[shape] for shape in shapes)


@torch.inference_mode()
def probe(causal_lm: torch.nn.Module) -> tuple[Layer, ...]:
    """Each layer's attention, from a few tokens' forward through a model on the meta device.

    Raises:
        UserError: a layer passes arguments that are not known, or mixes tokens by other means than attention through
            transformers' interface.
    """
    layers: list[Layer] = []
    names = {module: name for name, module in causal_lm.named_modules()}

    def note(_: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        (call,) = calls
        layers.append(Layer(heads_of(call), rule_of(call, DOCUMENT_TOKENS), names[call.module]))
        heads = layers[-1].heads
        return [call.v_1GCE.new_zeros(TOKENS, heads.query_heads, heads.value_dim)]

    name = type(causal_lm).__name__
    values = ImaginedValues()  # type: ignore[no-untyped-call]
    try:
        with values:
            ids_T = torch.zeros(TOKENS, dtype=torch.int64)
            layer_major(decoder_of(causal_lm), ids_T, [Piece(0, TOKENS)], note)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} does not run with another attention than its own ({reason})") from error
    if not layers:
        raise UserError(f"{name} does not use transformers' attention interface")
    config: Any = causal_lm.config
    n_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if other := max(0, n_layers - len(layers)):
        raise UserError(f"{name}: {other} of {n_layers} layers mix tokens by other means than attention")
    if values.convolution:
        raise UserError(f"{name} mixes tokens by a convolution or a state-space layer, not by attention alone")
    return tuple(layers)


class ImaginedValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, integers made on the meta device are real ones on the CPU, and imagined values read as zeros.

    ``convolution`` says whether there was one.
    """

    convolution = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.convolution |= func.overloadpacket in CONVOLUTIONS
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(t.is_meta for t in tensors):
            if kwargs.get("device") == META and (tensors or not _dtype(kwargs).is_floating_point):
                kwargs = {**kwargs, "device": CPU}
            return func(*args, **kwargs)
        if func.overloadpacket in SCALARS:
            return torch.zeros((), dtype=tensors[0].dtype).item()
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(0, tensors[0].ndim, dtype=torch.int64, device=META)
        if kwargs.get("device") == CPU:
            return torch.zeros_like(tensors[0], **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(META), (args, kwargs))
        return func(*args, **kwargs)


def _dtype(kwargs: dict[str, Any]) -> torch.dtype:
    return kwargs.get("dtype") or torch.get_default_dtype()
