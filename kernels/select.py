"""Choose a backend, once for a run."""

from __future__ import annotations

import torch

from . import cpu, reference
from .backend import Backend, Contributions

BACKENDS: dict[str, Contributions] = {
    "reference": reference.contributions,
    "cpu": cpu.contributions,
}


def named(name: str, reason: str = "asked for by name") -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: no backend has that name; lists those that exist.
    """
    if name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; choices: {', '.join(sorted(BACKENDS))}")
    return Backend(name=name, reason=reason, contributions=BACKENDS[name])


def select(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int,
    value_head_dim: int | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Backend:
    """The fastest backend for these inputs, with a one-line reason for the log.

    Args:
        device: where the tensors live.
        dtype: theirs.
        head_dim: of queries and keys.
        value_head_dim: of values; None: the same.
        softcap: of the scores, if the model has one.
        window: sliding window in tokens, if the model has one.
    """
    if softcap is not None or (value_head_dim or head_dim) != head_dim:
        return named("reference", "softcap or unequal head dims")
    return named("cpu", f"torch's fused flash attention on the CPU computes {dtype} in float32")
