"""The job from Python: the same results as the command line, options checked, nothing left behind in the process."""

from __future__ import annotations

import logging
import os
import threading

import numpy as np
import pytest

import cpmpi
from cpmpi.engine.options import JobOptions
from tests.test_exact import save_documents, save_llama

WRONG = {
    "attention": ("star", "auto, ring, tree, hybrid"),
    "dtype": ("fp16", "auto, float32, bfloat16, float16"),
    "kv_dtype": ("int8", "bfloat16, float16, float32"),
    "device": ("gpu", "auto, cpu, cuda"),
    "weights": ("disk", "auto, resident, stream"),
}


@pytest.mark.parametrize(("name", "value", "choices"), [(n, v, c) for n, (v, c) in WRONG.items()])
def test_a_wrong_value_names_the_choices(name, value, choices):
    with pytest.raises(cpmpi.UserError, match=f"--{name.replace('_', '-')} {value}: choose one of {choices}"):
        JobOptions.of(model="m", inputs="d", output="r", **{name: value})


def test_numbers_sizes_and_names_are_checked():
    for name in ("segments", "tp", "chunk_tokens"):
        with pytest.raises(cpmpi.UserError, match="must be at least 1, not 0"):
            JobOptions.of(model="m", inputs="d", output="r", **{name: 0})
    assert JobOptions.of(model="m", inputs="d", output="r", memory_limit="8GB").memory_limit == 8 * 10**9
    with pytest.raises(cpmpi.UserError, match="--memory-limit lots"):
        JobOptions.of(model="m", inputs="d", output="r", memory_limit="lots")
    with pytest.raises(TypeError, match=r"no option atention: the options are .*attention"):
        JobOptions.of(model="m", inputs="d", output="r", atention="ring")
    with pytest.raises(cpmpi.UserError, match="--model is missing"):
        JobOptions(inputs=("d",), output="r")


@pytest.mark.mpi(2)
def test_prefill_and_score_from_python(tmp_path):
    import torch
    from mpi4py import MPI
    from transformers import LlamaForCausalLM  # noqa: F401, importing it sets a variable

    comm = MPI.COMM_WORLD
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        save_documents(folder / "documents", (40,))
    comm.Barrier()
    torch.set_num_threads(2)
    environment = dict(os.environ)
    handlers = list(logging.getLogger("cpmpi").handlers)
    options = {"model": str(folder / "model"), "inputs": folder / "documents"}
    with cpmpi.prefill(**options, output=folder / "kv", kv_dtype="float32", segments=3) as run:
        document = run.documents[0]
        assert document.complete
        assert run.complete
        logprobs = document.logprobs
        assert document.kv(layer=1)[0].shape == (40, 2, 8)
    with cpmpi.score(**options, output=str(folder / "scores"), quiet=False) as run:
        assert run.kv_dtype is None
        assert np.abs(run.documents[0].logprobs - logprobs)[1:].max() <= 1e-4
    assert torch.get_num_threads() == 2
    assert dict(os.environ) == environment
    assert list(logging.getLogger("cpmpi").handlers) == handlers
    assert [t.name for t in threading.enumerate() if t.name.startswith(("cpmpi", "shard"))] == []
    comm.Barrier()
    with pytest.raises(cpmpi.UserError, match="no such checkpoint folder"):
        cpmpi.score(model=folder / "absent", inputs=folder / "documents", output=folder / "none")
