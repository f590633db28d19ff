"""Rotary embeddings whose frequencies depend on the document's length (dynamic NTK, LongRoPE).

transformers computes them from the largest position of a call and keeps state between calls. Chunks of one document
would each see another length. So every such module is told the document's last position in every call, and forgets the
previous document first.

Legend: C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def document_length(model: torch.nn.Module, n_tokens: int) -> Iterator[None]:
    """Within it, rotary embeddings are those of a document of ``n_tokens`` tokens, whatever the chunk."""

    def add_last(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _with_last(kwargs["position_ids"], n_tokens - 1)}
        return (args[0], _with_last(args[1], n_tokens - 1), *args[2:]), kwargs

    def drop_last(_: torch.nn.Module, __: Any, embeddings: Any) -> Any:
        if isinstance(embeddings, torch.Tensor):
            return embeddings[..., :-1, :]
        return tuple(part[..., :-1, :] for part in embeddings)

    with ExitStack() as hooks:
        for module in model.modules():
            if _depends_on_length(module):
                _forget(module)
                hooks.enter_context(_removed(module.register_forward_pre_hook(add_last, with_kwargs=True)))
                hooks.enter_context(_removed(module.register_forward_hook(drop_last)))
        yield


def length_matters(model: torch.nn.Module) -> bool:
    """Whether any rotary embedding depends on the document's length."""
    return any(_depends_on_length(module) for module in model.modules())


def same_for(model: torch.nn.Module, lengths: Sequence[int]) -> bool:
    """Whether rotary embeddings of documents of these lengths are the same, so that one's keys can be the other's."""
    modules = [module for module in model.modules() if _depends_on_length(module)]
    found = []
    for n_tokens in lengths:
        with document_length(model, n_tokens):
            found.append([part for module in modules for part in _embeddings(module)])
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def _embeddings(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What a module gives for the first positions, for each layer type where it has several."""
    for kwargs in _calls(module):
        buffer = next(module.buffers())
        positions_1C = torch.arange(2, device=buffer.device)[None]
        made = module(buffer.new_zeros(1, 1, 1), positions_1C, **kwargs)
        yield from (made,) if isinstance(made, torch.Tensor) else made


def _calls(module: torch.nn.Module) -> list[dict[str, Any]]:
    """The further arguments of a module's calls."""
    return [{} if layer_type is None else {"layer_type": layer_type} for layer_type in _types(module)]


def _depends_on_length(module: torch.nn.Module) -> bool:
    return any(t in ("dynamic", "longrope") for t in _types(module).values())


def _types(module: torch.nn.Module) -> dict[str | None, str]:
    """The rotary types of a module, for each layer type where it has several; empty for other modules."""
    types = getattr(module, "rope_type", None)
    return types if isinstance(types, dict) else {None: types} if isinstance(types, str) else {}


def _forget(module: torch.nn.Module) -> None:
    """A call with position 0 brings the original frequencies back."""
    for kwargs in _calls(module):
        buffer = next(module.buffers())
        module(buffer.new_zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64, device=buffer.device), **kwargs)


def _with_last(positions_1C: torch.Tensor, last: int) -> torch.Tensor:
    return torch.cat([positions_1C, torch.full_like(positions_1C[..., :1], last)], dim=-1)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
