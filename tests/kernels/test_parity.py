"""Every backend against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("q", "k"), [((0, 200), (0, 200)), ((100, 200), (0, 90)), ((50, 150), (100, 300))], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 1)], ids=str)
def test_cpu(mask: Mask, q: tuple[int, int], k: tuple[int, int], heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q_THD = torch.randn(q[1] - q[0], heads[0], 32)
    k_SGD, v_SGE = torch.randn(2, k[1] - k[0], heads[1], 32)
    options: dict[str, Any] = {"q_start": q[0], "k_start": k[0], "mask": mask, "scale": 0.17}
    truth = named("reference").attend(q_THD.double(), k_SGD.double(), v_SGE.double(), **options)
    ours = named("cpu").attend(q_THD, k_SGD, v_SGE, **options)
    assert (truth is None) == (ours is None)
    if ours and truth:
        assert torch.equal(ours[1].isneginf(), truth[1].isneginf())
        torch.testing.assert_close(ours[0].double(), truth[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(ours[1].double(), truth[1], atol=2e-6, rtol=0)
