"""Choose a backend, once for a run: the fastest one that passes a comparison with the reference on this machine.

Legend: T tokens, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import torch

from . import blocked, cpu, cudnn, efficient, flash, reference
from .backend import Backend, Contributions, accumulator_dtype
from .mask import Mask

BACKENDS: dict[str, Contributions] = {
    "cpu": cpu.contributions,
    "cudnn": cudnn.contributions,
    "flash": flash.contributions,
    "efficient": efficient.contributions,
    "blocked": blocked.contributions,
    "reference": reference.contributions,
}

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far a backend may be from the float64 reference in ``probe``, whose values are about 1: some units of rounding of
the dtype. TF32, with 10 bits of mantissa, does not pass as float32."""


def named(name: str, reason: str = "asked for by name") -> Backend:
    """The backend called ``name``, unprobed.

    Raises:
        ValueError: no backend has that name; lists those that exist.
    """
    if name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; choices: {', '.join(BACKENDS)}")
    return Backend(name=name, reason=reason, contributions=BACKENDS[name])


def select(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int,
    value_head_dim: int | None = None,
    softcap: float | None = None,
) -> Backend:
    """The fastest backend for these inputs that agrees with the reference, with a one-line reason for the log.

    Args:
        device: where the tensors live.
        dtype: theirs.
        head_dim: of queries and keys.
        value_head_dim: of values; None: the same.
        softcap: of the scores, if the model has one.

    Raises:
        ValueError: not a float dtype that attention is computed in.
        RuntimeError: no backend agrees with the reference; names each and what was wrong with it.
    """
    device = torch.device(device)
    if dtype not in TOLERANCE:
        raise ValueError(f"attention in {dtype}; choices: {', '.join(str(t) for t in TOLERANCE)}")
    value_head_dim = value_head_dim or head_dim
    refused = []
    for name, why in candidates(device, dtype, head_dim, value_head_dim, softcap):
        try:
            worst = probe(named(name), device, dtype, head_dim, value_head_dim, softcap)
        except (RuntimeError, NotImplementedError) as error:
            refused.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if worst <= TOLERANCE[dtype]:
            also = "".join(f"; not {line}" for line in refused)
            return named(name, f"{why}; tested now: within {worst:.1e} of the float64 reference{also}")
        refused.append(f"{name}: {worst:.1e} from the reference, more than {TOLERANCE[dtype]:.0e}")
    raise RuntimeError(f"no attention backend for {dtype} on {device}: {'; '.join(refused)}")


def candidates(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_head_dim: int, softcap: float | None
) -> list[tuple[str, str]]:
    """Names of backends, fastest first, with the reason for each."""
    portable = ("blocked", "plain torch takes everything")
    if softcap is not None:
        return [("blocked", f"no fused kernel takes a softcap ({softcap})")]
    if device.type == "cpu":
        computing = str(accumulator_dtype(dtype)).removeprefix("torch.")
        return [("cpu", f"torch's flash attention for the CPU, computing in {computing}"), portable]
    if device.type != "cuda":
        return [portable]
    if dtype == torch.float64:
        return [("blocked", "no fused kernel takes float64")]
    memory_efficient = ("efficient", f"memory-efficient attention takes {dtype} on this GPU")
    major, minor = torch.cuda.get_device_capability(device)
    if dtype == torch.float32 or (major < 8 and dtype == torch.float16):
        return [memory_efficient, portable]
    if major < 8:
        return [portable]
    flash_attention = ("flash", f"FlashAttention on compute capability {major}.{minor}")
    # cuDNN's kernels beat FlashAttention 2 from Hopper on; other head dims are not supported everywhere.
    if major >= 9 and head_dim == value_head_dim and head_dim <= 128 and head_dim % 8 == 0:
        return [
            ("cudnn", f"cuDNN attention on compute capability {major}.{minor}"),
            flash_attention,
            memory_efficient,
            portable,
        ]
    return [flash_attention, memory_efficient, portable]


def probe(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int,
    softcap: float | None = None,
) -> float:
    """The largest difference from the float64 reference, in out and lse, over a window that needs every kind of block.

    An operator may be missing from a torch build, refuse a GPU or a head dim, or change the form of its lse; a run of
    hours should not find out. So a run asks first, with a few hundred tokens.
    """
    generator = torch.Generator().manual_seed(0)
    q_THD, k_TGD, v_TGE = (
        torch.randn(300, heads, dim, generator=generator).to(device, dtype)
        for heads, dim in ((8, head_dim), (2, head_dim), (2, value_head_dim))
    )
    mask, scale = Mask(window=70, documents=(160,)), head_dim**-0.5
    ours = backend.attend(q_THD, k_TGD, v_TGE, q_start=0, k_start=0, mask=mask, scale=scale, softcap=softcap)
    truth = named("reference").attend(
        q_THD.double(), k_TGD.double(), v_TGE.double(), q_start=0, k_start=0, mask=mask, scale=scale, softcap=softcap
    )
    assert ours is not None
    assert truth is not None
    # torch's max keeps a NaN, Python's may lose it.
    return float(torch.stack([(x.double() - y).abs().max() for x, y in zip(ours, truth)]).max())
