"""The same job on a CUDA device: KV and messages go through host memory, the result equals transformers on the CPU.

In float32 (torch keeps TF32 off for matrix products unless asked), so the tolerances are those of ``tolerances.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .test_exact import LENGTHS, compare, save_documents, save_llama, shared_folder, truth

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("weights", ["resident", "stream"])
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 3)])
def test_job_on_cuda_equals_transformers_on_the_cpu(ranks, weights, tmp_path):
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.run import run

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    checkpoint, documents = folder / "model", folder / "documents"
    if comm.rank == 0:
        save_llama(checkpoint, 2)
        save_documents(documents)
    comm.Barrier()
    run(
        JobOptions(
            model=checkpoint, inputs=(str(documents),), output=folder / "run", dtype="float32", device="cuda",
            kv_dtype="float32", chunk_tokens=300, weights=weights, quiet=True,
        )
    )  # fmt: skip
    if comm.rank == 0:
        with cpmpi.open_run(folder / "run") as done:
            for document, n in zip(done.documents, LENGTHS, strict=True):
                compare(document, *truth(checkpoint, np.load(documents / f"{n:05d}.npy")))


@pytest.mark.mpi(2)
def test_bfloat16_stays_near_float32(tmp_path):
    """bf16 has 8 bits of mantissa: log-probabilities of this model stay within 0.2 of float32, 0.02 on average."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.run import run

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        save_documents(folder / "documents", (1000,))
    comm.Barrier()
    for dtype in ("float32", "bfloat16"):
        run(
            JobOptions(
                model=folder / "model", inputs=(str(folder / "documents"),), output=folder / dtype, dtype=dtype,
                device="cuda", quiet=True,
            )
        )  # fmt: skip
    if comm.rank == 0:
        with cpmpi.open_run(folder / "float32") as one, cpmpi.open_run(folder / "bfloat16") as two:
            error = np.abs(one.documents[0].logprobs[1:] - two.documents[0].logprobs[1:])
        assert error.max() < 0.2
        assert error.mean() < 0.02
