"""All that cpmpi uses of transformers beyond its documented interface, in one place with a test for each.

transformers may change these in any minor release, so setup.py allows those versions alone for which
``tests/test_transformers_private.py`` has passed. Everything else of transformers that cpmpi calls is documented there:
the Auto classes, the attention and mask interfaces, ``tp_plan``, ``base_model_prefix``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch

# Operations of conversions: experts are stacked, tensors are joined.
MERGE, CONCATENATE = "MergeModulelist", "Concatenate"
# Buffers that older checkpoints hold and newer models make themselves: refused only where the model has none of them.
MADE_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


class Destination(NamedTuple):
    """Where a stored tensor goes.

    Attributes:
        key: its name in the file.
        pattern: the source pattern of the conversion that it is part of; its key where it is only renamed.
        conversion: transformers' conversion, a ``WeightRenaming`` or ``WeightConverter``; None where it has no place.
        targets: the model's parameters that it becomes, alone or with others; without a place, the names it would have.
    """

    key: str
    pattern: str
    conversion: Any
    targets: list[str]


def is_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for a config."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def not_to_initialize(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The same, marked: transformers draws no random numbers for it, which takes most of a large skeleton's time."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What the names of parameters contain that stay in float32 whatever the type of the rest; None: no such ones."""
    plan = model._get_dtype_plan(dtype)
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in plan)) if plan else None


def tie(model: Any, missing: Iterable[str]) -> set[str]:
    """Tie what the model ties, as transformers does when it loads; which of the missing ones are still missing."""
    from transformers.utils import logging

    left, verbosity = set(missing), logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of a head that differs from the embedding, which is as it is stored
    try:
        model.tie_weights(missing_keys=left, recompute_mapping=False)
    finally:
        logging.set_verbosity(verbosity)
    return left


def may_be_missing(model: Any) -> re.Pattern[str]:
    """What the names of parameters and buffers contain that need not be in the files."""
    return re.compile("|".join(model._keys_to_ignore_on_load_missing or ["$^"]))


def may_be_unexpected(model: Any) -> re.Pattern[str]:
    """What the names of tensors contain that may be in the files though the model has no place for them."""
    patterns = {f"({pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ()}
    buffers = [name for name, _ in model.named_buffers()]
    patterns |= {pattern for end, pattern in MADE_BUFFERS.items() if any(name.endswith(end) for name in buffers)}
    return re.compile("|".join(sorted(patterns)) or "$^")


def destinations(model: Any, keys: Iterable[str]) -> Iterator[Destination]:
    """Where transformers puts each stored tensor when it loads the model, in its order.

    The same steps as in its ``convert_and_load_state_dict_in_model``, which does all of it at once.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    for key in sorted(keys, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = loading.rename_source_key(key, [], [], prefix, wanted)
        conversion = by_pattern[pattern] if pattern else loading.WeightRenaming(key, name)
        ends = conversion.target_patterns if pattern else [name]
        first = next((end for end in ends if end in name), ends[0])
        targets = [name.replace(first, end) for end in ends]
        yield Destination(key, pattern or key, conversion if name in wanted else None, targets)


def unexpected(model: Any, placed: Iterable[Destination]) -> dict[str, list[str]]:
    """What the model has no place for: the names under which transformers reports it, by the names in the files."""
    wanted, ignored = model.state_dict(), may_be_unexpected(model)
    names = {to.key: [name for name in to.targets if name not in wanted and not ignored.search(name)] for to in placed}
    return {key: odd for key, odd in names.items() if odd}


def operations(conversion: Any) -> list[str]:
    """The names of what a conversion does beside renaming: ``MERGE``, ``CONCATENATE``, or another one."""
    return [type(operation).__name__ for operation in getattr(conversion, "operations", None) or ()]


def convert(
    conversion: Any, model: Any, target: str, parts: Iterable[tuple[str, str, Callable[[], torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """The parameters that a conversion makes, by name.

    Args:
        conversion: of a `Destination`; it is left as it is.
        model: the causal-LM model.
        target: the first of the parameters.
        parts: what it is made of: the key, the pattern, and what reads the tensor.
    """
    own = deepcopy(conversion)
    for key, pattern, read in parts:
        own.add_tensor(target, key, pattern, read)
    made = own.convert(target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
