"""Probe one machine through Linux' sysfs: processors, NUMA domains, network devices. What is not there is unknown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cpmpi.topology.codec import numbers
from cpmpi.topology.node import NetworkDevice

ETHERNET, INFINIBAND = "1", "32"  # ARPHRD_ETHER and ARPHRD_INFINIBAND of if_arp.h, as in /sys/class/net/*/type


@dataclass(frozen=True, kw_only=True)
class Processors:
    """The logical CPUs of a machine: which NUMA domain, socket and physical core each belongs to.

    Each mapping holds only what sysfs says, and is empty where sysfs is missing.
    """

    numa_of: dict[int, int]
    socket_of: dict[int, int]
    core_of: dict[int, tuple[int, int]]


def processors(root: Path = Path("/sys")) -> Processors:
    """Sockets, cores and NUMA domains of this machine."""
    socket_of: dict[int, int] = {}
    core_of: dict[int, tuple[int, int]] = {}
    for folder in root.glob("devices/system/cpu/cpu[0-9]*/topology"):
        cpu = int(folder.parent.name[3:])
        socket, core = _number(folder / "physical_package_id"), _number(folder / "core_id")
        if socket is not None and socket >= 0:
            socket_of[cpu] = socket
            if core is not None and core >= 0:
                core_of[cpu] = (socket, core)
    numa_of = {}
    for folder in root.glob("devices/system/node/node[0-9]*"):
        for cpu in numbers(_text(folder / "cpulist") or ""):
            numa_of[cpu] = int(folder.name[4:])
    return Processors(numa_of=numa_of, socket_of=socket_of, core_of=core_of)


def allowed_cpus() -> tuple[int, ...] | None:
    """The logical CPUs this process may run on; None on systems that do not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return tuple(sorted(os.sched_getaffinity(0)))


def pci_numa(bus_id: str, root: Path = Path("/sys")) -> int | None:
    """The NUMA domain of a PCI device, given as NVML (``00000000:1B:00.0``) or Linux (``0000:1b:00.0``) writes it."""
    domain, _, rest = bus_id.lower().partition(":")
    return _not_negative(_number(root / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node"))


def networks(root: Path = Path("/sys")) -> tuple[NetworkDevice, ...]:
    """The InfiniBand and RoCE devices that are active and the other network interfaces that are up, by name.

    Loopback and bridges are left out; so are the interfaces that belong to a listed InfiniBand device. A virtual
    interface is listed with an unknown speed, whatever speed its driver makes up.
    """
    found: list[NetworkDevice] = []
    covered: set[str] = set()
    for folder in sorted(root.glob("class/infiniband/*")):
        covered.update(child.name for child in folder.glob("device/net/*"))
        ports = [port for port in folder.glob("ports/*") if "ACTIVE" in (_text(port / "state") or "")]
        if ports:
            rates = [_gigabits(_text(port / "rate")) for port in ports]
            ethernet = _text(ports[0] / "link_layer") == "Ethernet"
            found.append(
                NetworkDevice(
                    name=folder.name,
                    kind="roce" if ethernet else "infiniband",
                    gb_per_s=max((rate for rate in rates if rate), default=None),
                    numa=_not_negative(_number(folder / "device/numa_node")),
                )
            )
    for folder in sorted(root.glob("class/net/*")):
        kind = {ETHERNET: "ethernet", INFINIBAND: "infiniband"}.get(_text(folder / "type") or "")
        up = _text(folder / "operstate") == "up"
        if kind is None or not up or (folder / "bridge").exists() or folder.name in covered:
            continue
        real = (folder / "device").exists()
        speed_mbit = _number(folder / "speed") if real else None
        found.append(
            NetworkDevice(
                name=folder.name,
                kind=kind,
                gb_per_s=speed_mbit / 8000 if speed_mbit and speed_mbit > 0 else None,
                numa=_not_negative(_number(folder / "device/numa_node")),
            )
        )
    return tuple(found)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # not there, not permitted, or EINVAL: how sysfs says "no such fact" (speed of a link that is down)
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _not_negative(value: int | None) -> int | None:
    return value if value is not None and value >= 0 else None


def _gigabits(rate: str | None) -> float | None:
    """GB/s from a rate as InfiniBand ports state it: ``400 Gb/sec (4X NDR)``."""
    found = re.match(r"([\d.]+) Gb/sec", rate or "")
    return float(found[1]) / 8 or None if found else None
