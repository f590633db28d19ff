"""Merging partials: exact for any partition and order, clean for rows without keys, lean in memory."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpmpi.kernels.mask import Mask
from cpmpi.kernels.partial import Partial, Rows, merge_
from cpmpi.kernels.select import named

from .strategies import LAST, masks

REFERENCE = named("reference")


@given(
    mask=masks(),
    cuts=st.lists(st.integers(0, LAST), max_size=6),
    heads=st.sampled_from([(2, 2), (4, 1), (8, 1), (8, 2)]),
    seed=st.integers(0, 1000),
    backend=st.sampled_from(["reference", "blocked", "cpu"]),
)
@settings(max_examples=120, deadline=None)
def test_any_partition_in_any_order_is_the_whole(
    mask: Mask, cuts: list[int], heads: tuple[int, int], seed: int, backend: str
) -> None:
    """float64 throughout, so that 1e-12 leaves room for nothing but rounding, a few units of 2e-16 for each merge."""
    generator = torch.Generator().manual_seed(seed)
    q_THD = torch.randn(LAST, heads[0], 8, generator=generator, dtype=torch.float64)
    k_TGD, v_TGE = (torch.randn(LAST, heads[1], dim, generator=generator, dtype=torch.float64) for dim in (8, 6))
    whole = REFERENCE.attend(q_THD, k_TGD, v_TGE, q_start=0, k_start=0, mask=mask, scale=0.5)
    assert whole is not None

    edges = [0, *sorted(cuts), LAST]
    parts = [(q, k) for q in pairwise(edges) for k in pairwise(edges)]
    partial = Partial(LAST, heads[0], 6, dtype=torch.float64)
    for place in torch.randperm(len(parts), generator=generator).tolist():
        (a, b), (c, d) = parts[place]
        attended = named(backend).attend_into(
            partial, a, q_THD[a:b], k_TGD[c:d], v_TGE[c:d], q_start=a, k_start=c, mask=mask, scale=0.5
        )
        assert attended == (mask.pairs(range(a, b), range(c, d)) > 0)
    out_THE, lse_TH = partial.finish()
    torch.testing.assert_close(out_THE, whole[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(lse_TH, whole[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_merge_is_the_plain_formula(spread: float) -> None:
    """Scores far apart included: a side that weighs nothing must vanish, not overflow."""
    torch.manual_seed(0)
    out_a, out_b = torch.randn(2, 50, 3, 4, dtype=torch.float64)
    lse_a, lse_b = spread * torch.randn(2, 50, 3, dtype=torch.float64)
    weights = torch.softmax(torch.stack([lse_a, lse_b]), 0)[..., None]
    plain = weights[0] * out_a + weights[1] * out_b
    lse = torch.stack([lse_a, lse_b]).logsumexp(0)
    merge_(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out_a, plain, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(lse_a, lse, atol=0, rtol=1e-14)


def test_sides_without_keys() -> None:
    never = float("-inf")
    lse_a = torch.tensor([[never], [never], [1.0]])
    lse_b = torch.tensor([[never], [2.0], [never]])
    out_a = torch.tensor([[[0.0]], [[0.0]], [[5.0]]])
    out_b = torch.tensor([[[0.0]], [[7.0]], [[0.0]]])
    merge_(out_a, lse_a, out_b, lse_b)
    assert out_a.flatten().tolist() == [0.0, 7.0, 5.0]
    assert lse_a.flatten().tolist() == [never, 2.0, 1.0]


def test_first_contribution_is_assigned_and_part_of_the_rows_may_be_new() -> None:
    partial = Partial(4, 1, 2)
    one, zero = torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1)
    partial.add_(Rows(0, 2), one, zero)
    partial.add_(Rows(1, 2), 3 * one, zero)
    out_THE, lse_TH = partial.finish()
    assert out_THE[:, 0, 0].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert lse_TH[3].item() == float("-inf")


def test_a_received_partial_is_kept_by_later_contributions_and_nothing_follows_finish() -> None:
    partial = Partial(3, 1, 2)
    one, zero = torch.ones(2, 1, 2), torch.zeros(2, 1)
    partial.merge_(one, zero, row=1)
    partial.add_(Rows(0, 3), torch.full((1, 3, 1, 2), 5.0), torch.zeros(1, 3, 1))
    assert partial.finish()[0][:, 0, 0].tolist() == [5.0, 3.0, 3.0]
    with pytest.raises(AssertionError):
        partial.merge_(one, zero)
    with pytest.raises(AssertionError):
        partial.finish()


def test_repeated_rows_are_a_view() -> None:
    x = torch.arange(20).view(10, 2)
    rows = Rows(1, 2, repeat=3, step=3)
    assert rows.stop == 9
    view = rows.view(x)
    assert view[:, :, 0].tolist() == [[2, 4], [8, 10], [14, 16]]
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_sinks_join_the_denominator() -> None:
    """Against the softmax over the scores and one more logit, as in transformers' gpt-oss."""
    torch.manual_seed(0)
    scores_HTS, v_HSE = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    sinks_H = torch.tensor([0.3, -40.0])
    logits = torch.cat([scores_HTS, sinks_H.double()[:, None, None].expand(2, 5, 1)], -1)
    plain_HTE = logits.softmax(-1)[..., :-1] @ v_HSE

    partial = Partial(6, 2, 3, dtype=torch.float64)
    out_THE = (scores_HTS.softmax(-1) @ v_HSE).transpose(0, 1)
    partial.add_(Rows(0, 5), out_THE[None], scores_HTS.logsumexp(-1).T[None])
    out_THE, lse_TH = partial.finish(sinks_H)
    torch.testing.assert_close(out_THE[:5], plain_HTE.transpose(0, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(lse_TH[:5], logits.logsumexp(-1).T, atol=1e-12, rtol=0)
    assert out_THE[5].tolist() == [[0.0] * 3] * 2
    torch.testing.assert_close(lse_TH[5], sinks_H.double(), atol=0, rtol=0)


def storages(tree: Any) -> dict[int, int]:
    """Address and size in bytes of the memory under the tensors of a nested structure."""
    memory = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
    return {part.data_ptr(): part.nbytes() for part in memory}


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of new storages that operators return."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(size for at, size in storages(result).items() if at not in before)
        return result


def test_merge_allocates_no_second_result() -> None:
    out_THE, lse_TH = torch.randn(100, 4, 64), torch.randn(100, 4)
    with Allocations() as allocations:  # type: ignore[no-untyped-call]
        merge_(out_THE, lse_TH, out_THE.clone(), lse_TH.clone())
    clones = (out_THE.numel() + lse_TH.numel()) * 4
    print(f"merge allocated {allocations.bytes - clones} bytes for a result of {out_THE.numel() * 4}")
    assert allocations.bytes - clones <= 2 * lse_TH.numel() * 4
