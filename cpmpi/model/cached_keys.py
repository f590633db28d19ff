"""Whether transformers caches the very keys and values that its attention gets, which are what a run stores.

Most models hand their keys and values to the cache and what the cache returns to attention. Some change them in between
(two attentions a layer, values put together in another way): what a run stores is then not what their cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError
from cpmpi.model.attention_call import Call
from cpmpi.model.forward import cut, layer_major
from cpmpi.model.head import decoder_of
from cpmpi.model.probe import ImaginedValues, no_attention

TOKENS = 8


@torch.inference_mode()
def check_cached(causal_lm: torch.nn.Module) -> None:
    """Compare, layer by layer, what a model on the meta device hands to its cache with what its attention gets.

    Raises:
        UserError: they are not the same tensors in some layer, or a layer has several attentions.
    """
    from transformers import DynamicCache

    given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Noting(DynamicCache):  # type: ignore[misc]
        def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
            given[layer] = key, value
            return given[layer]

    cache, decoder, name = Noting(), decoder_of(causal_lm), type(causal_lm).__name__

    def with_cache(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    def compare(layer: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        (call,) = calls
        held = [given[layer]] if layer in given else list(given.values())  # a layer may use another one's keys
        if not any(call.k_1GCD is key and call.v_1GCE is value for key, value in held):
            raise UserError(
                f"{name}: transformers caches other keys and values than its attention gets (layer {layer}), which are "
                "what the run has: they are no cache of transformers"
            )
        return no_attention(layer, calls)

    hook = decoder.register_forward_pre_hook(with_cache, with_kwargs=True)
    try:
        with ImaginedValues():  # type: ignore[no-untyped-call]
            layer_major(decoder, cut(torch.arange(TOKENS), [Piece(0, TOKENS)]), TOKENS, compare)
    except UserError:
        raise
    except Exception as error:  # of any type: models differ in what they ask of a cache
        raise UserError(
            f"{name}: does not run with a cache of transformers ({type(error).__name__}: {error})"
        ) from error
    finally:
        hook.remove()
