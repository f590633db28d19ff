"""The machine that a run was made on: in words, and as a picture where matplotlib is there to draw it."""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from pathlib import Path

from cpmpi.run.reader import Run
from cpmpi.topology.describe import Topology
from cpmpi.topology.plot import draw_machine
from cpmpi.topology.text import summary

MOST_SVG_BYTES = 1_500_000


def topology_of(run: Run) -> Topology | None:
    """The run's machine; None where its description cannot be read."""
    try:
        return Topology.from_json(str(run.attributes["topology"]))
    except ValueError:
        return None


def machine_facts(topology: Topology | None) -> dict[str, str]:
    """What a page shows of it: ``text``, and ``picture``, an address with all of the picture in it, or empty."""
    if topology is None:
        return {"text": "", "picture": ""}
    return {"text": summary(topology), "picture": _picture(topology)}


def _picture(topology: Topology) -> str:
    """As SVG or, where that has more bytes than a page should, as PNG."""
    if importlib.util.find_spec("matplotlib") is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path, kind = Path(folder) / "machine.svg", "image/svg+xml"
        draw_machine(topology, path)
        if path.stat().st_size > MOST_SVG_BYTES:
            path, kind = path.with_suffix(".png"), "image/png"
            draw_machine(topology, path)
        data = path.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
