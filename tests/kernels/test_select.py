"""Choosing a backend: by name, by device and dtype, and only if it agrees with the reference."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpmpi.kernels import select
from cpmpi.kernels.backend import Contribution
from cpmpi.kernels.mask import Mask

CPU = torch.device("cpu")


def shape_of(dtype: torch.dtype = torch.float32, dim: int = 64, value_dim: int = 64, **own: Any) -> select.Shape:
    return select.Shape(
        **{"dtype": dtype, "query_heads": 4, "kv_heads": 2, "key_dim": dim, "value_dim": value_dim, **own}
    )


def names(
    device: str, dtype: torch.dtype, head_dim: int = 64, value_dim: int = 64, softcap: float | None = None
) -> str:
    shape = shape_of(dtype, head_dim, value_dim, softcap=softcap)
    return " ".join(name for name, _ in select.candidates(shape, torch.device(device)))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no attention backend 'magic'; choices: cpu, cpu_half, onednn, cudnn, flash"):
        select.named("magic")


def test_dtype_without_attention() -> None:
    with pytest.raises(ValueError, match=r"attention in torch.int8; choices: torch.float64, torch.float32"):
        select.select("cpu", torch.int8, head_dim=64)


@pytest.mark.parametrize("dtype", select.TOLERANCE, ids=str)
def test_chosen_on_a_cpu(dtype: torch.dtype) -> None:
    """Any candidate may be the fastest on this machine; the reason names it, its speed, the others and its error."""
    for softcap in (None, 30.0):
        backend = select.select("cpu", dtype, head_dim=24, value_head_dim=16, softcap=softcap)
        offered = names("cpu", dtype, softcap=softcap).split()
        assert backend.name in offered
        assert re.search(r"; [\d,.]+ GFLOP/s a rank( \(|; )", backend.reason)
        assert all(f"{other} " in backend.reason for other in offered if other != backend.name)
        within = re.search(r"; tested now: within (\S+) of the float64 reference$", backend.reason)
        assert within is not None
        assert 0 < float(within[1]) <= select.TOLERANCE[dtype]


def test_candidates_on_a_cpu() -> None:
    assert names("cpu", torch.float32) == "cpu onednn blocked"
    assert names("cpu", torch.bfloat16) == names("cpu", torch.float16) == "cpu onednn cpu_half blocked"
    assert names("cpu", torch.float64) == "cpu blocked"
    assert names("cpu", torch.bfloat16, softcap=30.0) == "onednn blocked"
    assert names("cpu", torch.float64, softcap=30.0) == "blocked"


def test_ranks_decide_alike() -> None:
    """A candidate has to pass on every rank, its slowest rank counts, and near ties go to the first one."""
    shape = shape_of()

    def decided(*rates: tuple[float, float, float], worst: float = 1e-6) -> str:
        trials = [
            [select.Trial("cpu", "a", 2e-6), select.Trial("onednn", "b", error), select.Trial("blocked", "c", 1e-6)]
            for error in [1e-6] * (len(rates) - 1) + [worst]
        ]
        measured = [dict(zip(("cpu", "onednn", "blocked"), rank, strict=True)) for rank in rates]
        return select.decide(shape, trials, measured, note=", noted").reason

    assert (
        decided((2e9, 3e9, 1e9))
        == "b; 3 GFLOP/s a rank (cpu 2, blocked 1), noted; tested now: within 1.0e-06 of the float64 reference"
    )
    assert decided((2e9, 3e9, 1e9), (2e9, 1.5e9, 1e9)).startswith("a; 2 GFLOP/s a rank (onednn 1.5, blocked 1)")
    assert decided((2e9, 2.05e9, 1e9)).startswith("a; ")
    refused = decided((2e9, 3e9, 1e9), (2e9, 3e9, 1e9), worst=float("nan"))
    assert refused.startswith("a; 2 GFLOP/s a rank (blocked 1)")
    assert refused.endswith(
        "; tested now: within 2.0e-06 of the float64 reference; not onednn: nan from the reference, more than 1e-05"
    )


def test_a_candidate_that_a_rank_does_not_have_is_out() -> None:
    """Ranks may sit on GPUs of several generations."""
    one, two = select.Trial("flash", "f", 1e-3), select.Trial("blocked", "b", 1e-3)
    half = shape_of(torch.bfloat16)
    assert select.passing(half, [[one, two], [two]]) == ("blocked",)
    with pytest.raises(RuntimeError, match="ranks have no candidate in common"):
        select.passing(half, [[one], [two]])


def test_rates_are_those_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two FLOPs for each number of a key and of a value, visible pair and query head; ranks start together, once."""
    seen, waited, clock = [], [], iter(range(1000))
    shape = shape_of(torch.bfloat16, 16, 8, query_heads=32, kv_heads=16, softcap=5.0)

    def kernel(q_THD: Any, k_SGD: Any, v_SGE: Any, *, mask: Mask, softcap: float, **_: Any) -> Iterator[Contribution]:
        seen.append((q_THD.shape, k_SGD.shape, v_SGE.shape, q_THD.dtype, softcap))
        return iter(())

    monkeypatch.setitem(select.BACKENDS, "cpu", kernel)  # type: ignore[arg-type]
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = select.rates(shape, CPU, ["cpu"], lambda: waited.append(len(seen)))
    keys = seen[0][1][0]
    assert waited == [0]
    assert len(seen) == select.TURNS
    assert seen[0] == ((512, 4, 16), (keys, 2, 16), (keys, 2, 8), torch.bfloat16, 5.0)
    assert found == {"cpu": 2 * 4 * (16 + 8) * 512 * keys}


def test_candidates_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert names("cuda", half) == "cudnn flash efficient blocked"
    assert names("cuda", half, head_dim=256, value_dim=256) == "flash efficient blocked"
    assert names("cuda", half, head_dim=192, value_dim=128) == "flash efficient blocked"
    assert names("cuda", single) == "efficient blocked"
    assert names("cuda", double) == "blocked"
    assert names("cuda", half, softcap=50.0) == "blocked"
    capability[:] = [8, 0]
    assert names("cuda", half) == "flash efficient blocked"
    capability[:] = [7, 0]
    assert names("cuda", half) == "blocked"
    assert names("cuda", torch.float16) == "efficient blocked"
    assert names("mps", single) == "blocked"


def test_a_backend_that_fails_or_is_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*tensors: torch.Tensor, **options: Any) -> Iterator[Contribution]:
        raise RuntimeError("no kernel image is available\nmore lines")

    factor = 1.4427  # base 2 for base e

    def wrong(*tensors: torch.Tensor, **options: Any) -> Iterator[Contribution]:
        for rows, out_nTHE, lse_nTH in select.BACKENDS["reference"](*tensors, **options):
            yield Contribution(rows, out_nTHE, lse_nTH * factor)

    monkeypatch.setitem(select.BACKENDS, "cpu", fails)
    monkeypatch.setitem(select.BACKENDS, "onednn", fails)
    backend = select.select("cpu", torch.float32, head_dim=16)
    assert backend.name == "blocked"
    assert backend.reason.endswith("; not cpu: no kernel image is available; not onednn: no kernel image is available")

    monkeypatch.setitem(select.BACKENDS, "blocked", wrong)
    with pytest.raises(
        RuntimeError,
        match=r"no attention backend for torch.float32: cpu: no kernel .*; onednn: no kernel .*; blocked: ",
    ):
        select.select("cpu", torch.float32, head_dim=16)
    factor = float("nan")
    with pytest.raises(RuntimeError, match="blocked: nan from the reference"):
        select.select("cpu", torch.float32, head_dim=16)
