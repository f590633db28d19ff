"""Find out what the machine is: every rank facts itself, one decides, all get the same description."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mpi4py import MPI

from cpmpi.topology import leaves, nvml, sysfs
from cpmpi.topology.decide import NodeFacts, RankFacts, topology_of
from cpmpi.topology.describe import Topology
from cpmpi.topology.measure import measure as measure_links
from cpmpi.topology.node import NetworkDevice
from cpmpi.topology.text import counted

SCONTROL_LIMIT_S = 0.7
T = TypeVar("T")


def discover(comm: MPI.Comm, *, measure: bool = True, leaf_file: str | Path | None = None) -> Topology:
    """The machine under the ranks of ``comm``; collective, and the same on all ranks.

    Takes well under a second, and with ``measure`` two seconds more at the most. Lack of information ends nothing:
    what is unknown is None in the description, and ``notes`` says why where that is worth a line.

    Args:
        comm: the ranks to describe; the description counts them as this communicator does.
        measure: also measure latency and bandwidth of a sample of links (:func:`cpmpi.topology.measure.measure`).
        leaf_file: which nodes are under which switch, in the format of Slurm's ``topology.conf``; read on rank 0.
            Without it, Slurm is asked.

    Raises:
        ValueError: on all ranks, if ``leaf_file`` cannot be read or misses a node.
    """
    facts = comm.gather(_node_facts(comm))
    outcome: Topology | ValueError | None = None
    if facts is not None:
        try:
            outcome = _decide([one for one in facts if one is not None], leaf_file)
        except ValueError as error:
            outcome = error
    outcome = comm.bcast(outcome)
    if isinstance(outcome, ValueError):
        raise outcome
    assert outcome is not None
    return measure_links(comm, outcome) if measure else outcome


def shared_groups(comm: MPI.Comm) -> tuple[tuple[int, ...], ...]:
    """The ranks of ``comm`` by the memory they share: one tuple a node, in the order of their lowest ranks; collective.

    By allgather, never by arithmetic: a launcher may place 4, 1 and 1 ranks on three nodes.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    lowest = node.bcast(comm.rank)
    node.Free()
    groups: dict[int, list[int]] = {}
    for rank, head in enumerate(comm.allgather(lowest)):
        groups.setdefault(head, []).append(rank)
    return tuple(tuple(groups[head]) for head in sorted(groups))


def require_match(comm: MPI.Comm, topology: Topology) -> None:
    """Check that a description, of an earlier run say, is of these ranks on these nodes; collective.

    Raises:
        ValueError: on all ranks, if the number of ranks differs or other ranks share memory.
    """
    topology.require(comm.size)
    described = sorted(tuple(sorted(p.rank for p in node.ranks)) for node in topology.nodes)
    launched = sorted(shared_groups(comm))
    if len(described) != len(launched):
        raise ValueError(
            f"the topology describes {counted(len(described), 'node')}, but ranks were launched on {len(launched)}"
        )
    for want, got in zip(described, launched):
        if want != got:
            name = topology.nodes[topology.node_of(want[0])].name
            raise ValueError(
                f"the topology has ranks {_shown(want)} on node {name}, but ranks {_shown(got)} share memory"
            )


def _node_facts(comm: MPI.Comm) -> NodeFacts | None:
    """What this node's ranks saw, on the lowest of them; None on the others."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    ranks = node.gather(_rank_facts(comm.rank))
    node.Free()
    if ranks is None:
        return None
    notes: list[str] = []
    unknown = sysfs.Processors(numa_of={}, socket_of={}, core_of={})
    processors = _attempt("processors", sysfs.processors, unknown, notes)
    nothing: tuple[NetworkDevice, ...] = ()
    networks = _attempt("network devices", sysfs.networks, nothing, notes)
    pcis = {gpu.pci for rank in ranks for gpu in rank.gpus if gpu.pci is not None}
    return NodeFacts(
        hostname=socket.gethostname(),
        ranks=tuple(ranks),
        processors=processors,
        networks=networks,
        gpu_numa={pci: sysfs.pci_numa(pci) for pci in pcis},
        slurm=leaves.SlurmPlace(
            address=os.environ.get("SLURM_TOPOLOGY_ADDR"), pattern=os.environ.get("SLURM_TOPOLOGY_ADDR_PATTERN")
        ),
        notes=tuple(notes),
    )


def _rank_facts(rank: int) -> RankFacts:
    notes: list[str] = []
    cpus = _attempt("allowed cores", sysfs.allowed_cpus, None, notes)
    gpus = nvml.gpus(notes.append)
    return RankFacts(rank=rank, cpus=cpus, gpus=gpus, visible=nvml.visible(gpus), notes=tuple(notes))


def _attempt(what: str, look: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    """A look at the hardware must never end a job: odd hardware may break any of them."""
    try:
        return look()
    except Exception as error:
        notes.append(f"{what} unknown ({type(error).__name__}: {error})")
        return otherwise


def _decide(facts: list[NodeFacts], leaf_file: str | Path | None) -> Topology:
    hosts = [node.hostname for node in facts]
    if leaf_file is not None:
        try:
            text = Path(leaf_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{leaf_file}: {error}") from None
        return topology_of(facts, leaves.look_up(leaves.parse(text, str(leaf_file)), hosts, str(leaf_file)), ())
    notes: list[str] = []
    switches = None
    if any(node.slurm.switches(node.hostname) is None for node in facts):
        switches = _ask_slurm(hosts, notes)
    return topology_of(facts, switches, notes)


def _ask_slurm(hosts: list[str], notes: list[str]) -> tuple[tuple[str, ...], ...] | None:
    """The switches over each host by ``scontrol show topology``; None without a job, an answer or a tree."""
    if "SLURM_JOB_ID" not in os.environ or shutil.which("scontrol") is None:
        return None
    command = ["scontrol", "show", "topology"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SCONTROL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(f"leaf switches unknown ({' '.join(command)}: {error})")
        return None
    answer = done.stdout.decode(errors="replace")
    if "SwitchName=" not in answer:
        return None
    try:
        return leaves.look_up(leaves.parse(answer, "scontrol show topology"), hosts, "scontrol show topology")
    except ValueError as error:
        notes.append(f"leaf switches unknown ({error})")
        return None


def _shown(ranks: tuple[int, ...]) -> str:
    return " ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
