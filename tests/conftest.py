"""Multi-rank tests from a plain ``pytest``: ``@pytest.mark.mpi(n)`` runs the test under ``mpirun -n n``.

The parent process never imports mpi4py; the ranks run ``python -m mpi4py -m pytest`` on the tests of their number, in a
session of their own, with a timeout, without the MPI and Slurm variables of whoever started pytest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

INNER = "CPMPI_TEST_RANK"
ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S, LATER_TEST_S = 300.0, 60.0  # of a launch with one test, and more for each further one
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


def mpirun_path() -> str:
    """Open MPI's launcher: that of this Python's environment, which need not be on PATH, or the machine's."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else "mpirun"


def mpirun(
    n: int, *command: str, timeout_s: float = 300, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` on n ranks in a process group that is killed at the timeout."""
    line = [mpirun_path(), "--oversubscribe", "--bind-to", "none", "-n", str(n), sys.executable, *command]
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
    except BaseException:  # whoever interrupts the tests leaves no ranks behind
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(line, process.returncode, out, "")


def ranks_of(item: pytest.Item) -> int:
    marker = item.get_closest_marker("mpi")
    return marker.args[0] if marker else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let pytest-xdist (``-n``) keep together what shares a launch, or the fixtures of a file, the longest first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -ranks_of(item))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(f"{ranks_of(item)} ranks" if ranks_of(item) else item.path.stem))


def name_of(item: pytest.Item) -> str:
    """The test's name as pytest takes it, without the group that pytest-xdist appends."""
    group = item.get_closest_marker("xdist_group")
    return item.nodeid.removesuffix(f"@{group.args[0]}" if group else "")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to go on where pytest-xdist takes no notice of groups: every worker would start all ranks of its own."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and grouped and "@" not in grouped[0].nodeid:
        raise pytest.UsageError("pytest-xdist does not group tests under this pytest: install those of constraints.txt")


class Launches:
    """All tests of a session that want the same number of ranks share a launch: starting the ranks is most of it.

    A rank that fails a test ends the launch, as everywhere; those after it get another one. What each rank says of each
    test lies in a file of its own.
    """

    def __init__(self) -> None:
        self.said: dict[str, list[dict[str, str]]] = {}
        self.printed: dict[str, str] = {}

    def run(self, item: pytest.Item) -> tuple[list[dict[str, str]], str]:
        """What the ranks say of a test, one entry a rank that came to its end, and what the launch printed."""
        n = ranks_of(item)
        name = name_of(item)
        waiting = [name_of(i) for i in item.session.items if ranks_of(i) == n]
        if name not in self.printed:
            self._launch(n, [name, *(i for i in waiting if i != name and i not in self.printed)])
        return self.said.get(name, []), self.printed[name]

    def _launch(self, n: int, tests: list[str]) -> None:
        with tempfile.TemporaryDirectory(prefix="cpmpi-ranks-") as folder:
            done = mpirun(
                n, "-m", "mpi4py", "-m", "pytest", "-x", "-q", "--color=no", "-p", "no:cacheprovider", "-m", "",
                *tests, environment={INNER: folder}, timeout_s=TIMEOUT_S + LATER_TEST_S * (len(tests) - 1),
            )  # fmt: skip
            lines = [line for file in sorted(Path(folder).iterdir()) for line in file.read_text().splitlines()]
        for entry in map(json.loads, lines):
            self.said.setdefault(entry["test"], []).append(entry)
        for test in tests:  # up to the one that did not go well on all ranks
            self.printed[test] = done.stdout
            if len(ended_well(self.said.get(test, []))) < n:
                break


def ended_well(said: list[dict[str, str]]) -> list[dict[str, str]]:
    return [entry for entry in said if entry["outcome"] != "failed"]


LAUNCHES = Launches()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    n = ranks_of(pyfuncitem)
    if not n or INNER in os.environ:
        return None
    said, printed = LAUNCHES.run(pyfuncitem)
    if failed := [entry for entry in said if entry["outcome"] == "failed"]:
        texts = "\n".join(f"{entry['rank']}: {entry['text']}" for entry in failed)
        pytest.fail(f"on {n} ranks:\n{texts}\n{printed}", pytrace=False)
    if len(said) != n:
        pytest.fail(f"{len(said)} of {n} ranks say how the test ended:\n{printed}", pytrace=False)
    if all(entry["outcome"] == "skipped" for entry in said):
        pytest.skip(f"on {n} ranks: {said[0]['text']}")
    return True


if INNER in os.environ:
    _rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or str(os.getpid())
    _ended: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        """On a rank: write down how a test ended, once it is torn down."""
        entry = _ended.setdefault(
            report.nodeid, {"test": report.nodeid, "rank": _rank, "outcome": "passed", "text": ""}
        )
        if report.outcome == "failed" or (report.skipped and entry["outcome"] == "passed"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            entry.update(outcome=report.outcome, text=reason.removeprefix("Skipped: "))
        if report.when == "teardown":
            with open(Path(os.environ[INNER]) / f"rank-{_rank}", "a") as file:
                file.write(json.dumps(entry) + "\n")
