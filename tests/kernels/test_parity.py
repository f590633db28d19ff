"""Every backend that runs on a CPU against the float64 reference; each test prints its worst difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpmpi.kernels import blocked, cpu, onednn
from cpmpi.kernels.fused import Tile
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.select import named

MASKS = [
    Mask(),
    Mask(window=1),
    Mask(window=7),
    Mask(window=64),
    Mask(documents=(10, 64, 65, 170)),
    Mask(window=16, documents=(10, 64, 65, 170)),
]
SPANS = [
    (range(200), range(200)),
    (range(100, 200), range(90)),
    (range(50, 150), range(100, 300)),
    (range(9), range(9)),
]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocked": ("blocked", {}),
    "blocked in small tiles": ("blocked", {"TILE_SCORES": {"cpu": 1 << 12, "cuda": 1 << 12}}),
    "cpu": ("cpu", {}),
    "cpu, fused": ("cpu", {"BLOCKED_BELOW": 0}),
    "cpu, fused, not packed": ("cpu", {"BLOCKED_BELOW": 0, "PACK_BELOW": 0}),
    "cpu, fused, in small tiles": ("cpu", {"BLOCKED_BELOW": 0, "TILE": Tile(64, 48)}),
    "onednn": ("onednn", {}),
    "onednn, not blocked": ("onednn", {"BLOCKED_BELOW": 0}),
    "onednn, in small tiles": ("onednn", {"BLOCKED_BELOW": 0, "TILE": Tile(64, 48), "ROWS": 24, "KEYS": 20}),
}
MODULES = {"blocked": blocked, "cpu": cpu, "onednn": onednn}


def differences(name: str, tensors: list[torch.Tensor], q: range, k: range, **options: Any) -> tuple[float, float]:
    """The largest differences in out and in lse; rows without keys must be exactly 0 and -inf."""
    q_THD, k_SGD, v_SGE = tensors
    options = {"q_start": q.start, "k_start": k.start, "scale": 0.17, **options}
    truth = named("reference").attend(q_THD.double(), k_SGD.double(), v_SGE.double(), **options)
    ours = named(name).attend(q_THD, k_SGD, v_SGE, **options)
    if truth is None:
        assert ours is None
        return 0.0, 0.0
    assert ours is not None
    expected = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    assert ours[0].dtype == ours[1].dtype == expected
    unseen_TH = truth[1].isneginf()
    assert torch.equal(ours[1].isneginf(), unseen_TH)
    assert not ours[0][unseen_TH].any()
    assert ours[0].isfinite().all()
    seen_TH = ~unseen_TH
    out, lse = (float((x[seen_TH].double() - y[seen_TH]).abs().max()) for x, y in zip(ours, truth))
    return out, lse


def worst_difference(name: str, tensors: list[torch.Tensor], q: range, k: range, **options: Any) -> float:
    """The largest difference in out and lse."""
    return max(differences(name, tensors, q, k, **options))


def never_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries do not go to ``blocked``, as they do for speed."""
    for module in (cpu, onednn):
        monkeypatch.setattr(module, "BLOCKED_BELOW", 0)


def draw(q: range, k: range, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (len(q), heads[0], dims[0]), (len(k), heads[1], dims[0]), (len(k), heads[1], dims[1])
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks(variant: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """5e-6: values and scores of a few units, rounded to float32 (6e-8) some ten times."""
    name, settings = VARIANTS[variant]
    for setting, value in settings.items():
        monkeypatch.setattr(MODULES[name], setting, value)
    worst = 0.0
    for q, k in SPANS:
        tensors = draw(q, k, heads, (32, 32), torch.float32)
        for mask in MASKS:
            worst = max(worst, worst_difference(name, tensors, q, k, mask=mask))
    print(f"{variant}, heads {heads}: {worst:.1e}")
    assert worst <= 5e-6


@pytest.mark.parametrize("dims", [(32, 32), (24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["blocked", "cpu", "onednn"])
def test_dtypes_and_head_dims(
    name: str, dtype: torch.dtype, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tolerance for half precision, because inputs are converted exactly and all else is float32."""
    never_blocked(monkeypatch)
    q, k = range(50, 130), range(130)
    if (name, dtype) == ("onednn", torch.float64):
        with pytest.raises(ValueError, match=r"onednn takes no float64"):
            worst_difference(name, draw(q, k, (4, 2), dims, dtype), q, k, mask=Mask())
        return
    tensors = draw(q, k, (4, 2), dims, dtype)
    worst = max(worst_difference(name, tensors, q, k, mask=mask) for mask in MASKS)
    print(f"{name} {dtype} {dims}: {worst:.1e}")
    assert worst <= (1e-13 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_half_precision(dtype: torch.dtype, small_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights p (sum 1) are rounded to the type, by at most u = eps / 2 of each, and so is the result of every block.

    So out = sum p v is off by at most u max|v| for the weights and u max|v| for the results, however many blocks are
    merged, since merging takes means. The operator's exponentials are off by 6e-5 of each here (bound 2e-4), which
    reaches lse once and out twice. And out must be further off than in float32: half-precision products are meant.
    """
    never_blocked(monkeypatch)
    if small_tiles:
        monkeypatch.setattr(cpu, "TILE", Tile(64, 16))
    for dims in ((32, 32), (24, 16)):
        for q, k in SPANS:
            tensors = draw(q, k, (4, 2), dims, dtype)
            bound = (torch.finfo(dtype).eps + 4e-4) * float(tensors[2].abs().max())
            for mask in MASKS:
                out, lse = differences("cpu_half", tensors, q, k, mask=mask)
                assert out <= bound
                assert lse <= 2e-4
            assert len(q) < 10 or differences("cpu_half", tensors, q, k, mask=Mask())[0] > 2e-5


@pytest.mark.parametrize("name", ["blocked", "cpu", "onednn"])
def test_softcap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The softcap bends scores of a few units, so a forgotten or misplaced one shows far above 5e-6."""
    never_blocked(monkeypatch)
    q, k = range(50, 130), range(130)
    tensors = draw(q, k, (4, 2), (32, 32), torch.float32)
    worst = max(worst_difference(name, tensors, q, k, mask=mask, softcap=1.5) for mask in MASKS)
    print(f"{name} with softcap: {worst:.1e}")
    assert worst <= 5e-6


@pytest.mark.parametrize("name", ["blocked", "cpu", "onednn"])
def test_large_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of some thousands overflow exp() unless the largest is taken out.

    1e-2: a score is the sum of 32 products of about 1000, 2e4 in absolute terms, rounded to some 6e-8 of that.
    """
    never_blocked(monkeypatch)
    q = k = range(60)
    tensors = draw(q, k, (4, 2), (32, 32), torch.float32)
    tensors[0] *= 1000
    truth = named("reference").attend(*(x.double() for x in tensors), q_start=0, k_start=0, mask=Mask(), scale=1.0)
    ours = named(name).attend(*tensors, q_start=0, k_start=0, mask=Mask(), scale=1.0)
    assert ours is not None
    assert truth is not None
    assert ours[0].isfinite().all()
    torch.testing.assert_close(ours[1].double(), truth[1], atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", ["reference", "blocked", "cpu", "onednn"])
def test_nan_is_not_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in a key reaches the rows that see it, through merges too, and no others."""
    never_blocked(monkeypatch)
    for module in (cpu, onednn):
        monkeypatch.setattr(module, "TILE", Tile(16, 16))
    q_THD, k_SGD, v_SGE = draw(range(60), range(60), (4, 2), (32, 32), torch.float32)
    k_SGD[30] = float("nan")
    ours = named(name).attend(q_THD, k_SGD, v_SGE, q_start=0, k_start=0, mask=Mask(window=20), scale=0.2)
    assert ours is not None
    hit_T = ours[0].isnan().all(-1).all(-1)
    assert hit_T.nonzero().flatten().tolist() == list(range(30, 50))
    assert ours[0][~hit_T].isfinite().all()


@pytest.mark.parametrize("name", ["blocked", "cpu", "onednn"])
def test_strided_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of (heads, tokens, dim), as attention modules hand over, give what contiguous copies give."""
    never_blocked(monkeypatch)
    torch.manual_seed(0)
    q_HTD, k_GTD, v_GTD = torch.randn(4, 90, 16), torch.randn(2, 90, 16), torch.randn(2, 90, 16)
    views = [x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD)]
    options: dict[str, Any] = {"q_start": 0, "k_start": 0, "mask": Mask(window=40), "scale": 0.2}
    one, two = named(name).attend(*views, **options), named(name).attend(*(x.contiguous() for x in views), **options)
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [((4, 3, 8), (4, 2, 8), (4, 2, 8)), ((4, 2, 8), (4, 2, 6), (4, 2, 8)), ((4, 2, 8), (4, 2, 8), (5, 2, 8))],
)
def test_shapes_that_do_not_fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .T, H, D., .S, G, D., .S, G, E."):
        named("cpu").attend(
            torch.zeros(q), torch.zeros(k), torch.zeros(v), q_start=0, k_start=0, mask=Mask(), scale=1.0
        )


def test_no_keys_or_no_queries() -> None:
    q, none = torch.zeros(3, 2, 4).bfloat16(), torch.zeros(0, 2, 4).bfloat16()
    options: dict[str, Any] = {"q_start": 0, "k_start": 0, "mask": Mask(), "scale": 1.0}
    for name in ("reference", "blocked", "cpu", "cpu_half", "onednn"):
        assert named(name).attend(q, none, none, **options) is None
        assert named(name).attend(none, q, q, **options) is None
