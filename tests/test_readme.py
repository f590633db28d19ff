"""The README's commands and its Python example run as they stand, on inputs of the names they use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, clean_environment
from .slurm.fake import FakeSlurm

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "examples" / "demo" / "checkpoint"


def blocks(language: str = "") -> list[str]:
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if name == language]


def commands(start: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for block in blocks() for line in block.splitlines())
    return [line for line in lines if re.match(rf"{start}\b", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(DEMO, folder / "CHECKPOINT")
    (folder / "book.txt").write_text("def f(x):\n    return x\n" * 40)
    (folder / "papers").mkdir()
    (folder / "papers" / "one.txt").write_text("import sys\n" * 30)
    question = {"document": "book.txt", "id": "q1", "text": " The murderer is", "choices": [" Ann", " Bob"]}
    assert json.dumps(question) in README
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "more.jsonl").write_text(json.dumps({"id": "a", "text": "class A:\n    pass\n"}) + "\n")
    return folder


def run(command: str, folder: Path) -> str:
    """What a command prints, where Slurm's commands are faked: they take a job, and know of none afterwards."""
    slurm = FakeSlurm(folder / "slurm", ("sbatch", "squeue", "sinfo"))
    slurm.prints("sinfo", "batch*|infinite|4|64|256000|(null)\n")
    slurm.prints("squeue", "")
    here = f"{Path(sys.executable).parent}{os.pathsep}{slurm.folder / 'bin'}"
    environment = clean_environment(
        PATH=os.pathsep.join([here, os.environ["PATH"]]),
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
        PRTE_MCA_hwloc_default_binding_policy="none",
    )
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_commands_run_as_they_stand(folder):
    jobs = commands("mpirun") + commands("cpmpi")
    assert len(jobs) >= 9, jobs
    assert {"prefill", "score", "extend", "generate"} <= {word for command in jobs for word in command.split()}
    for command in jobs:
        printed = run(command, folder)
        if "--input book.txt" in command and command.startswith("mpirun"):
            assert "book.txt" in printed
        if " extend " in command:
            assert re.search(r"^q1/[01] .* yes$", printed, re.M), printed
            assert (folder / "SCORES" / "scores.csv").exists()
        if " generate " in command:
            assert len(printed) > 1
    assert "book.txt" in run("cpmpi inspect RUN", folder)
    assert ": ok (3 documents, 4 shards" in run("cpmpi verify RUN", folder)
    (example,) = blocks("python")
    (folder / "example.py").write_text(example)
    assert re.match(r"book\.txt \d+ \d+\.\d+", run(f"{sys.executable} example.py", folder))


def test_make_targets_exist():
    targets = commands("make")
    assert set(targets) >= {"make demo", "make test"}
    for target in targets:
        subprocess.run([*target.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
