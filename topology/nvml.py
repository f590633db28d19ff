"""Probe the NVIDIA GPUs of one machine through NVML (the optional package ``nvidia-ml-py``, imported as ``pynvml``).

Every question that NVML does not answer leaves its fact unknown; NVML that is missing is silence, NVML that is there
but broken is a note.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# GB/s of one PCIe lane in one direction, by generation: transfers/s times line coding (PCI-SIG base specifications).
PCIE_LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
# nvmlGpuTopologyLevel_t, named as `nvidia-smi topo -m` names the levels
PCIE_PATHS = {0: "pix", 10: "pix", 20: "pxb", 30: "phb", 40: "node", 50: "sys"}
REMOTE_GPU, REMOTE_SWITCH = 0, 2  # nvmlIntNvLinkDeviceType_t
FABRIC_COMPLETED = 3  # NVML_GPU_FABRIC_STATE_COMPLETED


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """One GPU as NVML sees it.

    Attributes:
        nvlinks: active NVLinks by the bus id of the GPU at the other end; ``""`` stands for an NVSwitch.
        nvlink_gb_per_s: of one NVLink, one direction.
        pcie_paths: the PCIe path to other GPUs by their bus id, one of ``PCIE_PATHS``.
        pcie_gb_per_s: of the GPU's own PCIe link, one direction.
        fabric: the NVLink domain that spans nodes, as cluster UUID and clique.
    """

    index: int
    uuid: str | None
    name: str | None
    pci: str | None
    nvlinks: dict[str, int]
    nvlink_gb_per_s: float | None
    pcie_paths: dict[str, str]
    pcie_gb_per_s: float | None
    fabric: str | None


def gpus(note: Callable[[str], None]) -> tuple[GpuFacts, ...]:
    """The GPUs NVML lets this process see; ``note`` is called with one line if NVML is present but broken."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return ()
    try:
        nvml.nvmlInit()
    except Exception as error:
        # No driver library is a machine without NVIDIA GPUs; anything else is worth a line.
        if type(error).__name__ != "NVMLError_LibraryNotFound":
            note(f"NVML is installed but does not answer ({_line(error)}): GPUs unknown")
        return ()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return tuple(_facts(nvml, i, handle, handles) for i, handle in enumerate(handles))
    except Exception as error:
        note(f"NVML stopped answering ({_line(error)}): GPUs unknown")
        return ()
    finally:
        _ask(nvml, "nvmlShutdown")


def visible(facts: tuple[GpuFacts, ...]) -> tuple[GpuFacts, ...] | None:
    """Those of the GPUs seen that ``CUDA_VISIBLE_DEVICES`` leaves to this process, in its order.

    All of them where the variable is unset; None where it names MIG slices, which are parts of a GPU.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return facts
    chosen: list[GpuFacts] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if entry.startswith("MIG-"):
            return None
        matches = [
            p
            for p in facts
            if entry == str(p.index) or (entry.startswith("GPU-") and p.uuid and p.uuid.startswith(entry))
        ]
        if len(matches) != 1:
            break  # as CUDA does: an invalid entry hides itself and all that follow
        chosen += matches
    return tuple(chosen)


def _facts(nvml: Any, index: int, handle: Any, handles: list[Any]) -> GpuFacts:
    links: Counter[str] = Counter()
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        if _ask(nvml, "nvmlDeviceGetNvLinkState", handle, link) != 1:
            continue
        remote = _ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        if remote == REMOTE_SWITCH:
            links[""] += 1
        elif remote == REMOTE_GPU:
            peer = _pci(_ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link))
            if peer:
                links[peer] += 1
    paths = {}
    for j, other in enumerate(handles):
        level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", handle, other) if j != index else None
        peer = _pci(_ask(nvml, "nvmlDeviceGetPciInfo", other))
        if level in PCIE_PATHS and peer:
            paths[peer] = PCIE_PATHS[level]
    generation = _ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle)
    width = _ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle)
    lane = PCIE_LANE_GB_PER_S.get(generation) if generation else None
    return GpuFacts(
        index=index,
        uuid=_str(_ask(nvml, "nvmlDeviceGetUUID", handle)),
        name=_str(_ask(nvml, "nvmlDeviceGetName", handle)),
        pci=_pci(_ask(nvml, "nvmlDeviceGetPciInfo", handle)),
        nvlinks=dict(links),
        nvlink_gb_per_s=_nvlink_speed(nvml, handle) if links else None,
        pcie_paths=paths,
        pcie_gb_per_s=lane * width if lane and width else None,
        fabric=_fabric(nvml, handle),
    )


def _nvlink_speed(nvml: Any, handle: Any) -> float | None:
    """GB/s of one NVLink in one direction: the field counts MB/s, common to all active links."""
    fields = _ask(nvml, "nvmlDeviceGetFieldValues", handle, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    if not fields or fields[0].nvmlReturn != 0 or fields[0].value.uiVal <= 0:
        return None
    return float(fields[0].value.uiVal) / 1000


def _fabric(nvml: Any, handle: Any) -> str | None:
    info = _ask(nvml, "c_nvmlGpuFabricInfo_t")
    if info is None or _ask(nvml, "nvmlDeviceGetGpuFabricInfo", handle, ctypes.byref(info)) != 0:
        return None
    uuid = bytes(info.clusterUuid)
    return f"{uuid.hex()}.{info.cliqueId}" if info.state == FABRIC_COMPLETED and any(uuid) else None


def _ask(nvml: Any, question: str, *arguments: Any) -> Any:
    """NVML's answer, or None: it raises for all that a GPU, a driver, a container or its own age does not support."""
    try:
        return getattr(nvml, question)(*arguments)
    except Exception:
        return None


def _pci(info: Any) -> str | None:
    return (_str(info.busId) or "").upper() or None if info is not None else None


def _str(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
