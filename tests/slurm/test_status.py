"""``cpmpi status`` and ``cpmpi cancel``: Slurm's words and the run folder's, Slurm's commands faked."""

import json
import re
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cpmpi.jobs.cli import cli
from cpmpi.jobs.status import job_lines
from cpmpi.run.folder import start_index
from cpmpi.slurm import record
from cpmpi.slurm.queue import ENDED, REASONS, STATES, QueuedJob

from ..runs import make_run
from .fake import FakeSlurm

NOW = int(time.time())  # some minutes before a test runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose job 17 was submitted; a Slurm on the PATH."""
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    folder = tmp_path / "RUN"
    (folder / "log").mkdir(parents=True)
    record.note(folder / "log", job="17", script="job.sbatch", requeue=True, submitted=NOW - 60)
    return folder


def slurm_of(folder) -> FakeSlurm:
    return FakeSlurm(folder.parent / "fake")


def squeue(folder, *lines):
    slurm_of(folder).prints("squeue", "".join(line + "\n" for line in lines))


def line(name="17", state="RUNNING", reason="None", nodes="n[1-2]", start="N/A") -> str:
    return f"{name}|{name.split('_')[0]}|{state}|{reason}|1:30|8:30|2|{nodes}|{start}"


def status(folder, *more: str) -> str:
    result = CliRunner().invoke(cli, ["status", str(folder), *more])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def started(folder, **more):
    record.note(folder / "log", **{"job": "17", "started": NOW - 50, "restarts": 0, "finished": 0, "of": 3, **more})


def ended(folder, how, **more):
    entry = {"job": "17", "ended": NOW - 5, "how": how, "finished": 1, "finished_here": 1, "of": 3}
    record.note(folder / "log", **{**entry, **more})


def test_one_question_a_look_however_many_jobs(run):
    record.note(run / "log", job="18", submitted=NOW)
    squeue(run, line("17"), line("18", "PENDING", "Priority"), line("99"))
    printed = status(run)
    assert [call[:2] for call in slurm_of(run).calls("squeue")] == [["--me", "--noheader"]]
    assert "17: running for 1:30 on n[1-2], 8:30 left" in printed
    assert "18: waiting: others come first" in printed
    assert "99" not in printed
    assert "documents  none yet: the run has not begun" in printed


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("REQUEUED", "17: going back into the queue$"),
        ("PREEMPTED", "17: preempted by a more urgent job; it comes back by itself$"),
        ("COMPLETING", "17: ending: its last processes leave$"),
        ("NODE_FAIL", "17: lost a node; it comes back by itself$"),
        ("OUT_OF_MEMORY", "17: killed for lack of memory: ask for more with --mem"),
        ("TIMEOUT", "17: reached its time limit; submit it again, it goes on$"),
        ("CANCELLED", "17: cancelled$"),
        ("COMPLETED", "17: ended well$"),
        ("PENDING", "17: stopped before, will go on; waiting: until its begin time"),
        ("NEW_IN_2031", "17: new_in_2031$"),
    ],
)
def test_states_are_shown_for_what_they_are(run, state, said):
    started(run)
    squeue(run, line(state=state, reason="BeginTime"))
    printed = status(run)
    assert re.search(said, printed, re.M), printed
    assert "failed" not in printed


def test_a_preempted_job_that_does_not_come_back_says_so(run):
    (run / "log" / record.JOBS).unlink()
    record.note(run / "log", job="17", requeue=False, submitted=NOW)
    squeue(run, line(state="PREEMPTED"))
    assert "preempted by a more urgent job; submit it again, it goes on" in status(run)


def test_a_job_that_saved_its_state_and_does_not_come_back_has_not_failed(run):
    """Slurm calls every exit status but 0 a failure; without anything saved it is one."""
    ended(run, "stopped", saved=True)
    (run / "log" / "slurm-17.out").write_text("error: stopped by SIGUSR1\n")
    squeue(run, line(state="FAILED"))
    printed = status(run)
    assert "17: stopped with its state saved; submit it again, it goes on\n" in printed
    assert "error:" not in printed
    ended(run, "stopped", finished_here=0)
    assert "17: failed" in status(run)


def test_every_state_has_words():
    assert STATES.keys() >= ENDED
    other = {"used": "", "left": "", "nodes": "1", "node_list": "", "start": "N/A"}
    job = QueuedJob(name="1", family="1", state="PENDING", reason="x", **other)
    assert job.words() == "waiting: x"
    assert all(text and "\n" not in text for text in (*STATES.values(), *REASONS.values()))


def test_when_a_waiting_job_will_start(run):
    squeue(run, line(state="PENDING", reason="Resources", start="2026-11-24T15:00:00"))
    assert "17: waiting: until nodes are free; starts by 2026-11-24 15:00:00" in status(run)


def test_documents_and_the_running_one(run):
    make_run(run, stop_after=1)
    started(run)
    (run / "log" / record.STATUS).write_text(json.dumps({
        "job": "17", "document": "d1", "tokens": 66015, "layer": 2, "layers": 3, "part": 0.4, "tokens_per_s": 2638.2,
        "left_s": 15.2, "finished": 1, "of": 3, "at": time.time() - 2,
    }))  # fmt: skip
    squeue(run, line())
    printed = status(run)
    assert "documents  1 of 3 finished, 1 running, 1 waiting\n" in printed
    assert re.search(
        r"d1: layer 2 of 3, 66,015 tokens, 2,638 tokens/s, 15 s left for all \(told [\d.]+ s ago\)", printed
    )


def test_from_the_run_folder_alone(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert re.search(r"17: submitted \d+ min \d\d s ago; no squeue on the PATH", status(run))
    make_run(run, stop_after=1)
    started(run)
    said = r"17: started .* ago, no word of its end: running, or killed; no squeue on the PATH"
    assert re.search(said, status(run))
    ended(run, "stopped", why="stopped by SIGUSR1")
    assert "17: stopped with its state saved; the same command goes on (stopped by SIGUSR1)" in status(run)
    make_run(run)
    ended(run, "complete")
    printed = status(run, "--watch")
    assert "17: ended well\n" in printed
    assert "3 of 3 finished\n" in printed


def test_a_failure_shows_the_rank_that_failed(run):
    spec = make_run(run, stop_after=1)
    start_index(run, spec).mark_failed(1, "layer 2: not finite")
    started(run)
    ended(run, "failed", why="disk on fire")
    log = ["first lines", "error: rank 5/8 on n3: disk on fire", *(f"noise {i}" for i in range(9))]
    (run / "log" / "slurm-17.out").write_text("\n".join(log))
    squeue(run, line(state="FAILED"))
    printed = status(run).splitlines()
    assert "documents  1 of 3 finished, 1 waiting, 1 failed" in printed
    shown = [text.removeprefix("log        ") for text in printed if text.startswith("log")]
    assert shown == [str(run / "log" / "slurm-17.out"), log[1], *log[-4:]]


def test_an_array_is_counted_over_its_runs(run):
    for task in range(2):
        make_run(run / f"part-{task}", stop_after=task + 1)
    squeue(run, *(line(f"17_{i}", "PENDING", "JobArrayTaskLimit") for i in range(10)), line("17_10"))
    printed = status(run)
    assert "jobs       11: 10 pending, 1 running" in printed
    assert "3 of 6 finished in 2 runs" in printed


def test_jobs_that_share_a_run_are_all_at_work(run, monkeypatch):
    """Two tell how far they are; of one that is dead, and of one that waits again, the last word is old."""
    make_run(run, stop_after=1)
    now = time.time()
    for name, at in (("17_1", now), ("17_2", now - 500), ("17_3", now - 500), ("17_4", now)):
        record.StatusFile(run / "log", name).write(
            job=name, document=f"d{name}", tokens=66015, layer=2, layers=3, tokens_per_s=2638.2, left_s=15.2,
            finished=1, of=3,
        )  # fmt: skip
        path = run / "log" / f"status-{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "at": at}))
    squeue(run, line("17_1"), line("17_2"), line("17_4", "PENDING", "BeginTime"))
    printed = status(run)
    assert "documents  1 of 3 finished, 2 running\n" in printed
    assert re.findall(r"^documents  (17_\d): d17_\d: layer 2 of 3, .*15 s left for it", printed, re.M) == [
        "17_1",
        "17_2",
    ]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "documents  1 of 3 finished, 2 running\n" in status(run), "without Slurm those that spoke lately"


def test_watching_ends_with_the_jobs(run, monkeypatch):
    looks = iter([line(), line(state="COMPLETED")])
    clock = SimpleNamespace(time=time.time, sleep=lambda _: squeue(run, next(looks)))
    monkeypatch.setattr("cpmpi.jobs.status.time", clock)
    squeue(run, line(state="PENDING"))
    printed = status(run, "--watch")
    assert re.findall(r"17: (\w+)", printed) == ["waiting", "running", "ended"]


def test_cancel_ends_what_waits_or_runs(run):
    squeue(run, line("17_1"), line("17_2", "PENDING"), line("17_0", "COMPLETED"), line("99"))
    result = CliRunner().invoke(cli, ["cancel", str(run)])
    assert result.output == "cancelled 17_1, 17_2\n"
    assert slurm_of(run).calls("scancel") == [["17_1", "17_2"]]


def test_nothing_to_cancel_or_to_tell(run, tmp_path):
    squeue(run, line(state="COMPLETED"))
    told = {
        ("cancel", str(run)): r"none of its jobs \(17\) waits or runs",
        ("cancel", str(tmp_path)): "no record of a job of Slurm",
        ("status", str(tmp_path / "nowhere")): "nowhere: no run here, and no record of jobs",
    }
    for words, text in told.items():
        result = CliRunner().invoke(cli, list(words))
        assert result.exit_code == 1
        assert re.search(text, str(result.exception))


def test_a_damaged_line_of_the_record_is_no_traceback():
    """A flipped bit in a key leaves valid JSON."""
    entries = [{"jnb": "7", "started": 5}, {"jnb": "7", "ended": 6, "how": "complete"}, {"jnb": "7", "submitted": 1}]
    assert list(job_lines([], entries[:2], None)) == ["on this machine, without Slurm: ended well"]
    other = dict.fromkeys(("used", "left", "nodes", "node_list", "start"), "")
    job = QueuedJob(name="7", family="7", state="RUNNING", reason="", **other)
    assert [line.partition(":")[0] for line in job_lines([job], entries, None)] == ["7"]
