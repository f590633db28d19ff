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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cpmpi.comm.ranks import OPEN_MPI

from ..conftest import clean_environment, mpirun_path

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "cluster"
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
    """The running cluster; made by :func:`running`.

    Attributes:
        folder: its files, removed with it: Slurm's configuration, logs and spool.
        leaf_file: which node is under which leaf, in the format of Slurm's ``topology.conf``.
    """

    def __init__(self, name: str) -> None:
        self.folder = Path(f"/tmp/{name}-cluster")
        self.leaf_file = self.folder / "topology.conf"
        self._name = {"CLUSTER_PREFIX": name, "CLUSTER_DIR": str(self.folder)}
        self._slurm = False

    def on(self, host: str, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What a command prints on a host (n1 to n4, login).

        Raises:
            RuntimeError: it fails; with what it printed.
        """
        return self.script("on", host, *command, timeout_s=timeout_s, **environment)

    def mpirun(
        self, *command: str, nodes: Sequence[str] = NODES, ranks: int = RANKS_PER_NODE, timeout_s: float = 60,
        **environment: str,
    ) -> str:  # fmt: skip
        """What ``python COMMAND`` prints on nodes of so many ranks, started by Open MPI's mpirun on n1."""
        hosts = ",".join(f"{node}:{ranks}" for node in nodes)
        line = [mpirun_path(), "--bind-to", "none", "--host", hosts]
        line += ["--mca", "plm", "ssh", "--mca", "plm_ssh_agent", f"{SCRIPT} rsh"]
        line += ["-n", str(len(nodes) * ranks), sys.executable, *command]
        return self.on("n1", *line, timeout_s=timeout_s, **self._mpi(environment))

    def srun(self, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What ``python COMMAND`` prints on 4 nodes x 2 ranks, started by Slurm's srun on ``login``."""
        line = ["srun", "-K1", "--mpi=pmix", f"-N{len(NODES)}", f"--ntasks-per-node={RANKS_PER_NODE}"]
        return self.slurm(*line, sys.executable, *command, timeout_s=timeout_s, **self._mpi(environment))

    def slurm(self, *command: str, timeout_s: float = 60, **environment: str) -> str:
        """What a Slurm command prints on ``login``; the first call starts the daemons."""
        if not self._slurm:
            self.script("slurm")
            self._slurm = True
        return self.on(
            "login", *command, timeout_s=timeout_s, SLURM_CONF=str(self.folder / "slurm.conf"), **environment
        )

    def rate_mbit(self, sender: str, receiver: str, megabytes: float = 4) -> float:
        """Payload megabits per second of one TCP connection between two nodes."""
        probe = [sys.executable, str(HERE / "linkrate.py")]
        server = subprocess.Popen(
            [str(SCRIPT), "on", receiver, *probe, "receive"],
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(**self._name),
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
        """What `cpmpi.comm.ranks.start` sets, for commands that start MPI themselves; sockets fit a slow uplink."""
        return {**OPEN_MPI, "OMPI_MCA_btl_tcp_sndbuf": str(256 << 10), **environment}

    def script(self, *arguments: str, timeout_s: float = 60, **environment: str) -> str:
        """What the script ``cluster`` prints.

        Raises:
            RuntimeError: it fails; with what it printed.
        """
        done = run([str(SCRIPT), *arguments], timeout_s, **self._name, **environment)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode} of {' '.join(arguments)}:\n{done.stdout}")
        return done.stdout


@contextmanager
def running(name: str = "cpmpi", wait_s: float = 120) -> Iterator[Cluster]:
    """The cluster, from nothing to nothing, whatever happens between; one of a name at a time on a machine.

    What a killed run has left behind is removed first; its lock went with its process.

    Raises:
        TimeoutError: another test run on this machine kept the cluster for ``wait_s`` seconds.
    """
    cluster, lock_file = Cluster(name), Path(f"/tmp/{name}-cluster.lock")
    with lock_file.open("w") as lock:
        patience = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise TimeoutError(f"another test run has held {lock_file} for {wait_s} s") from None
                time.sleep(0.2)
        try:
            cluster.script("up")
            yield cluster
        finally:
            cluster.script("down")
