"""Which leaf switch each node hangs on: from Slurm's words, or from a file in Slurm's own format.

The format is that of ``topology.conf`` and of ``scontrol show topology``, one switch a line::

    SwitchName=leaf1 Nodes=n[1-16]
    SwitchName=leaf2 Nodes=n[17-32]
    SwitchName=spine Switches=leaf[1-2]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SlurmPlace:
    """What Slurm's variables say about the node of one process; None where they are unset.

    Attributes:
        address: ``SLURM_TOPOLOGY_ADDR``, such as ``spine.leaf1.n1``.
        pattern: ``SLURM_TOPOLOGY_ADDR_PATTERN``, such as ``switch.switch.node``.
    """

    address: str | None = None
    pattern: str | None = None

    def switches(self, hostname: str) -> tuple[str, ...] | None:
        """The switches over the host, top first; None if the variables speak of another host.

        ``mpirun`` may hand the variables of its own node to every process it starts, so an address that does not end
        in the host's name is worthless.
        """
        if self.address is None or self.pattern is None:
            return None
        words, names = self.pattern.split("."), self.address.split(".")
        if len(words) < 2 or words[-1] != "node" or set(words[:-1]) != {"switch"}:
            return None
        switches, node = names[: len(words) - 1], ".".join(names[len(words) - 1 :])
        return tuple(switches) if node in (hostname, short(hostname)) else None


def short(hostname: str) -> str:
    """The host name without its domain."""
    return hostname.partition(".")[0]


def expand(hosts: str) -> list[str]:
    """The names in a Slurm host list: ``n[1-2,07],login`` is n1, n2, n07, login."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", hosts):
        names.extend(_expand_one(item))
    return names


def _expand_one(item: str) -> list[str]:
    found = re.search(r"\[([^\]]*)\]", item)
    if not found:
        return [item]
    names = []
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names.extend(_expand_one(f"{item[: found.start()]}{number:0{len(first)}}{item[found.end() :]}"))
    return names


def parse(text: str, source: str) -> dict[str, tuple[str, ...]]:
    """The switches over each node named in a topology file, top first.

    Where a switch hangs under several others, what is above it counts as unknown.

    Raises:
        ValueError: no switch in the text, a node under two leaves, or a line that is none of the format.
    """
    switches_over: dict[str, tuple[str, ...]] = {}
    parents: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.split("#")[0].strip():
            continue
        words = dict(word.partition("=")[::2] for word in line.split("#")[0].split())
        if "SwitchName" not in words:
            raise ValueError(f"{source}: expected SwitchName=..., found {line.strip()!r}")
        name = words["SwitchName"]
        try:
            below, nodes = expand(words.get("Switches", "")), expand(words.get("Nodes", ""))
        except ValueError:
            raise ValueError(f"{source}: bad host list in {line.strip()!r}") from None
        for switch in below:
            parents.setdefault(switch, []).append(name)
        for node in nodes if not below else []:
            if node in switches_over:
                raise ValueError(f"{source}: node {node} is under two leaves, {switches_over[node][0]} and {name}")
            switches_over[node] = (name,)
    if not switches_over:
        raise ValueError(f"{source}: names no leaf switch (a line such as SwitchName=leaf1 Nodes=n[1-16])")
    return {node: _climb(path, parents) for node, path in switches_over.items()}


def _climb(path: tuple[str, ...], parents: dict[str, list[str]]) -> tuple[str, ...]:
    above = parents.get(path[0], [])
    return _climb((above[0], *path), parents) if len(above) == 1 and above[0] not in path else path


def look_up(
    switches_over: dict[str, tuple[str, ...]], hostnames: Sequence[str], source: str
) -> tuple[tuple[str, ...], ...]:
    """The switches over each host.

    Raises:
        ValueError: a host is not in the file.
    """
    found = [switches_over.get(host, switches_over.get(short(host), ())) for host in hostnames]
    missing = [host for host, path in zip(hostnames, found) if not path]
    if missing:
        known = ", ".join(list(switches_over)[:8]) + (", ..." if len(switches_over) > 8 else "")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source}: no switch for node {missing[0]}{more}; the file names {known}")
    return tuple(found)
