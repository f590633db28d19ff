"""Layer-major forward: a whole document through the checkpoint's own code, a layer at a time, in chunks of tokens.

Every chunk of tokens runs the checkpoint's complete forward in a coroutine of its own. The only thing that a decoder
computes across tokens is attention, so the registered attention function is where the coroutines meet: each hands over
its queries, keys and values and sleeps; once all have arrived, the layer's attention runs over all tokens of all ranks,
and each coroutine goes on with its rows of the result, through the rest of its layer up to the next attention.

So everything but attention is computed chunk by chunk, whatever the model is made of, with no model code here, and no
more than one layer's keys and values is ever in use.

Where ranks share the weights, a chunk also sleeps while a partial sum of its own is completed; the next chunk computes
meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import greenlet
import torch

from cpmpi.attention.layout import Piece
from cpmpi.comm.transport import Pending
from cpmpi.errors import UserError
from cpmpi.model.attention_call import ATTENTION, Call, Visible, make_mask
from cpmpi.model.rotary import document_length


def chunked(pieces: Sequence[Piece], chunk_tokens: int) -> list[Piece]:
    """The pieces cut into runs of at most ``chunk_tokens`` tokens, as equal as possible."""
    runs = []
    for piece in pieces:
        n = -(-piece.size // chunk_tokens)
        bounds = [piece.start + piece.size * i // n for i in range(n + 1)]
        runs += [Piece(a, b) for a, b in pairwise(bounds)]
    return runs


class Chunk(NamedTuple):
    """Tokens that go through the model together: their ids (C,), int64, and the position of the first.

    The others follow it, unless ``positions_C`` says where each one is.
    """

    ids_C: torch.Tensor
    start: int
    positions_C: torch.Tensor | None = None

    @property
    def stop(self) -> int:
        """The position after the last, of those that follow one another."""
        assert self.positions_C is None
        return self.start + len(self.ids_C)


def cut(token_ids_T: torch.Tensor, parts: Sequence[Piece]) -> list[Chunk]:
    """The chunks of a document at these runs of positions."""
    return [Chunk(token_ids_T[part.start : part.stop], part.start) for part in parts]


class Walker(greenlet.greenlet):
    """The coroutine of a chunk."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(_walk)
        self.chunk = chunk


def current_chunk() -> Chunk:
    """The chunk whose forward is running, for hooks of modules."""
    walker = greenlet.getcurrent()
    assert isinstance(walker, Walker), "no chunk is on its way"
    return walker.chunk


def layer_major(
    model: torch.nn.Module,
    chunks: Sequence[Chunk],
    n_tokens: int,
    attend: Callable[[int, list[Call]], Sequence[torch.Tensor]],
    first: int = 0,
) -> list[torch.Tensor]:
    """The hidden states after the final norm, (C, hidden) for each chunk.

    Args:
        model: a transformers decoder without head, with ``ATTENTION`` as its attention implementation.
        chunks: what to compute, on the model's device.
        n_tokens: of the whole document, for what depends on its length.
        attend: given a layer's number (0, 1, ...) and the chunks' calls, the attention output of each, (C, H, E).
        first: number of the first attention that is called: more than 0 where the layers before it do not run.
    """
    walkers = [Walker(chunk) for chunk in chunks]
    with document_length(model, n_tokens):
        states = _walk_on(walkers, [(model, chunk) for chunk in chunks])
        layer = first
        while isinstance(states[0], Call):
            assert all(isinstance(call, Call) and call.module is states[0].module for call in states)
            outputs = attend(layer, states)
            states = []  # the chunks' queries, keys and values go before their layer goes on
            states = _walk_on(walkers, [(output,) for output in outputs])
            layer += 1
    return states


class Sum(NamedTuple):
    """A partial sum on its way to the ranks that share the weights, and the tensor it came from."""

    pending: Pending
    partial: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The sum, in the partial one's shape and type."""
        return self.pending.wait().view(torch.float32).view(self.partial.shape).to(self.partial.dtype)


def _walk_on(walkers: Sequence[greenlet.greenlet], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Each chunk goes on with its arguments, up to its next attention or its end; what it comes back with.

    While a chunk's partial sum is under way the next chunk computes. All ranks that share the weights do so in the same
    order, so that their sums meet.
    """
    states: list[Any] = [None] * len(walkers)
    summing: deque[int] = deque()

    def go(i: int, *given: Any) -> None:
        states[i] = walkers[i].switch(*given)
        if isinstance(states[i], Sum):
            summing.append(i)

    for i, given in enumerate(arguments):
        go(i, *given)
        while len(summing) > 1:
            first = summing.popleft()
            go(first, states[first].wait())
    while summing:
        first = summing.popleft()
        go(first, states[first].wait())
    return states


def sum_outputs(model: torch.nn.Module, modules: Sequence[str], start: Callable[[torch.Tensor], Pending]) -> None:
    """Complete the outputs of some modules, which are partial sums, among the ranks that share the weights.

    Args:
        model: with a share of the weights.
        modules: the names of these modules.
        start: starts an all-reduce of a tensor, in float32.
    """

    def complete(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        assert isinstance(output, torch.Tensor), f"{type(module).__name__} returns more than a tensor"
        parent = greenlet.getcurrent().parent
        assert parent is not None, "a model with cpmpi's attention runs inside layer_major only"
        summed: torch.Tensor = parent.switch(Sum(start(output), output))
        return summed

    for name in modules:
        model.get_submodule(name).register_forward_hook(complete)


def _walk(model: torch.nn.Module, chunk: Chunk) -> torch.Tensor:
    """One chunk's way through the whole model."""
    given = {}
    if chunk.positions_C is None:
        positions_1C = torch.arange(chunk.start, chunk.stop, device=chunk.ids_C.device)[None]
    else:  # without a mask, transformers takes positions that jump for several texts, and makes another rule for them
        positions_1C = chunk.positions_C[None]
        given["attention_mask"] = torch.ones_like(positions_1C)
    out = model(input_ids=chunk.ids_C[None], position_ids=positions_1C, use_cache=False, **given)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden[0]


def _meet(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Visible | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that the model calls; see transformers' attention interface."""
    if not isinstance(attention_mask, Visible | None):
        raise UserError(f"{type(module).__name__} makes its own attention mask")
    parent = greenlet.getcurrent().parent
    assert parent is not None, "a model with cpmpi's attention runs inside layer_major only"
    out_CHE: torch.Tensor = parent.switch(Call(module, query, key, value, attention_mask, arguments))
    return out_CHE[None].to(query.dtype), None


def register() -> None:
    """Make ``attn_implementation=ATTENTION`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _meet)
    AttentionMaskInterface.register(ATTENTION, make_mask)
