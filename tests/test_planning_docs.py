"""The commands of docs/planning.md run as they stand, and a machine that was measured is remembered."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from click.testing import CliRunner

from cpmpi.cost import here
from cpmpi.cost.here import Work, hardware_here, measure_rank
from cpmpi.errors import UserError
from cpmpi.jobs.plan import command
from cpmpi.topology.synthetic import synthetic

from .conftest import ROOT

TEXT = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
DEMO = ROOT / "examples" / "demo" / "checkpoint"
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
WORK = Work(
    query_heads=4, kv_heads=2, key_dim=32, value_dim=32, block=(64, 64), hidden=16, inner=48, chunk_tokens=8,
    dtype="float32",
)  # fmt: skip
FIGURES = {name: float(i + 1) for i, name in enumerate(here.FIGURES)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the commands name."""
    shutil.copytree(DEMO, tmp_path / "DIR")
    shutil.copy(DEMO / "config.json", tmp_path / "config.json")
    synthetic("nodes=2,ranks=4").save(tmp_path / "topology.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_commands_run(folder):
    assert [line.partition(" --")[0] for line in COMMANDS] == ["cpmpi plan"] * 4
    for line in COMMANDS:
        done = CliRunner().invoke(command, shlex.split(line)[2:])
        assert done.exit_code == 0, f"{line}\n{done.output}{done.exception}"
        assert done.output.endswith("\nfits\n")
        if "--plot" in line:
            assert (folder / "timeline.png").stat().st_size > 10_000
            assert "256 ranks on 32 nodes" in done.output
    assert done.output.startswith("hardware: measured now\n")
    assert re.search(r"^  program +[\d.]+ [MG]B$", done.output, re.M)
    (file,) = (folder / "cache" / "cpmpi").iterdir()
    kept = json.loads(file.read_text())
    assert all(kept[name] > 0 for name in (*here.FIGURES, "disk_gb_per_s"))


def test_what_was_measured_is_remembered_until_something_changes(folder, monkeypatch):
    calls = []

    def measured(work, processes, threads, device):
        calls.append((work, processes, device))
        return FIGURES

    monkeypatch.setattr(here, "_measured", measured)
    monkeypatch.setattr(here, "_disk_gb_per_s", lambda _: 1.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chip, when = hardware_here(WORK, 2, folder)
    assert (chip.attention_flops, chip.matmul_flops, chip.disk_gb_per_s, chip.device) == (1.0, 2.0, 1.5, "cpu")
    assert chip.rates.call_s == FIGURES["call_s"]
    assert chip.rates.merge_gb_per_s == FIGURES["merge_gb_per_s"]
    assert when == "measured now"
    again, when = hardware_here(WORK, 2, folder)
    assert re.match(r"measured 20\d\d-\d\d-\d\d \d\d:\d\d \(/", when)
    assert again.rates == chip.rates
    assert calls == [(WORK, 2, "cpu")]
    hardware_here(WORK, 4, folder)  # other ranks: other rates
    assert len(calls) == 2
    for file in (folder / "cache" / "cpmpi").iterdir():
        file.write_text("{")  # damaged
    assert hardware_here(WORK, 2, folder)[1] == "measured now"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "config.json"))  # no folder
    assert hardware_here(WORK, 2, folder)[1].startswith("measured now, not remembered ([Errno 20]")


def test_the_figures_of_a_rank(monkeypatch):
    monkeypatch.setattr("cpmpi.cost.measure.mean_seconds", lambda *_: 2.0)
    figures = measure_rank(WORK, "cpu")
    assert set(figures) == set(here.FIGURES)
    assert figures["matmul_flops"] == 2 * 8 * 16 * 48 / 2.0
    assert figures["call_s"] == 2.0
    assert figures["program_bytes"] > 1e8


def test_a_process_that_cannot_measure_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"--hardware here: a process that measures this machine failed"):
        here._measured(Work(**{**vars(WORK), "dtype": "int3"}), 1, 1, "cpu")
    with pytest.raises(UserError, match=r"--hardware here: /nowhere cannot be written to, to measure its disk"):
        here._disk_gb_per_s(here.Path("/nowhere"))


@pytest.mark.parametrize(
    ("stored", "chip", "computed"),
    [("float32", "h100", "float32"), ("bfloat16", "h100", "bfloat16"), ("bfloat16", "cpu", "float32")],
)
def test_a_plan_computes_in_the_type_that_a_job_takes(folder, stored, chip, computed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    words = ["--model", "config.json", "--tokens", "60000", "--gpus-per-node", "2", "--hardware", chip]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert f"parameters, {computed}\n" in done.output
    assert ("  program " in done.output) == (chip == "cpu")
    rate = float(re.search(r"([\d.e-]+) TFLOP/s a rank", done.output)[1])  # type: ignore[index]
    assert rate < (53 if computed == "float32" else 790)
