"""Choosing a backend: by name, by device and dtype, and only if it agrees with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpmpi.kernels import select
from cpmpi.kernels.backend import Contribution


def names(
    device: str, dtype: torch.dtype, head_dim: int = 64, value_dim: int = 64, softcap: float | None = None
) -> str:
    chosen = select.candidates(torch.device(device), dtype, head_dim, value_dim, softcap)
    return " ".join(name for name, _ in chosen)


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match="no attention backend 'magic'; choices: cpu, cudnn, flash, efficient, blocked"
    ):
        select.named("magic")


def test_dtype_without_attention() -> None:
    with pytest.raises(ValueError, match=r"attention in torch.int8; choices: torch.float64, torch.float32"):
        select.select("cpu", torch.int8, head_dim=64)


@pytest.mark.parametrize("dtype", select.TOLERANCE, ids=str)
def test_chosen_on_a_cpu(dtype: torch.dtype) -> None:
    backend = select.select("cpu", dtype, head_dim=24, value_head_dim=16)
    assert backend.name == "cpu"
    assert "of the float64 reference" in backend.reason
    assert select.select("cpu", dtype, head_dim=24, softcap=30.0).name == "blocked"


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
    backend = select.select("cpu", torch.float32, head_dim=16)
    assert backend.name == "blocked"
    assert backend.reason.endswith("; not cpu: no kernel image is available")

    monkeypatch.setitem(select.BACKENDS, "blocked", wrong)
    with pytest.raises(
        RuntimeError, match=r"no attention backend for torch.float32 on cpu: cpu: no kernel .*; blocked: "
    ):
        select.select("cpu", torch.float32, head_dim=16)
    factor = float("nan")
    with pytest.raises(RuntimeError, match="blocked: nan from the reference"):
        select.select("cpu", torch.float32, head_dim=16)
