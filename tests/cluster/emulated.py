"""Four emulated nodes on this machine (see the script ``cluster`` beside this file), for tests of any part.

Nodes n1, n2 hang under leaf1 and n3, n4 under leaf2; node links run at 1 Gbit/s and the uplink between the leaves at
200 Mbit/s. A test takes the fixture ``cluster`` and runs a command on one host, or on 4 nodes x 2 ranks under mpirun
or a real Slurm.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..conftest import clean_environment

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "cluster"
FOLDER = Path("/tmp/cpmpi-cluster")
LOCK = Path("/tmp/cpmpi-cluster.lock")
NODES = ("n1", "n2", "n3", "n4")
RANKS_PER_NODE = 2
NODE_MBIT, UPLINK_MBIT = 1000, 200


def why_not(slurm: bool = False) -> str | None:
    """Why the cluster cannot be started here; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"the emulated cluster needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "the emulated cluster needs root (network namespaces)"
    tools = ["ip", "tc", "nsenter", "unshare", *(["slurmctld", "slurmd", "srun"] if slurm else [])]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        package = (
            "slurmctld slurmd slurm-client slurm-wlm-basic-plugins libpmix-dev" if slurm else "iproute2 util-linux"
        )
        return f"the emulated cluster needs {', '.join(missing)} (Debian: {package})"
    return None


def run(command: list[str], timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own, its two outputs together; killed with its children at the timeout.

    Raises:
        TimeoutError: with what it had printed.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        env=clean_environment(**environment), start_new_session=True, cwd=HERE.parent.parent,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise TimeoutError(f"{' '.join(command)} still ran after {timeout_s} s:\n{out}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, "")


class Cluster:
    """The running cluster; made by :func:`running`."""

    folder = FOLDER
    leaf_file = FOLDER / "topology.conf"

    def __init__(self) -> None:
        self._slurm = False

    def on(self, host: str, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What a command prints on a host (n1 to n4, login).

        Raises:
            RuntimeError: it fails; with what it printed.
        """
        return self._checked([str(SCRIPT), "on", host, *command], timeout_s, environment)

    def mpirun(self, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What ``python -m mpi4py COMMAND`` prints on 4 nodes x 2 ranks, started by Open MPI's mpirun on n1."""
        launcher = Path(sys.executable).with_name("mpirun")
        hosts = ",".join(f"{node}:{RANKS_PER_NODE}" for node in NODES)
        line = [str(launcher) if launcher.exists() else "mpirun", "--bind-to", "none", "--host", hosts]
        line += ["--mca", "plm", "ssh", "--mca", "plm_ssh_agent", f"{SCRIPT} rsh"]
        line += ["-n", str(len(NODES) * RANKS_PER_NODE), sys.executable, "-m", "mpi4py", *command]
        return self.on("n1", *line, timeout_s=timeout_s, **self._mpi(environment))

    def srun(self, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What ``python -m mpi4py COMMAND`` prints on 4 nodes x 2 ranks, started by Slurm's srun on ``login``."""
        line = ["srun", "-K1", "--mpi=pmix", f"-N{len(NODES)}", f"--ntasks-per-node={RANKS_PER_NODE}"]
        return self.slurm(
            *line, sys.executable, "-m", "mpi4py", *command, timeout_s=timeout_s, **self._mpi(environment)
        )

    def slurm(self, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What a Slurm command prints on ``login``; the first call starts the daemons."""
        if not self._slurm:
            self._checked([str(SCRIPT), "slurm"], 60, {})
            self._slurm = True
        return self.on("login", *command, timeout_s=timeout_s, SLURM_CONF=str(FOLDER / "slurm.conf"), **environment)

    def rate_mbit(self, sender: str, receiver: str, megabytes: float = 4) -> float:
        """Payload megabits per second of one TCP connection between two nodes."""
        probe = [sys.executable, str(HERE / "linkrate.py")]
        server = subprocess.Popen(
            [str(SCRIPT), "on", receiver, *probe, "receive"], stdout=subprocess.PIPE, text=True, env=clean_environment()
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            self.on(sender, *probe, "send", receiver, str(megabytes), timeout_s=30)
            out, _ = server.communicate(timeout=30)
        finally:
            server.kill()
        return float(out)

    @staticmethod
    def _mpi(environment: dict[str, str]) -> dict[str, str]:
        """Every node thinks the machine's cores are its own: ranks that wait must not spin."""
        return {"OMPI_MCA_mpi_yield_when_idle": "1", **environment}

    @staticmethod
    def _checked(command: list[str], timeout_s: float, environment: dict[str, str]) -> str:
        done = run(command, timeout_s, **environment)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}:\n{done.stdout}")
        return done.stdout


@contextmanager
def running(wait_s: float = 120) -> Iterator[Cluster]:
    """The cluster, from nothing to nothing, whatever happens between; one at a time on a machine.

    What a killed run has left behind is removed first; its lock went with its process.

    Raises:
        TimeoutError: another test run on this machine kept the cluster for ``wait_s`` seconds.
    """
    with LOCK.open("w") as lock:
        patience = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise TimeoutError(f"another test run has held {LOCK} for {wait_s} s") from None
                time.sleep(0.2)
        try:
            Cluster._checked([str(SCRIPT), "up"], 60, {})
            yield Cluster()
        finally:
            run([str(SCRIPT), "down"])
