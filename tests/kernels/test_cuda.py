"""The CUDA backends: on a device where there is one, and around operators emulated from their documented form.

The emulations follow torch's own description of the results (``torch/_meta_registrations.py``): cuDNN's lse is
(B, H, T, 1), FlashAttention's (B, H, T), the memory-efficient one is padded to a multiple of 32; the last has no GQA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpmpi.kernels import cudnn, efficient, flash, fused, select
from cpmpi.kernels.mask import Mask

MASKS = [Mask(), Mask(window=1), Mask(window=40), Mask(window=40, documents=(64, 170))]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "blocked"])
def test_on_a_device(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Tolerances are select.TOLERANCE: half-precision kernels round weights and results to the dtype."""
    half_only = name in ("cudnn", "flash")
    if (half_only and dtype == torch.float32) or (name == "cudnn" and head_dim > 128):
        pytest.skip("not offered by select")
    worst = select.worst_difference(select.named(name), torch.device("cuda"), dtype, head_dim, head_dim)
    print(f"{name} {dtype} D = {head_dim}: {worst:.1e}")
    assert worst <= select.TOLERANCE[dtype]


def emulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[Any, Any]:
    """Out (n, H, T, E) in the dtype of q and the float32 lse (n, H, T)."""
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert not causal or q.shape[2] == k.shape[2]
    scores = scale * (q.float() @ k.float().mT)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def repeated(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def cudnn_operator(q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
    assert (bias, with_lse, dropout, debug) == (None, True, 0.0, False)
    assert q.shape[2] > 1
    out, lse = emulated(q, repeated(q, k), repeated(q, v), causal, scale)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None


def flash_operator(q, k, v, dropout, causal, debug, *, scale):
    assert (dropout, debug) == (0.0, False)
    assert q.shape[3] == v.shape[3]
    assert q.shape[3] % 8 == 0
    out, lse = emulated(q, repeated(q, k), repeated(q, v), causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], None, None, None


def efficient_operator(q, k, v, bias, with_lse, dropout, causal, *, scale):
    assert (bias, with_lse, dropout) == (None, True, 0.0)
    assert q.shape[3] % 8 == 0
    out, lse = emulated(q, k, v, causal, scale)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf")), None, None


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    aten = torch.ops.aten
    monkeypatch.setattr(aten, "_scaled_dot_product_cudnn_attention", cudnn_operator)
    monkeypatch.setattr(aten, "_scaled_dot_product_flash_attention", flash_operator)
    monkeypatch.setattr(aten, "_scaled_dot_product_efficient_attention", efficient_operator)
    monkeypatch.setattr(flash, "TILE", fused.Tile(90, 70))


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dims", [(16, 16), (12, 20)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cudnn", torch.bfloat16), ("flash", torch.bfloat16), ("efficient", torch.bfloat16), ("efficient", torch.float32)],
    ids=str,
)
def test_around_emulated_operators(name: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Everything but the operator: blocks, padding, GQA, the form of lse. Tolerance as on a device."""
    worst = 0.0
    for mask in MASKS:
        for q, k in ((range(200), range(200)), (range(120, 200), range(100)), (range(199, 200), range(100, 200))):
            torch.manual_seed(0)
            q_THD, k_SGD = torch.randn(len(q), 4, dims[0]).to(dtype), torch.randn(len(k), 2, dims[0]).to(dtype)
            v_SGE = torch.randn(len(k), 2, dims[1]).to(dtype)
            options: dict[str, Any] = {"q_start": q.start, "k_start": k.start, "mask": mask, "scale": 0.25}
            truth = select.named("reference").attend(q_THD.double(), k_SGD.double(), v_SGE.double(), **options)
            ours = select.named(name).attend(q_THD, k_SGD, v_SGE, **options)
            assert (ours is None) == (truth is None)
            if ours is not None and truth is not None:
                assert torch.equal(ours[1].isneginf(), truth[1].isneginf())
                lse = [x[1].double().nan_to_num(neginf=0.0) for x in (ours, truth)]
                differences = (ours[0].double() - truth[0]), lse[0] - lse[1]
                worst = max(worst, *(float(x.abs().max()) for x in differences))
    print(f"{name} {dtype} {dims}: {worst:.1e}")
    assert worst <= select.TOLERANCE[dtype]


@pytest.mark.parametrize("module", [cudnn, flash, efficient], ids=lambda module: module.__name__)
def test_what_a_kernel_lacks_is_refused(module: Any) -> None:
    x = torch.zeros(2, 1, 8)
    options: dict[str, Any] = {"q_start": 0, "k_start": 0, "mask": Mask(), "scale": 1.0}
    with pytest.raises(ValueError, match=r"softcap \(30.0\)"):
        module.contributions(x.half(), x.half(), x.half(), softcap=30.0, **options)
    with pytest.raises(ValueError, match=r"torch.float64"):
        module.contributions(x.double(), x.double(), x.double(), softcap=None, **options)


def test_signatures_of_the_operators() -> None:
    """The arguments are passed by position; a torch that reorders them must fail here and not on a cluster."""
    expected = {
        "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal "
        "return_debug_mask scale",
        "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
        "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal "
        "scale",
        "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale",
    }
    for name, arguments in expected.items():
        schema = getattr(torch.ops.aten, name).default._schema
        assert [argument.name for argument in schema.arguments] == arguments.split()
