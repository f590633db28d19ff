"""A checkpoint's own head: from hidden states to the scores of given tokens, a chunk at a time.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cpmpi.model.token_scores import NOTHING, Wanted, token_logprobs, token_scores


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

    def scores(
        self, hidden_TC: torch.Tensor, targets_T: torch.Tensor, wanted: Wanted = NOTHING
    ) -> Iterator[dict[str, torch.Tensor]]:  # fmt: skip
        """What `cpmpi.model.token_scores.token_scores` says of each target token, some at a time, on the CPU."""
        for target_T, logits_TV in self._logits(hidden_TC, targets_T):
            yield {name: value.cpu() for name, value in token_scores(logits_TV, target_T, wanted).items()}

    def judge(self, hidden_TC: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (T,) of each target token, and whether it is the most probable one (T,) bool; on the CPU."""
        logprobs, greedy = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
        for target_T, logits_TV in self._logits(hidden_TC, targets_T):
            greedy.append((logits_TV.argmax(1) == target_T).cpu())
            logprobs.append(token_logprobs(logits_TV, target_T).cpu())
        return torch.cat(logprobs), torch.cat(greedy)

    def logits(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """The logits (T, V) after each hidden state."""
        none_T = torch.zeros(len(hidden_TC), dtype=torch.int64, device=hidden_TC.device)
        return torch.cat([logits_TV for _, logits_TV in self._logits(hidden_TC, none_T)])

    def _logits(self, hidden_TC: torch.Tensor, targets_T: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Targets and logits (T, V), some tokens at a time."""
        name, decoder = _decoder_name(self.model), decoder_of(self.model)
        given = _Given(decoder)
        setattr(self.model, name, given)
        try:
            for i in range(0, len(targets_T), self.chunk_tokens):
                given.hidden_1TC = hidden_TC[None, i : i + self.chunk_tokens]
                target_T = targets_T[i : i + self.chunk_tokens]
                yield target_T, self.model(input_ids=target_T[None], use_cache=False).logits[0]
        finally:
            setattr(self.model, name, decoder)


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
