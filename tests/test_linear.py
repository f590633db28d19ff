"""Linear layers by oneDNN: the same products, in plain float32 layers alone, and only where every rank gains."""

from __future__ import annotations

from pathlib import Path
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


class Two:
    """Two ranks seen from the first; the other has its own answer to what is asked of all."""

    def __init__(self, *others: Any) -> None:
        self.others, self.comm = others, self

    def allgather(self, mine: Any) -> list[Any]:
        return [mine, *self.others]

    def gather(self, mine: Any) -> list[Any]:
        return [mine, *([mine] if isinstance(mine, str) else self.others)]

    def on_root(self, work: Any, *args: Any) -> Any:
        return work(*args)


def taken(made: Any) -> list[str]:
    return [name for name, module in made.items() if "forward" in module.__dict__]


def rates(gain: float) -> dict[str, float]:
    return {"torch": 1e9, "oneDNN": gain * 1e9}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The gains that are measured here, the next one last."""
    gains: list[float] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(linear, "onednn_works", lambda *_: True)
    monkeypatch.setattr(linear, "product_rates", lambda *_: rates(gains.pop()))
    return gains


def test_the_slowest_rank_decides_and_is_remembered(measured: list[float]) -> None:
    measured += [2.0]
    chosen = linear.choose_products(model(), CPU, Two(rates(1.1)))  # type: ignore[arg-type]
    assert str(chosen) == "linear layers: torch's matrix products, oneDNN is 1.10 times as fast"
    again = linear.choose_products(model(), CPU, Two(rates(9.0)))  # type: ignore[arg-type]
    assert (
        str(again) == "linear layers: torch's matrix products, oneDNN is 1.10 times as fast, measured by an earlier job"
    )


def test_a_run_goes_on_as_it_was_begun(measured: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("torch", "oneDNN"):  # nothing is measured
        chosen = linear.choose_products(model(), CPU, Two(True), recorded=library)  # type: ignore[arg-type]
        assert str(chosen) == f"linear layers: {library}'s matrix products, as the run was begun"
    measured += [3.0]
    unknown = linear.choose_products(model(), CPU, Two(rates(3.0)), recorded="another")  # type: ignore[arg-type]
    assert unknown.library == "oneDNN"
    missing = linear.choose_products(model(), CPU, Two(False), recorded="oneDNN")  # type: ignore[arg-type]
    assert missing.library == "torch"
    assert missing.reason == "oneDNN is missing or not exact here; the run was begun with oneDNN"
    other = linear.choose_products(model(), torch.device("meta"), Two())  # type: ignore[arg-type]
    assert other.library == "torch"


def test_plain_float32_layers_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = model(), torch.randn(3, 8)
    before = made["plain"](x)
    linear.use_products(made, linear.Products(library="torch", reason=""))
    assert taken(made) == []
    linear.use_products(made, linear.Products(library="oneDNN", reason=""))
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


def test_a_wrong_or_missing_library_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.onednn_works(64, 48)
    assert all(rate > 0 for rate in products.product_rates(64, 48).values())

    def missing(*_: Any) -> torch.Tensor:
        raise NotImplementedError("no such operator")

    true = products.onednn_linear
    for wrong in (missing, lambda x, w: true(x.bfloat16().float(), w), lambda x, w: true(x, w) * float("nan")):
        monkeypatch.setattr(products, "onednn_linear", wrong)
        assert not products.onednn_works(64, 48)
