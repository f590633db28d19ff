"""Measured rates of kernels, kept for the user between jobs: a small JSON file for each machine and shape.

It lies in ``$XDG_CACHE_HOME/cpmpi`` (``~/.cache/cpmpi``), and only saves time: what cannot be read, or is not as
expected, is measured anew, and a folder that cannot be written is none. Delete it freely.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

FORCED = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
"""Variables by which a user takes instructions away from the libraries."""


def machine(device: torch.device) -> str:
    """What a kernel's speed on this rank depends on: processor or GPU, threads, libraries and their switches."""
    libraries = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {libraries}, CUDA {torch.version.cuda}"
    forced = "".join(f", {name}={os.environ[name]}" for name in FORCED if name in os.environ)
    return f"{_processor()}, {torch.get_num_threads()} threads, {libraries}{forced}"


def _processor() -> str:
    """Its name and a digest of its instructions, which a virtual machine's name may not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    fields = [line.partition(":")[::2] for line in lines]
    found = {name.strip(): value.strip() for name, value in reversed(fields)}
    flags = hashlib.sha256(found.get("flags", found.get("Features", "")).encode()).hexdigest()[:12]
    return f"{found.get('model name', platform.machine())} ({flags})"


def file_of(machines: Sequence[str], shape: str) -> Path | None:
    """Where rates on these ranks' machines for a shape are kept; None where there is no home."""
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    key = json.dumps([sorted(machines), shape])
    return home / "cpmpi" / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def load(machines: Sequence[str], shape: str, names: Sequence[str]) -> dict[str, float] | None:
    """The FLOP/s kept for these backends, none missing; None where there are not."""
    file = file_of(machines, shape)
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file else {}
        return {name: _rate(kept["flops"][name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rate(value: object) -> float:
    """A rate as it was read.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no rate")
    return value


def save(machines: Sequence[str], shape: str, flops: Mapping[str, float]) -> None:
    """Keep rates; written beside the file and moved there, so that jobs that start together do no harm."""
    file = file_of(machines, shape)
    if file is None:
        return
    text = json.dumps({"machines": sorted(set(machines)), "shape": shape, "flops": dict(flops)}, indent=1)
    beside = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, file)
    except OSError:
        with suppress(OSError):
            beside.unlink()
