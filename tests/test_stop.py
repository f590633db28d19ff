"""A job that is told to stop saves what is done, says so with exit status 75, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cpmpi.comm.stop import Stop
from cpmpi.run.reader import open_run
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record

from .conftest import ROOT, clean_environment
from .test_bad_input import call
from .test_exact import save_llama, shared_folder


def prepare(folder: Path) -> None:
    save_llama(folder / "model", 2)
    with (folder / "documents.jsonl").open("w") as file:
        for i in range(3):
            ids = np.random.default_rng(i).integers(0, 300, 50 + i).tolist()
            file.write(json.dumps({"id": f"d{i}", "token_ids": ids}) + "\n")


def words(folder: Path, run: str) -> list[str]:
    return ["score", "--quiet", "--model", f"{folder}/model", "--input", f"{folder}/documents.jsonl", "--output", run]


@pytest.mark.mpi(2)
def test_a_signal_on_one_rank_stops_all_after_the_document(tmp_path, monkeypatch, capsys):
    from mpi4py import MPI

    from cpmpi.engine.watch import Watch

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        prepare(folder)
    comm.Barrier()
    before = signal.getsignal(signal.SIGTERM)

    def start(name, status):
        found, printed = call(words(folder, f"{folder}/{name}"), capsys)
        signal.signal(signal.SIGTERM, before)
        assert found == (status if comm.rank == 0 else 0)
        assert bool(printed) == (comm.rank == 0 and status != 0)
        comm.Barrier()
        return printed

    def document_done(self, done=Watch.document_done):
        done(self)
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    start("whole", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "document_done", document_done)
        for finished in (1, 2):
            printed = start("run", 75)
            said = f"stopped by SIGUSR1: {finished} of 3 documents are finished; the same command goes on\n"
            assert printed == said * (comm.rank == 0)
            with open_run(f"{folder}/run") as opened:
                assert [d.complete for d in opened.documents] == [i < finished for i in range(3)]
        start("run", 0)  # told after the last document: there is nothing to come back for
    ends = [e for e in record.entries(folder / "run" / "log") if "ended" in e]
    assert [(e["how"], e["finished"], e["finished_here"]) for e in ends] == [
        ("stopped", 1, 1), ("stopped", 2, 1), ("complete", 3, 1),
    ]  # fmt: skip
    with open_run(f"{folder}/run") as opened, open_run(f"{folder}/whole") as whole:
        for one, other in zip(opened.documents, whole.documents, strict=True):
            np.testing.assert_array_equal(one.logprobs, other.logprobs)

    # A job that is told before every first document gives up after two starts: it would not get any further.
    monkeypatch.setattr(Stop, "signal", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(Stop, "__init__", lambda self, grace_s: None)
    printed = [start("vain", status) for status in (75, 1, 1)]
    if comm.rank == 0:
        assert printed[0] == "stopped by SIGUSR1: 0 of 3 documents are finished; the same command goes on\n"
        assert printed[1].endswith("2 starts in a row ended before a document did: more time or nodes are needed\n")
        assert verify_run(folder / "run").problems == []


def test_a_running_job_tells_how_far_it_is(tmp_path):
    """From the outside: the status file while it runs, and a SIGTERM in the middle."""
    folder = tmp_path
    save_llama(folder / "model", 2)
    long = np.random.default_rng(1).integers(0, 300, 1500).tolist()
    with (folder / "long.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": name, "token_ids": long}) + "\n" for name in ("a", "b"))
    run = folder / "watched"
    line = [w.replace("documents.jsonl", "long.jsonl") for w in words(folder, str(run))]
    process = subprocess.Popen(
        [sys.executable, "-m", "cpmpi", *line, "--chunk-tokens", "16"], cwd=ROOT, env=clean_environment(),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while (status := record.read_status(run / "log")) is None:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    inside, between = "document 'a' is saved after layer 1 of 2", "1 of 2 documents are finished"
    assert f"stopped by SIGTERM: {inside}; the same" in printed or f"stopped by SIGTERM: {between}; the same" in printed
    known = {"document": "a", "tokens": 1500, "layers": 2, "finished": 0, "of": 2, "job": None}
    assert known.items() <= status.items()
    assert 1 <= status["layer"] <= 2
    assert 0 <= status["part"] < 1
