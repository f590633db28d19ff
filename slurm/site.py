"""What a site's Slurm has: partitions, accounts, limits, and which launcher suits the MPI library here."""

from __future__ import annotations

import getpass
import re
import subprocess
import sys
from dataclasses import dataclass

from cpmpi.slurm.commands import SlurmError, slurm

MPI_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
# MPI library -> PMI plugins of srun that it understands, the best first
PMI = {"Open MPI": ("pmix",), "MPICH": ("pmi2", "cray_shasta"), "Intel": ("pmi2",), "MVAPICH": ("pmi2",)}


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition: its name, whether it is the default, its longest time limit in Slurm's words, and its nodes."""

    name: str
    default: bool
    time: str
    nodes: int
    cores: int
    memory_mb: int
    gpus: int


def partitions() -> list[Partition]:
    """The site's partitions; where nodes of one differ, the figures of the smallest."""
    found: dict[str, Partition] = {}
    for line in slurm("sinfo", "--noheader", "--format", "%P|%l|%D|%c|%m|%G").splitlines():
        name, time, nodes, cores, memory, gres = line.strip().split("|")
        before = found.get(name.rstrip("*"))
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        found[name.rstrip("*")] = Partition(
            name=name.rstrip("*"), default=name.endswith("*"), time=time,
            nodes=int(nodes) + (before.nodes if before else 0),
            cores=min(_number(cores), before.cores if before else sys.maxsize),
            memory_mb=min(_number(memory), before.memory_mb if before else sys.maxsize),
            gpus=min(gpus, before.gpus if before else sys.maxsize),
        )  # fmt: skip
    return list(found.values())


def _number(text: str) -> int:
    return int(re.match(r"\d*", text)[0] or 0)  # type: ignore[index]


def accounts() -> list[str]:
    """The accounts that this user may charge; none where Slurm keeps no accounts or does not tell."""
    try:
        printed = slurm("sacctmgr", "-nP", "show", "associations", f"user={getpass.getuser()}", "format=account")
    except SlurmError:
        return []
    return sorted({line.strip() for line in printed.splitlines()} - {""})


def settings() -> dict[str, str]:
    """Slurm's configuration, by the names of ``scontrol show config``."""
    pairs = (line.partition("=") for line in slurm("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def largest_index() -> int | None:
    """Indices of array tasks must be below this (``MaxArraySize``); None where Slurm does not tell."""
    size = settings().get("MaxArraySize", "")
    return int(size) if size.isdigit() else None


def mpi_library() -> str | None:
    """The MPI library that mpi4py finds here, in its own words; None where it finds none."""
    done = subprocess.run(
        [sys.executable, "-c", MPI_LIBRARY], capture_output=True, text=True, check=False, timeout=60
    )  # fmt: skip
    return done.stdout.splitlines()[0].split(",")[0].strip("\0 ") if done.returncode == 0 and done.stdout else None


def pmi_plugins() -> list[str]:
    """What ``srun --mpi`` offers."""
    printed = slurm("srun", "--mpi=list")
    return re.findall(r"^\s+(\w+)$", printed, re.M) + re.findall(r"\b(pmix)_v\d", printed)


def launcher_for(library: str | None, plugins: list[str]) -> str:
    """What starts ranks here: srun with a PMI that the MPI library understands, or that library's own mpirun."""
    known = next((names for key, names in PMI.items() if key in (library or "")), ())
    match = next((name for name in known if name in plugins), None)
    return f"srun --mpi={match} -K1" if match else "mpirun"


def write_profile() -> str:
    """A commented profile for this site, from what its commands say."""
    found, config, library, plugins = partitions(), settings(), mpi_library(), pmi_plugins()
    first = next((p for p in found if p.default), found[0] if found else None)
    lines = [
        "# Defaults of `cpmpi submit` on this site; options of the command come before them.",
        f"# Slurm {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}.",
        "#",
        "# partition, longest time, nodes, and cores, memory and GPUs of each:",
    ]
    lines += [f"#   {p.name}{' (default)' * p.default}: {p.time}, {p.nodes} nodes, {_node(p)}" for p in found]
    lines += [f"partition = {_toml(first.name)}" if first else '# partition = "..."']
    charged = accounts()
    lines += [f"# accounts: {', '.join(charged) or 'Slurm tells of none'}"]
    lines += [f"account = {_toml(charged[0])}" if len(charged) == 1 else '# account = "..."']
    if first and first.gpus:
        lines += ["# a rank for each GPU", f"gpus_per_node = {first.gpus}", f"tasks_per_node = {first.gpus}"]
        lines += [f"cpus_per_task = {max(1, first.cores // first.gpus)}"]
    elif first:
        lines += ["# a rank for each 8 cores or so", f"tasks_per_node = {max(1, first.cores // 8)}"]
        lines += [f"cpus_per_task = {min(8, max(1, first.cores))}"]
    lines += [
        f"# MPI library here: {library or 'none found'}; srun offers: {', '.join(dict.fromkeys(plugins)) or 'none'}",
        f"launcher = {_toml(launcher_for(library, plugins))}",
        "# preemption: " + config.get("PreemptMode", "?") + "; jobs are requeued: " + config.get("JobRequeue", "?"),
        "requeue = true",
        "# seconds before the end at which a job is told to save its state",
        "signal_s = 120",
        '# setup = ["module load openmpi", "source ~/venv/bin/activate"]',
        '# container = "apptainer exec cpmpi.sif"',
        '# sbatch = ["--exclusive"]',
    ]
    return "\n".join(lines) + "\n"


def _node(partition: Partition) -> str:
    gpus = f", {partition.gpus} GPUs" if partition.gpus else ""
    return f"{partition.cores} cores, {partition.memory_mb} MB{gpus}"


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
