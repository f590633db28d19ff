"""The main job as users run it: killed and started again, scoring only, with progress and a table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import cpmpi
from cpmpi.errors import UserError

from .conftest import ROOT, clean_environment, mpirun
from .test_exact import save_documents, save_llama

LENGTHS = tuple(range(3000, 3012))


def prefill(folder, output, command="prefill"):
    model, documents = folder / "model", folder / "documents"
    return ["-m", "cpmpi", command, "--model", str(model), "--input", str(documents), "--output", str(output)]


def finished(output):
    try:
        with cpmpi.open_run(output) as run:
            return sum(document.complete for document in run.documents)
    except (OSError, UserError):
        return 0


@pytest.mark.slow  # the short chaos series kills as many ranks, test_index.py a writer at any moment
def test_killed_job_goes_on_where_it_was(tmp_path):
    """kill -9 of all ranks while documents are in work; the same command finishes, and does nothing twice."""
    save_llama(tmp_path / "model", 2, layers=4)
    save_documents(tmp_path / "documents", LENGTHS)
    output = tmp_path / "run"
    mpirun_path = os.path.join(os.path.dirname(sys.executable), "mpirun")
    launcher = mpirun_path if os.path.exists(mpirun_path) else "mpirun"
    command = [launcher, "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, *prefill(tmp_path, output)]
    job = subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while finished(output) < 2 and job.poll() is None:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    subprocess.run(
        ["pkill", "-9", "-f", str(output)], check=False
    )  # ranks that the launcher put in groups of their own
    job.wait()
    before = finished(output)
    assert 2 <= before < len(LENGTHS), "the kill came too late for this test to show anything"
    with cpmpi.open_run(output) as run:
        stamps = [run.documents[i].logprobs.copy() for i in range(before)]

    done = mpirun(2, *prefill(tmp_path, output))
    assert done.returncode == 0, done.stdout
    assert f"{before} of {len(LENGTHS)} documents are finished already" in done.stdout
    assert done.stdout.count("(was done)") == before
    assert re.search(
        r"^linear layers: \w+'s matrix products, (as the run was begun|oneDNN is missing)", done.stdout, re.M
    ), "not timed anew"
    whole = mpirun(2, *prefill(tmp_path, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stdout
    with cpmpi.open_run(output) as one, cpmpi.open_run(tmp_path / "whole") as two:
        assert one.complete
        for i, (a, b) in enumerate(zip(one.documents, two.documents, strict=True)):
            np.testing.assert_array_equal(a.logprobs, b.logprobs)
            if i < before:
                np.testing.assert_array_equal(a.logprobs, stamps[i])
            for layer in range(4):
                for got, want in zip(a.kv(layer), b.kv(layer), strict=True):
                    np.testing.assert_array_equal(got, want)
    from cpmpi.run.verify import verify_run

    assert not verify_run(output).problems


def test_score_keeps_no_kv_and_says_what_it_does(tmp_path):
    save_llama(tmp_path / "model", 2)
    save_documents(tmp_path / "documents", (1, 500))
    done = mpirun(2, *prefill(tmp_path, tmp_path / "run", "score"))
    assert done.returncode == 0, done.stdout
    assert re.search(r"^cpmpi \S+: 2 ranks on cpu, 1 thread each$", done.stdout, re.M)
    assert "computed in float32; no KV kept" in done.stdout
    assert re.search(r"^attention: \w+: \d", done.stdout, re.M), "why this schedule"
    assert re.search(r"^00500\.npy +500 +\d+\.\d+ +\d+\.\d{4} ", done.stdout, re.M)
    assert not (tmp_path / "run" / "shards").exists()
    with cpmpi.open_run(tmp_path / "run") as run:
        assert run.complete
        assert np.isfinite(run.documents[1].logprobs[1:]).all()
        assert np.isnan(run.documents[0].perplexity), "nothing is predicted in a document of one token"
    logs = sorted((tmp_path / "run" / "log").glob("rank-*.log"))
    assert len(logs) == 2
    for rank, log in enumerate(logs):
        lines = log.read_text().splitlines()
        assert lines
        assert all(re.match(rf"\S+ \S+ {rank}/2 INFO ", line) for line in lines)


def test_a_run_can_be_drawn(tmp_path):
    """Every rank's layers, attention, waits, arrivals and writes, as a trace and a picture."""
    save_llama(tmp_path / "model", 2, layers=3)
    save_documents(tmp_path / "documents", (500,))
    trace, plot = tmp_path / "trace.json", tmp_path / "run.png"
    line = [*prefill(tmp_path, tmp_path / "run"), "--trace", str(trace), "--plot", str(plot)]
    done = mpirun(2, *line)
    assert done.returncode == 0, done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank in (0, 1):
        found = {(event["name"], event["args"]["layer"]) for event in events if event["pid"] == rank}
        assert found >= {
            (what, layer) for what in ("layers", "compute", "wait", "transfer", "io") for layer in range(3)
        }
