"""What a model's layers will ask for, learned from its code alone, before any weight is read.

The model runs on the meta device, where tensors have shapes but no values. Some models look at values on their way:
positions (rotary embeddings, packed sequences) and which expert a token goes to. So two kinds of tensors are real:
integers that do not depend on weights, and tensors of ones, of which masks are made. All others are imagined, and a
number that is read from an imagined tensor is zero.

What is real says where the model believes its tokens to be: the second half of a document, at the positions that are
given, has to meet the weights with the same numbers as in a whole document that the model counts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cpmpi.attention.execute import Heads, Rule
from cpmpi.attention.layout import Piece
from cpmpi.comm.ranks import Ranks
from cpmpi.errors import UserError
from cpmpi.kernels import select
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.select import Shape
from cpmpi.model.attention_call import Call, Visible, heads_of, rule_of
from cpmpi.model.forward import cut, layer_major
from cpmpi.model.head import decoder_of
from cpmpi.model.kept_rates import rates_of

META, CPU = torch.device("meta"), torch.device("cpu")
TOKENS = 4  # of the probe: enough for a convolution over tokens, which some hybrids have
WHOLE = 2 * TOKENS  # of the document whose second half they are
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.conv1d, torch.ops.aten.conv2d)
SCALARS = (torch.ops.aten.item, torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
DOCUMENT_TOKENS = 1 << 16  # length for which masks are looked at, at least: most windows fit in


class Layer(NamedTuple):
    """A layer's attention: its shapes, how its scores become weights, and the name of its module."""

    heads: Heads
    rule: Rule
    module: str


def backends_of(layers: Sequence[Layer], device: torch.device, ranks: Ranks) -> tuple[Backend, ...]:
    """The attention kernel of each layer, the same on all ranks; layers of the same shape share one. Collective.

    Raises:
        UserError: no kernel agrees with the reference on every rank.
    """
    shapes = [
        Shape(
            dtype=heads.dtype, query_heads=heads.query_heads, kv_heads=heads.kv_heads, key_dim=heads.key_dim,
            value_dim=heads.value_dim, softcap=rule.softcap,
        )
        for heads, rule, _ in layers
    ]  # fmt: skip
    chosen = {shape: _backend_of(shape, device, ranks) for shape in dict.fromkeys(shapes)}
    return tuple(chosen[shape] for shape in shapes)


def _backend_of(shape: Shape, device: torch.device, ranks: Ranks) -> Backend:
    """A kernel that every rank has compared with the reference; timed on all, unless rates of these were kept."""
    trials = ranks.comm.gather(select.try_all(shape, device)) or []

    def passing() -> tuple[str, ...]:
        try:
            return select.passing(shape, trials)
        except RuntimeError as error:
            raise UserError(str(error)) from error

    names = ranks.on_root(passing)
    flops, note = rates_of(
        ranks, device, str(shape), names, lambda: select.rates(shape, device, names, ranks.comm.Barrier)
    )  # fmt: skip
    return ranks.on_root(lambda: select.decide(shape, trials, [flops], note=note))


@torch.inference_mode()
def probe(causal_lm: torch.nn.Module, tokens: int = DOCUMENT_TOKENS) -> tuple[Layer, ...]:
    """Each layer's attention, from a few tokens' forward through a model on the meta device.

    Args:
        causal_lm: a model without weights.
        tokens: of the longest document, for masks.

    Raises:
        UserError: a layer passes arguments that are not known, or mixes tokens by other means than attention through
            transformers' interface.
    """
    layers: list[Layer] = []
    names = {module: name for name, module in causal_lm.named_modules()}

    def note(_: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        (call,) = calls
        layers.append(Layer(heads_of(call), rule_of(call, max(tokens, DOCUMENT_TOKENS)), names[call.module]))
        return no_attention(_, calls)

    name = type(causal_lm).__name__
    try:
        given = _walk(causal_lm, Piece(TOKENS, WHOLE), note)
        with _own_positions(decoder_of(causal_lm)):
            counted = _walk(causal_lm, Piece(0, WHOLE), no_attention)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if f"'{Visible.__name__}'" in reason:
            raise UserError(f"{name} computes with its attention mask by itself") from error
        raise UserError(f"{name} does not run with another attention than its own ({reason})") from error
    if not layers:
        raise UserError(f"{name} does not use transformers' attention interface")
    config: Any = causal_lm.config
    n_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if other := max(0, n_layers - len(layers)):
        raise UserError(f"{name}: {other} of {n_layers} layers mix tokens by other means than attention")
    if given.convolution:
        raise UserError(f"{name} mixes tokens by a convolution or a state-space layer, not by attention alone")
    if not _second_half(counted.met, given.met):
        raise UserError(f"{name} does not count positions as 0, 1, 2, ... or looks at more tokens than it is given")
    return tuple(layers)


def no_attention(_: int, calls: Sequence[Call]) -> list[torch.Tensor]:
    """Zeros in place of the attention output of each call, imagined ones where the values are."""
    shapes = [(call.q_1HCD.shape[2], call.q_1HCD.shape[1], call.v_1GCE.shape[-1]) for call in calls]
    return [call.v_1GCE.new_zeros(shape) for call, shape in zip(calls, shapes, strict=True)]


def _walk(causal_lm: torch.nn.Module, part: Piece, attend: Callable[..., list[torch.Tensor]]) -> ImaginedValues:
    """Imagine the forward of a part of the document."""
    with ImaginedValues() as values:  # type: ignore[no-untyped-call]
        ids_T = torch.arange(WHOLE).flip(0)  # where a token counts for the positions of later ones, it shows
        layer_major(decoder_of(causal_lm), cut(ids_T, [part]), WHOLE, attend)
    found: ImaginedValues = values
    return found


@contextmanager
def _own_positions(decoder: torch.nn.Module) -> Iterator[None]:
    """Within it, the decoder is not told the positions."""

    def untold(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": None}

    hook = decoder.register_forward_pre_hook(untold, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _second_half(whole: Sequence[torch.Tensor], half: Sequence[torch.Tensor]) -> bool:
    """Whether each tensor of the second half's tokens is that of the whole document, cut to them."""
    return len(whole) == len(half) and all(map(_is_second_half, whole, half))


def _is_second_half(whole: torch.Tensor, half: torch.Tensor) -> bool:
    if whole.ndim != half.ndim:
        return False
    for dim, (size, rest) in enumerate(zip(whole.shape, half.shape, strict=True)):
        if size - rest == WHOLE - TOKENS:  # rest may be more than TOKENS: see `cpmpi.model.rotary`
            whole = whole.narrow(dim, WHOLE - TOKENS, rest)
    return torch.equal(whole, half)


class ImaginedValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, integers and ones made on the meta device are real, on the CPU, and imagined values read as zeros.

    ``convolution`` says whether there was one, and ``met`` is what real tensors met imagined ones, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convolution = False
        self.met: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.convolution |= func.overloadpacket in CONVOLUTIONS
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(t.is_meta for t in tensors):
            made = func(*args, **kwargs)
            is_real = tensors or func is torch.ops.aten.ones.default
            if kwargs.get("device") == META and (is_real or not made.is_floating_point()):
                made = func(*args, **{**kwargs, "device": CPU})
            return made
        if func.overloadpacket in SCALARS:
            return torch.zeros((), dtype=tensors[0].dtype).item()
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(0, tensors[0].ndim, dtype=torch.int64, device=META)
        if kwargs.get("device") == CPU:
            return torch.zeros_like(tensors[0], **kwargs)
        self.met += [t for t in tensors if not t.is_meta]
        if func is torch.ops.aten.split_with_sizes.default:
            args = _with_sizes(*args)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(META), (args, kwargs))
        return func(*args, **kwargs)


def _with_sizes(tensor: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[torch.Tensor, Sequence[int], int]:
    """The arguments of a split; sizes that were read from imagined values become: all in the first part."""
    n = tensor.shape[dim]
    return tensor, sizes if sum(sizes) == n else [n, *[0] * (len(sizes) - 1)], dim
