"""Multi-rank tests from a plain ``pytest``: ``@pytest.mark.mpi(n)`` starts the test under ``mpirun -n n``.

The parent process never imports mpi4py; the ranks run ``python -m mpi4py -m pytest`` on the one test, in a session
of their own, with a timeout, without the MPI and Slurm variables of whoever started pytest.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

INNER = "CPMPI_TEST_RANK"
ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPI_", "SLURM_", "HYDRA_", "MPIR_")
sys.path.insert(0, str(ROOT))

if INNER not in os.environ:  # rates that tests measure are kept among themselves, and not for the user
    _cache = tempfile.TemporaryDirectory(prefix="cpmpi-tests-")
    os.environ["XDG_CACHE_HOME"] = _cache.name


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without launcher variables, Open MPI usable as root, CPMPI_TEST_THREADS (1) threads a rank."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    threads = os.environ.get("CPMPI_TEST_THREADS", "1")
    return {**kept, **as_root, "OMP_NUM_THREADS": threads, "PYTHONPATH": path, **more}


def mpirun(
    n: int, *command: str, timeout_s: float = 300, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` on n ranks in a process group that is killed at the timeout."""
    launcher = Path(sys.executable).with_name("mpirun")
    mpirun_path = str(launcher) if launcher.exists() else "mpirun"
    line = [mpirun_path, "--oversubscribe", "--bind-to", "none", "-n", str(n), sys.executable, *command]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=clean_environment(**(environment or {})), start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"{n} ranks still running after {timeout_s} s:\n{out}", pytrace=False)
    return subprocess.CompletedProcess(line, process.returncode, out, "")


def ranks_of(item: pytest.Item) -> int:
    marker = item.get_closest_marker("mpi")
    return marker.args[0] if marker else 0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    n = ranks_of(pyfuncitem)
    if not n or INNER in os.environ:
        return None
    done = mpirun(
        n, "-m", "mpi4py", "-m", "pytest", "-x", "-q", "--color=no", "-p", "no:cacheprovider", "-m", "",
        pyfuncitem.nodeid, environment={INNER: "1"},
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"on {n} ranks:\n{done.stdout}", pytrace=False)
    ends = re.findall(r"\b1 (passed|skipped)\b", done.stdout)
    if len(ends) != n:
        pytest.fail(f"{len(ends)} of {n} ranks say how the test ended:\n{done.stdout}", pytrace=False)
    if "passed" not in ends:
        reason = re.search(r"SKIPPED \[1\] \S+ (.*)", done.stdout)
        pytest.skip(f"on {n} ranks: {reason[1] if reason else 'no reason given'}")
    return True
