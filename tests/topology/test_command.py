"""``cpmpi topology``, synthetic machines, the summary and the drawing."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cpmpi.jobs.cli import main
from cpmpi.topology import plot
from cpmpi.topology.derive import rings
from cpmpi.topology.describe import Measurement, Topology
from cpmpi.topology.drawing_layout import arrange
from cpmpi.topology.node import Node, RankPlace
from cpmpi.topology.synthetic import synthetic
from cpmpi.topology.text import folded, lag, rate, summary

from ..conftest import clean_environment, mpirun

MACHINES = sorted((Path(__file__).parent / "machines").glob("*.json"))
MAIN = "from cpmpi.jobs.cli import main; main()"


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: exit status, standard output, standard error."""

    def main_with(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["cpmpi", "topology", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code or 0, *capsys.readouterr()

    return main_with


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One process without a launcher."""
    line = [sys.executable, "-c", MAIN, "topology", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=clean_environment(), timeout=60, check=False)


def test_one_process_without_a_launcher(tmp_path):
    done = alone("--json", str(tmp_path / "t.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("topology: 1 rank, 1 node (discovered)\n")
    assert Topology.load(tmp_path / "t.json").world == 1


def test_under_mpirun_rank_0_speaks_and_a_wrong_description_is_refused(tmp_path):
    done = mpirun(3, "-m", "cpmpi", "topology", "--json", str(tmp_path / "t.json"))
    assert done.returncode == 0
    assert done.stdout.count("topology: 3 ranks, 1 node (discovered)") == 1
    assert len(Topology.load(tmp_path / "t.json").measured) == 3
    done = mpirun(2, "-m", "cpmpi", "topology", "--read", str(tmp_path / "t.json"))
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert lines == ["error: the topology describes 3 ranks, but 2 were launched"]
    assert "Traceback" not in done.stdout
    done = mpirun(2, "-m", "cpmpi", "topology", "--synthetic", "nodes=none")
    assert (done.returncode, done.stdout.count("error: ")) == (1, 1)


def test_nvml_that_is_broken_does_not_end_the_command(tmp_path):
    (tmp_path / "pynvml.py").write_text("def nvmlInit(): raise RuntimeError('driver mismatch')\n")
    line = [sys.executable, "-c", MAIN, "topology"]
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0
    assert "NVML is installed but does not answer (RuntimeError: driver mismatch): GPUs unknown" in done.stdout


def test_planning_needs_neither_mpi_nor_matplotlib():
    code = (
        "import sys; from cpmpi.jobs.cli import cli; cli(['topology', '--synthetic', 'nodes=2'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print([m for m in ('mpi4py', 'matplotlib', 'torch') if m in sys.modules])"],
        capture_output=True, text=True, env=clean_environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "nodes=2,colour=red"], "unknown key 'colour' in 'nodes=2,colour=red'; the keys are machine, "),
        (["--synthetic", "nodes"], "expected nodes=VALUE once in 'nodes'"),
        (["--synthetic", "nodes=2,nodes=3"], "expected nodes=VALUE once"),
        (["--synthetic", "machine=pdp11"], "machine 'pdp11' is unknown; the choices are dgx-h100, a100-pcie-4, "),
        (["--synthetic", "nodes=0"], "nodes (0) must be a whole number of at least 1"),
        (["--synthetic", "gpus=9"], "9 ranks a node, but dgx-h100 has 8 GPUs"),
        (["--synthetic", "gpus=4,ranks=4"], "give gpus (a rank each) or ranks, not both"),
        (["--synthetic", "gpus=4,machine=cpu-2s"], "cpu-2s has no GPUs; give ranks"),
        (["--synthetic", "ranks=999"], "999 ranks a node, but cpu-2s has 128 cores"),
        (["--synthetic", "ranks=1/2,nodes=3"], "nodes (3) differs from the 2 nodes of ranks=1/2"),
        (["--synthetic", "nodes=2,taper=-1"], "taper (-1) must be a positive number"),
        (["--synthetic", "nodes=2,leaf_gb_per_s=fast"], "leaf_gb_per_s (fast) must be a positive number"),
        (["--synthetic", "nodes=2", "--read", "x"], "give --read or --synthetic, not both"),
        (["--read", "/nowhere.json"], "/nowhere.json: [Errno 2] No such file"),
        (["--leaf-file", "/nowhere.conf"], "/nowhere.conf: [Errno 2] No such file"),
        (["--plot", "picture.bmp"], "--plot: picture.bmp: a drawing's name ends in one of .png, .svg, .pdf"),
        (["--synthetic", "nodes=2", "--json", "/nowhere/t.json"], "--json /nowhere/t.json: no folder /nowhere"),
        (["--plot", "/nowhere/t.png"], "--plot /nowhere/t.png: no folder /nowhere"),
        (["--plot", "a.svg", "--json", "a.svg"], "--json a.svg: --plot names the same file"),
    ],
)
def test_bad_input_is_one_clear_line(run, arguments, message):
    status, _, errors = run(*arguments)
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"error: {message}")


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "error: --plot: drawing needs matplotlib: pip install 'cpmpi[plot]'\n"
    assert run("--synthetic", "nodes=2", "--plot", "x.png") == (1, "", message)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_description_read_from_a_file_is_drawn(run, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    read = ("--read", str(MACHINES[0].with_name("uneven.json")), "--quiet")
    assert run(*read, "--plot", str(tmp_path / f"t.{suffix}")) == (0, "", "")
    data = (tmp_path / f"t.{suffix}").read_bytes()
    assert len(data) > 20_000
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_a_bound_is_said_and_drawn_as_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    nodes = tuple(Node(name=f"n{i}", ranks=(RankPlace(rank=i),)) for i in range(3))
    measured = (
        Measurement(a=0, b=1, gb_per_s=0.1, latency_us=10.0),
        Measurement(a=0, b=2, gb_per_s=0.025, latency_us=20.0, at_most=True),
    )
    topology = Topology(nodes=nodes, measured=measured)
    assert "between nodes: 62.5 MB/s, 15 us (median of 2 measured pairs, 1 of them at most)" in summary(topology)
    only = replace(topology, measured=measured[1:])
    assert "between nodes: 25 MB/s, 20 us (median of 1 measured pair, at most)" in summary(only)
    said, dashed = [], []
    written, drawn = plot._Pen.text, plot._Pen._path

    def text(pen, x, y, words, *more, **style):
        said.append(words)
        written(pen, x, y, words, *more, **style)

    def path(pen, points, codes, colour, weight, zorder, arrow, dash):
        dashed.append(dash)
        drawn(pen, points, codes, colour, weight, zorder, arrow, dash)

    monkeypatch.setattr(plot._Pen, "text", text)
    monkeypatch.setattr(plot._Pen, "_path", path)
    plot.draw_machine(topology, tmp_path / "t.svg")
    assert {"100 MB/s", "≤ 25 MB/s"} <= set(said)
    assert any("2 links measured, of 1 only what they had at most (dashed)" in words for words in said)
    assert dashed.count(True) == 1


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_nothing_on_the_drawing_overlaps(path):
    topology = Topology.load(path)
    drawing = arrange(topology)
    boxes = [(box, panel) for panel in drawing.panels for box in panel.boxes]
    assert sorted(box.node for box, _ in boxes) == list(range(len(topology.nodes)))
    width, height = drawing.box
    for i, (box, panel) in enumerate(boxes):
        assert panel.x < box.x
        assert box.x + width < panel.x + panel.width
        assert panel.y < box.y
        assert box.y + height < panel.y + panel.height
        assert tuple(sorted(box.discs)) == tuple(sorted(rings(topology)[box.node]))
        centres = list(box.discs.values())
        for k, (x, y) in enumerate(centres):
            assert box.x + drawing.radius < x < box.x + width - drawing.radius
            assert box.y + drawing.radius < y < box.y + height - drawing.radius
            for u, v in centres[:k]:
                assert (x - u) ** 2 + (y - v) ** 2 > (2 * drawing.radius) ** 2
        for other, _ in boxes[:i]:
            assert abs(box.x - other.x) > width or abs(box.y - other.y) > height


def test_synthetic_machines_take_other_figures():
    topology = synthetic("nodes=4,gpus=8,leaf=2,taper=2,leaf_latency_us=3,fabric_gb_per_s=7")
    assert topology.world == 32
    assert [node.leaf for node in topology.nodes] == ["leaf1", "leaf1", "leaf2", "leaf2"]
    assert topology.link(0, 31).gb_per_s == 25
    assert (topology.link(0, 8).gb_per_s, topology.link(0, 8).latency_us) == (50, 3)
    assert topology.figures["fabric"].gb_per_s == 7
    assert "DGX H100" in (topology.origin or "")
    assert synthetic("").world == 8


def test_the_summary_is_short_however_many_nodes():
    text = summary(synthetic("nodes=1024,gpus=8,leaf=32,machine=dgx-h100"))
    assert len(text.splitlines()) < 18
    assert "n[0001-1024]: 8 ranks, 8 GPUs NVIDIA H100 80GB HBM3" in text
    assert "... and 24 more leaves" in text
    assert "tree: root n0001, 10 rounds" in text
    uneven = summary(Topology.load(MACHINES[0].with_name("uneven.json")))
    assert "leaf1: n[1-3]" in uneven
    assert "across leaves: 25 GB/s, 1.6 us (given)" in uneven


def test_names_and_rates_in_print():
    assert folded(["n1", "n2", "n3", "x", "n7"]) == "n[1-3], x, n7"
    assert folded(["n09", "n10", "n11"]) == "n[09-11]"
    assert folded(["n9", "n10", "n011"]) == "n[9-10], n011"
    assert (rate(None), rate(0.0243), rate(1.0), rate(450.0)) == ("? GB/s", "24.3 MB/s", "1 GB/s", "450 GB/s")
    assert (lag(None), lag(3.52), lag(4000, "µs")) == ("? us", "3.52 us", "4 ms")
