"""``cpmpi submit`` with Slurm's commands faked: what it hands over, prints, records and refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import cpmpi
from cpmpi.jobs.cli import cli
from cpmpi.slurm.record import JOBS

from ..conftest import ROOT
from .fake import FakeSlurm

DEMO = ROOT / "examples" / "demo" / "checkpoint"
REFUSAL = """\
sbatch: error: invalid partition specified: nowhere
sbatch: error: Batch job submission failed: Invalid partition name specified
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a checkpoint and a document; a Slurm on the PATH."""
    fake = FakeSlurm(tmp_path / "fake")
    fake.prints("sinfo", "batch*|infinite|4|8|64000|(null)\nurgent|infinite|4|8|64000|(null)\n")
    fake.prints("scontrol", "MaxArraySize = 1001\n")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CPMPI_SLURM_PROFILE", raising=False)
    folder = tmp_path / "a'; echo foo"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "book.txt").write_text("def f(x):\n    return x\n" * 20)
    (folder / "model").symlink_to(DEMO)
    return fake


def submit(*arguments: str):
    return CliRunner().invoke(cli, ["submit", *arguments])


SCORE = ["--", "score", "--model", "model", "--input", "book.txt", "--output", "RUN"]


def error(result) -> str:
    assert result.exit_code != 0, result.output
    assert result.exception is not None
    text = str(result.exception)
    assert "\n" not in text
    return text


def test_a_job_goes_to_slurm_with_its_script_and_record(here):
    result = submit("-N", "2", "--time", "1h", "-c", "4", *SCORE)
    assert result.exit_code == 0, result.output
    folder = Path.cwd()
    assert here.calls("sbatch") == [["--parsable", str(folder / "RUN/log/job.sbatch")]]
    script = (folder / "RUN/log/job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --time=1:00:00\n" in script
    (line,) = (folder / "RUN/log" / JOBS).read_text().splitlines()
    assert {"job": "101", "script": "job.sbatch"}.items() <= json.loads(line).items()
    assert re.search(r"^job 101$", result.stdout, re.M)
    assert "log    RUN/log/slurm-101.out" in result.stdout
    assert "cpmpi status RUN --watch" in result.stdout
    assert re.search(r"1 document, \d+ tokens, the longest \d+: about .* on 2 ranks", result.stderr)


def test_a_dry_run_prints_the_script_and_leaves_nothing(here):
    result = submit("--dry-run", *SCORE)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("#!/bin/bash\n")
    assert result.stdout.endswith('exit "$status"\n')
    assert here.calls("sbatch") == []
    assert not Path("RUN").exists()


def test_the_grace_time_is_what_slurms_notice_leaves(here):
    def graces(signal: list[str], *more: str) -> list[str]:
        return re.findall(r"--grace\S* ?\d+", submit("--dry-run", *signal, *SCORE, *more).stdout)

    assert graces(["--signal", "600"]) == ["--grace 580"] * 2  # in the comment, which can be copied, and in the job
    assert graces(["--signal", "5"]) == ["--grace 1"] * 2
    assert graces([]) == graces(["--signal", "0"]) == graces(["--signal", "120"]) == []
    assert graces(["--signal", "600"], "--grace", "7") == ["--grace 7"] * 2
    assert graces(["--signal", "600"], "--grace=7") == ["--grace=7"] * 2
    words = ["--", "generate", "--model", "model", "--run", "RUN", "--prompt", "Why?"]
    assert "--grace" not in submit("--dry-run", "--signal", "600", *words).stdout


def test_from_python(here):
    done = cpmpi.submit(SCORE[1:], nodes="auto", time="auto", cpus_per_task=2)
    assert done.job_ids == ("101",)
    assert done.logs[0].name == "slurm-101.out"
    script = done.scripts[0].read_text()
    assert "--nodes=1\n" in script
    assert "--time=0:10:00\n" in script
    assert any("--time auto: 0:10:00, twice the predicted" in note for note in done.notes)


def test_a_refusal_is_slurms_own_with_the_choices(here):
    here.fails("sbatch", REFUSAL)
    assert error(submit("-p", "nowhere", *SCORE)) == (
        "sbatch: invalid partition specified: nowhere; Batch job submission failed: Invalid partition name specified "
        "(no partition nowhere here; the partitions are batch, urgent)"
    )
    assert not Path("RUN/log", JOBS).exists()


def test_without_slurm(here, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/sbin")
    assert re.match(r"no sbatch on the PATH: .*--dry-run prints", error(submit(*SCORE)))
    assert submit("--dry-run", *SCORE).exit_code == 0


def test_a_large_array_is_split_and_said(here):
    for task in (0, 1500):
        shutil.copy("book.txt", f"part-{task}.txt")
    words = ["--", "score", "--model", "model", "--input", "part-%a.txt", "--output", "runs/%a"]
    result = submit("--array", "0-1500%4", *words)
    assert result.exit_code == 0, result.output
    assert "it is submitted as 2 arrays" in result.stderr
    scripts = [Path(call[1]) for call in here.calls("sbatch")]
    assert [path.name for path in scripts] == ["job-0.sbatch", "job-1001.sbatch"]
    assert [re.findall(r"array=(.*)", path.read_text()) for path in scripts] == [["0-1000%4"], ["0-499%4"]]
    assert "task=$((SLURM_ARRAY_TASK_ID + 1001))" in scripts[1].read_text()
    assert Path("runs/log", JOBS).exists()


def test_a_profile_comes_before_options(here, tmp_path):
    (tmp_path / "site.toml").write_text('partition = "urgent"\nnodes = 3\n')
    result = submit("--profile", str(tmp_path / "site.toml"), "-N", "2", "--dry-run", *SCORE)
    assert "--partition=urgent\n#SBATCH --nodes=2\n" in result.stdout


def test_a_written_profile_is_used(here, tmp_path):
    path = tmp_path / ".config" / "cpmpi" / "slurm.toml"
    here.prints("srun", "MPI plugin types are...\n\tnone\n")
    result = submit("--write-profile", str(path))
    assert result.exit_code == 0, result.output
    assert "--partition=batch\n" in submit("--dry-run", *SCORE).stdout
    assert "is there already" in error(submit("--write-profile", str(path)))


BAD = [
    (["--time", "soon"], "time limit 'soon': not one"),
    (["-N", "many"], "--nodes many: a number, or auto"),
    (["--array", "3-1"], "array '3-1': 3-1 goes down"),
    (["--array", "0-3"], "--array 0-3: every task writes a run of its own, so --output must have %a"),
    (["--profile", "/nowhere.toml"], "/nowhere.toml: cannot read this profile"),
    (["--hardware", "abacus"], "unknown hardware 'abacus': choose one of h100"),
    (["--mem", "100M"], "memory: a rank needs about .* even with streamed weights, and has 99.6 MB"),
]


@pytest.mark.parametrize(("options", "told"), BAD)
def test_what_is_refused_before_slurm_is_asked(here, options, told, monkeypatch):
    if "--mem" in options:
        Path("book.txt").write_text("def f(x):\n    return x\n" * 40_000)
    assert re.match(told, error(submit(*options, *SCORE)))
    assert here.calls("sbatch") == []
    assert not Path("RUN").exists()


def test_the_commands_own_options_are_checked(here):
    usage = submit("--", "score", "--modell", "x")
    assert usage.exit_code == 2
    assert "No such option" in usage.output
    usage = submit("-N", "2")
    assert usage.exit_code == 2
    assert "give the command to submit after --" in usage.output
    assert "no command that runs as a batch job" in error(submit("--", "inspect", "RUN"))
    words = ["--", "score", "--model", "model", "--input", "book.txt", "--output", "RUN"]
    assert "nowhere" in error(
        submit(*(word.replace("model", "nowhere") if word == "model" else word for word in words))
    )
    assert "gone.txt: no such file" in error(submit(*(word.replace("book", "gone") for word in words)))


def test_more_time_or_nodes_than_asked_for_is_told_with_numbers(here):
    Path("book.txt").write_text("def f(x):\n    return x\n" * 40_000)
    text = error(submit("--time", "150s", *SCORE))
    assert re.match(r"time: the longest document \([\d,]+ tokens\) takes about .*, more than the time limit of", text)
    assert re.search(r"ask for --time \d+:\d\d:00, or more nodes \(--force submits it all the same\)", text)
    forced = submit("--time", "150s", "--force", *SCORE)
    assert forced.exit_code == 0, forced.output
    assert "warning: time: the longest" in forced.stderr


def test_a_folder_that_no_run_can_be_in_is_refused(here):
    """What the job would refuse is refused before it waits in the queue; --overwrite allows what it deletes."""
    Path("RUN").write_text("years of work")
    assert "RUN: is a file, not a folder" in error(submit(*SCORE))
    Path("RUN").unlink()
    Path("RUN/shards").mkdir(parents=True)
    Path("RUN/shards/rank-00000.h5").touch()
    assert "but no run.h5" in error(submit(*SCORE))
    assert here.calls("sbatch") == []
    assert submit(*SCORE, "--overwrite").exit_code == 0


def test_an_array_that_shares_a_run(here):
    """No %a, one run, a forecast for a task; without --share the refusal says that there is this way."""
    assert "or all tasks share one run and its documents, with --share)" in error(submit("--array", "1-9%4", *SCORE))
    shared = submit("--array", "1-9%4", *SCORE, "--share")
    assert shared.exit_code == 0, shared.output
    assert "4 tasks at a time share the documents: times are those of a task" in shared.stderr
    script = Path("RUN/log/job.sbatch").read_text()
    assert "#SBATCH --array=1-9%4\n" in script
    assert "  --share\n" in script
    assert re.search(r"log    RUN/log/slurm-\d+_%a.out", shared.stdout)
    assert "--most-tokens 2: all documents are longer" in error(submit(*SCORE, "--share", "--most-tokens", "2"))


def test_jobs_that_go_on_from_stored_documents(here):
    """They are not planned, which is said; generate has no folder of its own, and logs into the run."""
    words = ["--", "generate", "--model", "model", "--run", "RUN", "--prompt", "What's next?"]
    made = submit(*words)
    assert made.exit_code == 0, made.output
    assert "no forecast: the planner knows no job that goes on from stored documents" in made.stderr
    assert "What'\"'\"'s next?" in Path("RUN/log/job.sbatch").read_text()
    assert "--time auto: the planner knows no job" in error(submit("--time", "auto", *words))
    extend = ["--", "extend", "--model", "model", "--run", "RUN", "--input", "book.txt", "--output", "SCORES"]
    assert submit(*extend).exit_code == 0
    assert Path("SCORES/log/job.sbatch").exists()
