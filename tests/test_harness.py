"""The multi-rank test harness itself."""

import os
import subprocess
import sys

import pytest

from .conftest import INNER, ROOT, mpirun


@pytest.mark.mpi(3)
def test_an_mpi_test_runs_on_its_ranks():
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size == 3
    assert MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank) == 3


@pytest.mark.mpi(2)
def test_skipped_on_some_ranks():
    from mpi4py import MPI

    if os.environ.get("CPMPI_SKIP") == "all" or MPI.COMM_WORLD.rank:
        pytest.skip("for a test")


@pytest.mark.parametrize(("which", "outcome"), [("some", "1 passed"), ("all", "1 skipped")])
def test_a_test_that_no_rank_ran_counts_as_skipped(which, outcome):
    outer = {name: value for name, value in os.environ.items() if name != INNER}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_skipped_on_some_ranks"],
        env={**outer, "CPMPI_SKIP": which}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert f" {outcome} in " in done.stdout
    assert ("on 2 ranks: for a test" in done.stdout) == (which == "all")


SOME = """
import pytest
pytestmark = pytest.mark.mpi(2)

def test_before():
    pass

def test_failing():
    from mpi4py import MPI
    assert MPI.COMM_WORLD.rank, "of rank 0"
    MPI.COMM_WORLD.recv()

def test_after():
    from mpi4py import MPI
    assert MPI.COMM_WORLD.size == 2
"""


def test_one_launch_for_many_tests_and_another_after_one_that_fails(request):
    file = ROOT / "tests" / f"of_harness_{os.getpid()}.py"
    request.addfinalizer(file.unlink)
    file.write_text(SOME)
    outer = {name: value for name, value in os.environ.items() if name != INNER}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--color=no", str(file)], env=outer,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 2 passed in " in done.stdout
    assert "PASSED tests/" in done.stdout.split("::test_before")[0].splitlines()[-1]
    assert "of rank 0" in done.stdout
    assert "::test_failing - Failed: on 2 ranks" in done.stdout


def test_a_failing_rank_ends_all_ranks():
    code = "from mpi4py import MPI; c = MPI.COMM_WORLD; assert c.rank; c.recv()"
    done = mpirun(2, "-m", "mpi4py", "-c", code, timeout_s=60)
    assert done.returncode != 0
