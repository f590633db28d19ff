"""The batch script: its text, as recorded, and what it does when bash runs it (Slurm's commands faked).

``CPMPI_RECORD=1 pytest tests/slurm/test_script.py`` records anew; read the difference before you commit it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cpmpi.slurm.request import BatchRequest
from cpmpi.slurm.script import STATE_SAVED, for_sbatch, render

from ..conftest import ROOT
from .fake import FakeSlurm

RECORDED = Path(__file__).parent / "recorded"
ODD = "a'; echo foo"
WORDS = ["prefill", "--model", "/models/llama", "--input", "book.txt", "more files/", "--output", "RUN", "--quiet"]
CASES: dict[str, Any] = {
    "plain": (BatchRequest(), WORDS, {}),
    "gpus": (
        BatchRequest(
            account="physics", partition="gpu,gpu-long", qos="high", constraint="a100&ib", reservation="class",
            nodes=4, tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, memory="0", time="2d", signal_s=300,
            dependency="afterok:17:18", job_name="long book", sbatch=("--exclusive", "--mail-user=me@here"),
            setup=("module load cuda openmpi", ". ~/venv/bin/activate"),
        ),
        WORDS,
        {"head": ["cpmpi 0.1.0", "by hand: sbatch FILE"]},
    ),
    "array": (
        BatchRequest(array="0-99%8", launcher="mpirun --bind-to none", requeue=False, signal_s=0),
        ["score", "--model", "M", "--input", "part-%a.jsonl", "--output", "runs/%a"],
        {"offset": 1001},
    ),
    "container": (
        BatchRequest(launcher="srun --mpi=pmi2", container="apptainer exec --bind '/my data' cpmpi.sif",
                     command="python -m cpmpi", cpus_per_task=2),
        WORDS,
        {},
    ),
    "odd": (
        BatchRequest(job_name=ODD, account="back\\slash", partition='q"uote', setup=(f"cd {shlex.quote(ODD)}",)),
        ["prefill", "--model", ODD, "--input", "$(touch harm)", "`id`", "tab\there", "--output", "new #1", ""],
        {"folder": f"/work/{ODD}", "log": f"/work/{ODD}/log/slurm-%j.out"},
    ),
}  # fmt: skip


def text_of(case: str) -> str:
    request, words, more = CASES[case]
    places = {"folder": "/home/me", "log": "/home/me/RUN/log/slurm-%j.out"}
    return render(request, words, **{**places, **more})


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_as_recorded(case):
    file = RECORDED / f"{case}.sbatch"
    if os.environ.get("CPMPI_RECORD"):
        file.write_text(text_of(case))
    assert text_of(case) == file.read_text()
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_a_word_of_two_lines_is_refused():
    with pytest.raises(ValueError, match="must be one line"):
        render(BatchRequest(), ["score", "--model", "a\nb"], folder="/", log="/log")


def test_quoting_for_sbatch_keeps_a_backslash():
    """sbatch takes a backslash between single quotes as an escape (seen in tests/cluster); the shell does not."""
    assert for_sbatch("back\\slash") == r"'back\\slash'"
    assert for_sbatch("plain") == "plain"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "fake")
    program = tmp_path / "fake" / "bin" / "cpmpi"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['TOLD'], 'w'))\n"
        "exec(os.environ.get('DO', ''))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    fake.prints("squeue", "RUNNING\n")
    return fake


def run(folder: Path, request: BatchRequest, words=WORDS, **more) -> subprocess.Popen:
    script = folder / "job.sbatch"
    script.write_text(render(request, words, **{"folder": str(folder), "log": str(folder / "log"), **more}))
    return subprocess.Popen(
        ["bash", str(script)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def told(folder: Path) -> tuple[list[str], dict[str, str]]:
    arguments, environment = json.loads((folder / "told").read_text())
    return arguments, environment


def test_every_word_reaches_the_command_as_it_is(slurm, tmp_path):
    request, words, _ = CASES["odd"]
    (tmp_path / ODD).mkdir()
    process = run(tmp_path, request, words)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert told(tmp_path)[0] == words
    assert [p.name for p in tmp_path.rglob("harm")] == []


def test_cores_reach_the_ranks(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "3")
    process = run(tmp_path, BatchRequest(cpus_per_task=6))
    process.communicate(timeout=30)
    assert told(tmp_path)[1]["OMP_NUM_THREADS"] == "6"
    assert "--cpus-per-task=6" in slurm.calls("srun")[0]
    process = run(tmp_path, BatchRequest(launcher="mpirun", cpus_per_task=6))
    process.communicate(timeout=30)
    assert told(tmp_path)[1]["SLURM_MPI_TYPE"] == "none"
    assert slurm.calls("mpirun")[0][:3] == ["-n", "3", "cpmpi"]


def test_an_arrays_task_is_its_index_with_the_offset(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("DO", f"sys.exit({STATE_SAVED})")
    words = ["score", "--input", "it's/part-%a.jsonl", "--output", "%a", "--model", "100%"]
    process = run(tmp_path, BatchRequest(array="0-9"), words, offset=1001)
    wait_for(lambda: slurm.calls("scontrol"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert told(tmp_path)[0] == ["score", "--input", "it's/part-1005.jsonl", "--output", "1005", "--model", "100%"]
    assert slurm.calls("scontrol") == [["requeue", "16_4"]]


# A job that ends with status 75 when it is told to, a moment later; SIGTERM would end it otherwise.
STOPS = (
    "import signal, time\n"
    "told = []\n"
    "signal.signal(signal.SIGUSR1, lambda *_: told.append(1))\n"
    "open(os.environ['TOLD'] + '.ready', 'w').close()\n"
    "while not told: time.sleep(0.01)\n"
    "time.sleep(0.3)\n"
    "sys.exit(75)\n"
)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_goes_to_the_ranks_and_a_saved_state_into_the_queue(slurm, tmp_path, monkeypatch, sent):
    monkeypatch.setenv("DO", STOPS)
    process = run(tmp_path, BatchRequest())
    wait_for((tmp_path / "told.ready").exists)
    process.send_signal(sent)
    wait_for(lambda: slurm.calls("scontrol"))
    os.killpg(process.pid, signal.SIGKILL)  # as Slurm does once the job is in the queue again
    out, _ = process.communicate()
    assert slurm.calls("scontrol") == [["requeue", "17"]]
    assert "stopped with its state saved, after 0 requeues: requeue 17" in out


@pytest.mark.parametrize(
    ("do", "state", "request_", "status"),
    [
        ("sys.exit(75)", "COMPLETING\n", BatchRequest(), 75),
        ("sys.exit(75)", "RUNNING\n", BatchRequest(requeue=False), 75),
        ("sys.exit(1)", "RUNNING\n", BatchRequest(), 1),
        ("", "RUNNING\n", BatchRequest(), 0),
    ],
    ids=["cancelled meanwhile", "not to be requeued", "failed", "finished"],
)
def test_no_requeue(slurm, tmp_path, monkeypatch, do, state, request_, status):
    monkeypatch.setenv("DO", do)
    slurm.prints("squeue", state)
    process = run(tmp_path, request_)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert slurm.calls("scontrol") == []


def test_a_refused_requeue_ends_with_the_jobs_status(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("DO", "sys.exit(75)")
    slurm.fails("scontrol", "slurm_requeue error: Requested operation is presently disabled\n")
    process = run(tmp_path, BatchRequest())
    out, _ = process.communicate(timeout=30)
    assert process.returncode == STATE_SAVED
    assert "presently disabled" in out


def test_the_ready_scripts_are_what_their_recipes_say():
    """jobs/sbatch is written by `make docs`, with the same function; tests/cluster runs each of them."""
    sys.path.insert(0, str(ROOT / "docs"))
    import make_sbatch

    assert {p.stem for p in make_sbatch.FOLDER.iterdir()} == make_sbatch.RECIPES.keys()
    for name in make_sbatch.RECIPES:
        assert (make_sbatch.FOLDER / f"{name}.sbatch").read_text() == make_sbatch.text_of(name), "run `make docs`"
