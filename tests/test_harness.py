"""The multi-rank test harness itself."""

import pytest

from .conftest import mpirun


@pytest.mark.mpi(3)
def test_an_mpi_test_runs_on_its_ranks():
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size == 3
    assert MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank) == 3


def test_a_failing_rank_ends_all_ranks():
    code = "from mpi4py import MPI; c = MPI.COMM_WORLD; assert c.rank; c.recv()"
    done = mpirun(2, "-m", "mpi4py", "-c", code, timeout_s=60)
    assert done.returncode != 0
