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
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import greenlet
import torch

from cpmpi.attention_call import ATTENTION, Call, Visible, make_mask
from cpmpi.errors import UserError
from cpmpi.layout import Piece
from cpmpi.logprobs import token_logprobs
from cpmpi.rotary import document_length
from cpmpi.transport import Pending


def chunks(pieces: Sequence[Piece], chunk_tokens: int) -> list[Piece]:
    """The pieces cut into runs of at most ``chunk_tokens`` tokens, as equal as possible."""
    cut = []
    for piece in pieces:
        n = -(-piece.size // chunk_tokens)
        bounds = [piece.start + piece.size * i // n for i in range(n + 1)]
        cut += [Piece(a, b) for a, b in pairwise(bounds)]
    return cut


def layer_major(
    model: torch.nn.Module,
    token_ids_T: torch.Tensor,
    parts: Sequence[Piece],
    attend: Callable[[int, list[Call]], Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """The hidden states after the final norm, (C, hidden) for each chunk.

    Args:
        model: a transformers decoder without head, with ``ATTENTION`` as its attention implementation.
        token_ids_T: the document's token ids, int64, on the model's device.
        parts: the chunks to compute, as runs of positions.
        attend: given a layer's number (0, 1, ...) and the chunks' calls, the attention output of each, (C, H, E).
    """
    walkers = [greenlet.greenlet(_walk) for _ in parts]
    with document_length(model, len(token_ids_T)):
        states = _walk_on(walkers, [(model, token_ids_T, part) for part in parts])
        layer = 0
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


def _walk(model: torch.nn.Module, token_ids_T: torch.Tensor, part: Piece) -> torch.Tensor:
    """One chunk's way through the whole model."""
    positions_1C = torch.arange(part.start, part.stop, device=token_ids_T.device)[None]
    ids_1C = token_ids_T[None, part.start : part.stop]
    hidden: torch.Tensor = model(input_ids=ids_1C, position_ids=positions_1C, use_cache=False).last_hidden_state
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


def decoder_of(causal_lm: torch.nn.Module) -> torch.nn.Module:
    """The model without its head."""
    return causal_lm.get_submodule(_decoder_name(causal_lm))


def _decoder_name(causal_lm: torch.nn.Module) -> str:
    """The attribute that holds the decoder: some classes have another one than they say (Llama 4)."""
    from transformers import PreTrainedModel

    children = dict(causal_lm.named_children())
    prefix = str(causal_lm.base_model_prefix)
    return prefix if prefix in children else next(k for k, m in children.items() if isinstance(m, PreTrainedModel))


class Head:
    """Log-probabilities from hidden states: the checkpoint's own head, without its decoder.

    The causal-LM class computes what follows the decoder (head, soft caps, scales), so it is called as it is, with the
    decoder replaced by one that returns the given hidden states; logits exist for ``chunk_tokens`` tokens at a time.
    """

    def __init__(self, model: torch.nn.Module, chunk_tokens: int = 256) -> None:
        self.model = model
        self.chunk_tokens = chunk_tokens

    def logprobs(self, hidden_TC: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Log-probability of each target token, (T,) float32 on the CPU."""
        name, decoder = _decoder_name(self.model), decoder_of(self.model)
        given = _Given(decoder)
        setattr(self.model, name, given)
        try:
            parts = list(self._parts(given, hidden_TC, targets_T))
        finally:
            setattr(self.model, name, decoder)
        return torch.cat(parts).cpu() if parts else torch.empty(0)

    def _parts(self, given: _Given, hidden_TC: torch.Tensor, targets_T: torch.Tensor) -> Iterator[torch.Tensor]:
        for i in range(0, len(targets_T), self.chunk_tokens):
            given.hidden_1TC = hidden_TC[None, i : i + self.chunk_tokens]
            target_T = targets_T[i : i + self.chunk_tokens]
            logits_TV = self.model(input_ids=target_T[None], use_cache=False).logits[0]
            yield token_logprobs(logits_TV, target_T)


class _Given(torch.nn.Module):
    """A stand-in for a decoder that returns the hidden states it was given, and has the decoder's other attributes."""

    hidden_1TC: torch.Tensor

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["decoder_"] = decoder  # no child: it must not be moved or listed

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output(self.hidden_1TC)

    def __getattr__(self, name: str) -> Any:
        from transformers import PreTrainedModel

        value = getattr(self.__dict__["decoder_"], name)
        return self if isinstance(value, PreTrainedModel) else value  # some heads call a decoder inside their decoder


class _Output(tuple[torch.Tensor]):
    """A decoder's output with hidden states alone: whatever else a head may look for in it is None."""

    def __new__(cls, hidden_1TC: torch.Tensor) -> _Output:
        return super().__new__(cls, (hidden_1TC,))

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """The hidden states after the final norm."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None
