"""Every causal language model of transformers is right or refused; see `tests.sweep`."""

import pytest

from tests.families import DOCS
from tests.sweep import cases, examine, reason, summary, variants


@pytest.mark.slow
@pytest.mark.mpi(2)
def test_every_causal_model_of_transformers_is_right_or_refused(tmp_path):
    import torch
    import transformers
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    shares = comm.allgather([examine(case, tmp_path / "model") for case in list(cases())[comm.rank :: comm.size]])
    by_case = {str(outcome.case): outcome for share in shares for outcome in share}
    outcomes = [by_case[str(case)] for case in cases()]
    assert not problems(outcomes)
    assert sum(o.kind == "runs" for o in outcomes) > 100
    if f"transformers {transformers.__version__}," in DOCS.read_text():
        assert summary(outcomes) in DOCS.read_text(), "regenerate it: python -m tests.sweep"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
@pytest.mark.mpi(2)
def test_turned_switches_are_right_or_refused(part, tmp_path):
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    folder, tried = tmp_path / "model", 0
    for case in list(cases())[2 * part + MPI.COMM_WORLD.rank :: 4]:
        if examine(case, folder).kind == "runs":
            outcomes = [examine(variant, folder) for variant in variants(case)]
            assert not problems(outcomes)
            tried += sum(outcome.kind == "runs" for outcome in outcomes)
    assert tried > 50


def problems(outcomes):
    return [f"{o.case}: {o.kind}, {o.why}" for o in outcomes if o.kind in ("wrong", "crashes")]


def test_reasons_are_said_without_names():
    assert reason("falcon cannot be made with cpmpi's attention (KeyError: 'cpmpi')") == (
        "cannot be made with cpmpi's attention"
    )
    assert reason("bart is an encoder-decoder; cpmpi runs decoder-only models") == "is an encoder-decoder"
    assert reason("the model masks tokens by itself") == "the model masks tokens by itself"
