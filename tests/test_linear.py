"""Linear layers by oneDNN: the same products, in plain float32 layers alone, and only where every rank gains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpmpi.kernels import products
from cpmpi.model import linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (7,), (1, 300), (2, 3, 5)], ids=str)
def test_products_are_those_of_float64(leading: tuple[int, ...], bias: bool) -> None:
    """Sums of 96 products about 1: at most 96 roundings, of 6e-8 of numbers of at most 40, 2e-4; 1e-5 on average."""
    torch.manual_seed(0)
    x, weight = torch.randn(*leading, 96), torch.randn(40, 96)
    b = torch.randn(40) if bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    for given in (x, strided):
        got = products.onednn_linear(given, weight, b)
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=0)
        assert (got.double() - expected).abs().mean() <= 1e-5


class Other(torch.nn.Linear):
    pass


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"plain": torch.nn.Linear(8, 6), "other": Other(8, 6), "bf16": torch.nn.Linear(8, 6, dtype=torch.bfloat16)}
    )


def ranks(*others: float) -> Any:
    return SimpleNamespace(comm=SimpleNamespace(allgather=lambda mine: [mine, *others]))


def taken(made: Any) -> list[str]:
    return [name for name, module in made.items() if "forward" in module.__dict__]


def test_plain_float32_layers_change_where_every_rank_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_gain", lambda inputs, outputs: 2.0)
    made, x = model(), torch.randn(3, 8)
    before = made["plain"](x)
    assert linear.use_fast_products(made, CPU, ranks(1.1)) == (
        "linear layers: torch's own matrix products (oneDNN's would be 1.10 times as fast)"
    )
    assert taken(made) == []
    said = linear.use_fast_products(made, CPU, ranks(3.0))
    assert said == "linear layers: oneDNN's matrix products, 2.00 times as fast as torch's own"
    assert taken(made) == ["plain"]
    seen: list[Any] = []
    true = products.onednn_linear

    def watched(*tensors: Any) -> torch.Tensor:
        seen.append(tensors)
        return true(*tensors)

    monkeypatch.setattr(linear, "onednn_linear", watched)
    torch.testing.assert_close(made["plain"](x), before, atol=1e-5, rtol=0)
    assert seen
    with torch.no_grad():
        made["plain"].weight = torch.nn.Parameter(torch.zeros(6, 8))  # as streamed weights come and go
        torch.testing.assert_close(made["plain"](x), made["plain"].bias.expand(3, 6))
    assert (
        linear.use_fast_products(model(), torch.device("meta"), ranks()) == "linear layers: torch's own matrix products"
    )


def test_a_wrong_or_missing_library_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.onednn_gain(64, 48) > 0

    def missing(*_: Any) -> torch.Tensor:
        raise NotImplementedError("no such operator")

    true = products.onednn_linear
    for wrong in (missing, lambda x, w: true(x.bfloat16().float(), w), lambda x, w: true(x, w) * float("nan")):
        monkeypatch.setattr(products, "onednn_linear", wrong)
        assert products.onednn_gain(64, 48) == 0.0
