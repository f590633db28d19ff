"""Choose a backend, once for a run: of those that agree with the reference on this machine, the fastest one.

Trying and deciding are apart, so that every rank can try and one can decide for all: `try_all`, then `rates`, then
`decide`. `select` does it for a process alone.

Legend: T tokens, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import blocked, cpu, cpu_half, cudnn, efficient, flash, onednn, reference
from .backend import Backend, Contributions, accumulator_dtype
from .mask import Mask

BACKENDS: dict[str, Contributions] = {
    "cpu": cpu.contributions,
    "cpu_half": cpu_half.contributions,
    "onednn": onednn.contributions,
    "cudnn": cudnn.contributions,
    "flash": flash.contributions,
    "efficient": efficient.contributions,
    "blocked": blocked.contributions,
    "reference": reference.contributions,
}

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far a backend may be from the float64 reference in `worst_difference`, whose values are about 1: some units of
rounding of the dtype. TF32, with 10 bits of mantissa, does not pass as float32."""

TIMED_QUERIES, TIMED_KEYS = 512, 2048  # of a call by which backends are timed: at most, where heads are large
TIMED_FLOPS = {"cpu": 1e9, "cuda": 1e11}  # of such a call for each thread: 10 ms on a core
TIMED_KV_HEADS = 2  # at most: heads are worked on one after the other
TURNS = 4  # of all backends; the first one warms up, the fastest of the others counts
ALIKE = 0.95  # of the highest rate: from here on the earlier candidate is taken, so that noise decides nothing


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a layer's attention asks of a kernel: its type, heads, head dims and soft cap."""

    dtype: torch.dtype
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    softcap: float | None = None


class Trial(NamedTuple):
    """What a rank found of a candidate: how far from the reference it is at the most, or why it does not run."""

    name: str
    why: str
    worst: float
    problem: str = ""

    def refusal(self, dtype: torch.dtype) -> str:
        """Why this candidate is out of the question; empty if it is not."""
        if self.problem or self.worst <= TOLERANCE[dtype]:
            return self.problem
        return f"{self.worst:.1e} from the reference, more than {TOLERANCE[dtype]:.0e}"


def named(name: str, reason: str = "asked for by name") -> Backend:
    """The backend called ``name``, untried.

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
    heads: tuple[int, int] = (8, 2),
) -> Backend:
    """The fastest backend for these inputs that agrees with the reference, with a one-line reason for the log.

    Args:
        device: where the tensors live.
        dtype: theirs.
        head_dim: of queries and keys.
        value_head_dim: of values; None: the same.
        softcap: of the scores, if the model has one.
        heads: query heads and KV heads.

    Raises:
        ValueError: not a float dtype that attention is computed in.
        RuntimeError: no backend agrees with the reference; names each and what was wrong with it.
    """
    device = torch.device(device)
    shape = Shape(
        dtype=dtype, query_heads=heads[0], kv_heads=heads[1], key_dim=head_dim, value_dim=value_head_dim or head_dim,
        softcap=softcap,
    )  # fmt: skip
    trials = try_all(shape, device)
    return decide(shape, [trials], [rates(shape, device, passing(shape, [trials]))])


def candidates(shape: Shape, device: torch.device) -> list[tuple[str, str]]:
    """Names of backends with the reason for each; where several are equally fast the first is taken.

    Raises:
        ValueError: not a float dtype that attention is computed in.
    """
    dtype, softcap = shape.dtype, shape.softcap
    if dtype not in TOLERANCE:
        raise ValueError(f"attention in {dtype}; choices: {', '.join(str(t) for t in TOLERANCE)}")
    portable = ("blocked", "plain torch takes everything")
    if device.type == "cpu":
        return [*_on_a_cpu(dtype, softcap), portable]
    if softcap is not None:
        return [("blocked", f"no fused kernel takes a softcap ({softcap})")]
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
    if major >= 9 and shape.key_dim == shape.value_dim and shape.key_dim <= 128 and shape.key_dim % 8 == 0:
        return [
            ("cudnn", f"cuDNN attention on compute capability {major}.{minor}"),
            flash_attention,
            memory_efficient,
            portable,
        ]
    return [flash_attention, memory_efficient, portable]


def _on_a_cpu(dtype: torch.dtype, softcap: float | None) -> list[tuple[str, str]]:
    """The fused kernels, the most exact first."""
    wide, own = (str(kind).removeprefix("torch.") for kind in (accumulator_dtype(dtype), dtype))
    fused = ("cpu", f"torch's flash attention for the CPU, computing in {wide}")
    products = ("onednn", f"oneDNN's matrix products, computing in {wide}")
    half = ("cpu_half", f"torch's flash attention for the CPU, computing in {own}")
    if dtype == torch.float64:
        return [fused] if softcap is None else []
    if softcap is not None:
        return [products]
    return [fused, products] if own == wide else [fused, products, half]


def try_all(shape: Shape, device: torch.device) -> tuple[Trial, ...]:
    """Compare every candidate with the reference on this machine; a few milliseconds each.

    Raises:
        ValueError: not a float dtype that attention is computed in.
    """
    found = []
    for name, why in candidates(shape, device):
        try:
            worst = worst_difference(named(name), device, shape.dtype, shape.key_dim, shape.value_dim, shape.softcap)
            found.append(Trial(name, why, worst))
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            found.append(Trial(name, why, float("nan"), str(error).splitlines()[0]))
    return tuple(found)


def passing(shape: Shape, everyone: Sequence[Sequence[Trial]]) -> tuple[str, ...]:
    """The candidates that agree with the reference on every rank, given each rank's trials.

    Raises:
        RuntimeError: there is none; names each and what was wrong with it.
    """
    refused = _refused(shape, everyone)
    names = [p.name for p in everyone[0] if all(p.name in {q.name for q in trials} for trials in everyone)]
    passed = tuple(name for name in names if name not in refused)
    if not passed:
        told = "; ".join(f"{name}: {why}" for name, why in refused.items()) or "ranks have no candidate in common"
        raise RuntimeError(f"no attention backend for {shape.dtype}: {told}")
    return passed


def _refused(shape: Shape, everyone: Sequence[Sequence[Trial]]) -> dict[str, str]:
    """Why candidates are out of the question, on the first rank that says so."""
    reasons: dict[str, str] = {}
    for p in (p for trials in everyone for p in trials):
        if reason := p.refusal(shape.dtype):
            reasons.setdefault(p.name, reason)
    return reasons


def rates(
    shape: Shape, device: torch.device, names: Sequence[str], together: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """FLOP/s of each of these backends on this rank, where every query sees every key; they take turns.

    Args:
        shape: the layer's; few of its heads are worked on, which changes no rate.
        device: of the tensors.
        names: of backends that agree with the reference.
        together: a barrier: ranks that share cores or a GPU are timed at once, as they will compute at once.
    """
    kv_heads = min(shape.kv_heads, TIMED_KV_HEADS)
    query_heads = kv_heads * (shape.query_heads // shape.kv_heads)
    flops_a_pair = 2 * query_heads * (shape.key_dim + shape.value_dim)
    budget = TIMED_FLOPS.get(device.type, 1e9) * (torch.get_num_threads() if device.type == "cpu" else 1)
    keys = max(TIMED_QUERIES, min(TIMED_KEYS, int(budget / flops_a_pair / TIMED_QUERIES)))
    tensors = random_tensors(
        device, shape.dtype, (TIMED_QUERIES, query_heads, shape.key_dim), (keys, kv_heads, shape.key_dim),
        (keys, kv_heads, shape.value_dim),
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in names}
    together()
    for _ in range(TURNS):
        for name in names:
            begun = time.perf_counter()
            named(name).attend(
                *tensors, q_start=keys, k_start=0, mask=Mask(), scale=shape.key_dim**-0.5, softcap=shape.softcap
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: flops_a_pair * TIMED_QUERIES * keys / min(times[1:]) for name, times in seconds.items()}


def slowest(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each backend's rate on the rank where it is slowest, for which the others wait in every round."""
    return {name: min(rank[name] for rank in measured) for name in measured[0]}


def decide(
    shape: Shape, everyone: Sequence[Sequence[Trial]], measured: Sequence[Mapping[str, float]], note: str = ""
) -> Backend:
    """The backend for all ranks: the fastest of those that pass on every rank, by its slowest rank.

    Args:
        shape: the layer's.
        everyone: each rank's trials.
        measured: each rank's FLOP/s of the candidates that pass.
        note: on where the rates come from, for the reason.

    Raises:
        RuntimeError: no candidate passes on every rank.
    """
    names, flops = passing(shape, everyone), slowest(measured)
    enough = ALIKE * max(flops[name] for name in names)
    name = next(name for name in names if flops[name] >= enough)
    found = [p for trials in everyone for p in trials if p.name == name]
    others = ", ".join(
        f"{other} {rate / 1e9:,.3g}" for other, rate in flops.items() if other != name and other in names
    )
    refused = "".join(f"; not {other}: {why}" for other, why in _refused(shape, everyone).items())
    return named(
        name,
        f"{found[0].why}; {flops[name] / 1e9:,.3g} GFLOP/s a rank{f' ({others})' if others else ''}{note}; "
        f"tested now: within {max(p.worst for p in found):.1e} of the float64 reference{refused}",
    )


def worst_difference(
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
    mask, scale = Mask(window=70, documents=(160,)), head_dim**-0.5
    tensors = random_tensors(device, dtype, (300, 8, head_dim), (300, 2, head_dim), (300, 2, value_head_dim))
    ours = backend.attend(*tensors, q_start=0, k_start=0, mask=mask, scale=scale, softcap=softcap)
    truth = named("reference").attend(
        *(x.double() for x in tensors), q_start=0, k_start=0, mask=mask, scale=scale, softcap=softcap
    )
    assert ours is not None
    assert truth is not None
    # torch's max keeps a NaN, Python's may lose it.
    return float(torch.stack([(x.double() - y).abs().max() for x, y in zip(ours, truth)]).max())


def random_tensors(
    device: torch.device, dtype: torch.dtype, *shapes: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of these shapes, the same every time."""
    generator = torch.Generator().manual_seed(0)
    q_THD, k_SGD, v_SGE = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q_THD, k_SGD, v_SGE
