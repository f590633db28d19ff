"""Ranks choose the same attention kernel, one that is right on all of them, and remember how fast each was."""

from __future__ import annotations

import pytest

from .test_exact import shared_folder


@pytest.mark.mpi(2)
def test_ranks_agree_and_remember(tmp_path, monkeypatch):
    import torch
    from mpi4py import MPI

    from cpmpi.attention.execute import Heads, Rule
    from cpmpi.comm.ranks import Ranks
    from cpmpi.errors import UserError
    from cpmpi.kernels import select
    from cpmpi.kernels.mask import Mask
    from cpmpi.model.probe import Layer, backends_of

    comm, device = MPI.COMM_WORLD, torch.device("cpu")
    cache = shared_folder(tmp_path) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    rule = Rule(mask=Mask(), scale=1.0)
    heads = Heads(query_heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=torch.bfloat16)
    wide = Heads(query_heads=4, kv_heads=2, key_dim=32, value_dim=32, dtype=torch.bfloat16)

    def chosen(*layers):
        backends = backends_of([Layer(h, rule, "attention") for h in layers], device, Ranks(comm))
        assert len({tuple((b.name, b.reason) for b in rank) for rank in comm.allgather(backends)}) == 1
        return backends

    first, other, again = chosen(heads, wide, heads)
    assert first is again
    assert first.reason != other.reason
    assert "measured by an earlier job" not in first.reason
    assert len(list((cache / "cpmpi").iterdir())) == 2
    comm.Barrier()
    (kept,) = chosen(heads)
    assert kept.name == first.name
    assert ", measured by an earlier job; tested now: within " in kept.reason

    def wrong(*tensors, **options):
        raise RuntimeError(f"not on rank {comm.rank}")

    if comm.rank == 1:  # what one rank lacks no rank takes, whatever the rates that were kept
        monkeypatch.setitem(select.BACKENDS, first.name, wrong)
    (second,) = chosen(heads)
    assert second.name != first.name
    assert f"; not {first.name}: not on rank 1" in second.reason
    if comm.rank == 1:
        for name in select.BACKENDS:
            if name != "reference":
                monkeypatch.setitem(select.BACKENDS, name, wrong)
    with pytest.raises(UserError, match=r"^no attention backend for torch.bfloat16: .*blocked: not on rank 1"):
        chosen(heads)
