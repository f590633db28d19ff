"""A model's blocks (decoder layers), and after which of them the hidden state is all that is carried on.

A document can go on after a block where nothing that the blocks so far have made is used later but the last one's
output. Models that hand on more (keys that later layers share, value residuals) are found out by following every tensor
through a model without weights: whatever a block makes is its own until it ends, and only its output may be used after.

Then the blocks that are done need not run: they return their input, the last of them the hidden state that was saved.

Legend: C tokens of a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpmpi.model.attention_call import Call
from cpmpi.model.forward import Chunk, current_chunk, layer_major
from cpmpi.model.head import decoder_of
from cpmpi.model.probe import TOKENS, ImaginedValues, Layer, no_attention

NUMBERED = re.compile(r"(.*?\.\d+)(?:\.|$)")


class Block(NamedTuple):
    """A decoder layer: the name of its module, and the numbers of its first and last attention."""

    name: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a model in order, and where a document can go on.

    Attributes:
        blocks: all of them; empty where the model has none of one kind.
        whole: numbers of the blocks after which the hidden state is all that is carried on.
        shape: of a token's hidden state.
        dtype: of the hidden state.
        returned: how many values each block returns in a tuple; 0: its hidden state alone.
        in_place: whether a later block overwrites the hidden state that it is given.
        reason: why ``whole`` lacks blocks; empty if it has all but the last, after which only the head is left.
    """

    blocks: tuple[Block, ...] = ()
    whole: frozenset[int] = frozenset()
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    returned: tuple[int, ...] = ()
    in_place: bool = False
    reason: str = ""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's hidden state."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def before(self, attention: int) -> int | None:
        """The number of the block that ends right before an attention, if it is one of ``whole``."""
        found = next((n for n, block in enumerate(self.blocks) if block.last + 1 == attention), None)
        return found if found in self.whole else None


def blocks_of(causal_lm: torch.nn.Module, layers: Sequence[Layer]) -> Blocks:
    """The blocks of a model without weights.

    Args:
        causal_lm: the model.
        layers: of its probe.
    """
    owners = [found[1] if (found := NUMBERED.match(layer.module)) else "" for layer in layers]
    blocks, last = [], -1
    for name, calls in groupby(owners):
        first, last = last + 1, last + len(list(calls))
        blocks.append(Block(name, first, last))
    if "" in owners or len({block.name for block in blocks}) < len(blocks):
        return Blocks(reason="its attentions lie in no list of layers that run one after the other")
    try:
        return _followed(causal_lm, tuple(blocks))
    except _OddOutput as odd:
        return Blocks(reason=str(odd))


class _OddOutput(Exception):
    """A block's output is not one hidden state per token."""


@torch.inference_mode()
def _followed(causal_lm: torch.nn.Module, blocks: tuple[Block, ...]) -> Blocks:
    """Follow every tensor through the blocks."""
    follower = _Follower()  # type: ignore[no-untyped-call]
    outputs: list[torch.Tensor] = []
    returned: list[int] = []

    def begins(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if number != follower.ended or not isinstance(_hidden_input(args, kwargs), torch.Tensor):
            raise _OddOutput(f"{blocks[number].name} is not given its hidden state in turn")
        follower.inside = True

    def ends(number: int, output: Any) -> None:
        outputs.append(_hidden_output(output, blocks[number].name))
        returned.append(len(output) if isinstance(output, tuple | list) else 0)
        follower.inside = False
        follower.end(outputs[-1])

    def attend(layer: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        for call in calls:
            follower.use([call.q_1HCD, call.k_1GCD, call.v_1GCE])
        return no_attention(layer, calls)

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            module = causal_lm.get_submodule(block.name)
            before = module.register_forward_pre_hook(lambda _, a, k, n=number: begins(n, a, k), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(lambda _, __, out, n=number: ends(n, out)).remove)
        stack.enter_context(ImaginedValues())  # type: ignore[no-untyped-call]
        stack.enter_context(follower)
        layer_major(decoder_of(causal_lm), [Chunk(torch.zeros(TOKENS, dtype=torch.int64), 0)], TOKENS, attend)
    if len(outputs) != len(blocks):
        raise _OddOutput(f"{len(outputs)} of {len(blocks)} layers run")
    if len({(output.shape, output.dtype) for output in outputs}) > 1:
        raise _OddOutput("the hidden state has another shape or type after some layers")
    whole = frozenset(range(len(blocks) - 1)) - follower.broken
    reason = "later layers use more of earlier ones than their hidden state" if follower.broken else ""
    return Blocks(
        blocks=blocks, whole=whole, shape=tuple(outputs[0].shape[2:]), dtype=outputs[0].dtype,
        returned=tuple(returned), in_place=follower.in_place, reason=reason,
    )  # fmt: skip


def _hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _hidden_output(output: Any, name: str) -> torch.Tensor:
    """A block's hidden state, (1, C, ...)."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, torch.Tensor) or hidden.ndim < 3 or hidden.shape[:2] != (1, TOKENS):
        raise _OddOutput(f"{name} does not return a hidden state per token")
    return hidden


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every tensor is known by when it was made, and its use after a later block's end is noted.

    ``ended`` blocks have ended so far. What is made inside a block, or of something so made, carries the number of
    blocks that had ended by then; a hidden state is made anew when its block ends. Storages are followed, so that views
    are what they look at.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ended, self.inside, self.in_place = 0, False, False
        self.broken: set[int] = set()
        self._made: dict[int, int] = {}
        self._hidden: set[int] = set()
        self._alive: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        derived = self.use(given)
        made = func(*args, **(kwargs or {}))
        known = {self._key(tensor) for tensor in given}
        changed = {self._key(t) for t in self._changed(func, args, kwargs or {})}
        self.in_place |= bool(changed & self._hidden)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (derived or self.inside):
                key = self._key(tensor)
                if key not in known or key in changed:
                    self._made[key] = self.ended
        return made

    def use(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Note that tensors are used now; whether any of them comes from a block."""
        found = [self._made[key] for tensor in tensors if (key := self._key(tensor)) in self._made]
        for made in found:
            self.broken |= set(range(made, self.ended))
        return bool(found)

    def end(self, hidden: torch.Tensor) -> None:
        """A block ends with its output."""
        self.ended += 1
        self._made[self._key(hidden)] = self.ended
        self._hidden.add(self._key(hidden))

    def _key(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)  # an address may not come back for another storage
        return int(storage._cdata)

    @staticmethod
    def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors that an operation writes to."""
        schema = func._schema.arguments
        written = [a for a, s in zip(args, schema, strict=False) if s.alias_info is not None and s.alias_info.is_write]
        names = {s.name for s in schema if s.alias_info is not None and s.alias_info.is_write}
        written += [value for name, value in kwargs.items() if name in names]
        return [t for t in tree_leaves(written) if isinstance(t, torch.Tensor)]


@contextmanager
def watched(
    causal_lm: torch.nn.Module, blocks: Blocks, note: Callable[[int, Chunk, torch.Tensor], None]
) -> Iterator[None]:
    """Within it, ``note`` gets the number of each block of ``blocks.whole`` that ends, the chunk, and its hidden state
    (C, ...)."""

    def ends(number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        note(number, current_chunk(), hidden[0])

    with ExitStack() as stack:
        for number in blocks.whole:
            module = causal_lm.get_submodule(blocks.blocks[number].name)
            stack.callback(module.register_forward_hook(lambda _, __, out, n=number: ends(n, out)).remove)
        yield


@contextmanager
def done_up_to(
    causal_lm: torch.nn.Module, blocks: Blocks, last: int, saved: Callable[[Chunk], torch.Tensor]
) -> Iterator[None]:
    """Within it, blocks 0 to ``last`` do not run: they return their input, the last one what ``saved`` has of a chunk,
    (C, ...)."""

    def run(number: int, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden_input(args, kwargs)
        if number == last:
            shape, device = hidden.shape, hidden.device
            hidden = saved(current_chunk())[None].to(device)
            assert hidden.shape == shape, (hidden.shape, shape)
        more = blocks.returned[number]
        return (hidden, *[None] * (more - 1)) if more else hidden

    with ExitStack() as stack:
        for number, block in enumerate(blocks.blocks[: last + 1]):
            module = causal_lm.get_submodule(block.name)
            stack.callback(delattr, module, "forward")
            module.forward = partial(run, number)  # the module itself stays, with whatever else is asked of it
        yield
