"""A job over nodes of which one loses its network, or vanishes, ends with a line that says so; no process is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cpmpi.jobs.hang import last_hang

from ..conftest import ROOT, clean_environment, mpirun_path
from ..tiny_models import VOCABULARY, save_tiny, tiny_config
from .emulated import SCRIPT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
TOKEN = "CPMPI_CLUSTER_HANG"


def processes(token: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{TOKEN}={token}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("end", ["network", "node"])
def test_a_node_is_lost(end, cluster, tmp_path):
    save_tiny(tmp_path / "model", tiny_config("llama", num_hidden_layers=8, max_position_embeddings=8192))
    np.save(tmp_path / "long.npy", np.random.default_rng(0).integers(3, VOCABULARY, 6000))
    run, token = tmp_path / "run", str(tmp_path)
    line = [mpirun_path(), "--bind-to", "none", "--host", "n1:1,n2:1", "-n", "2"]
    line += ["--mca", "plm", "ssh", "--mca", "plm_ssh_agent", f"{SCRIPT} rsh", "-x", TOKEN]
    line += [sys.executable, "-m", "cpmpi", "prefill", "--model", str(tmp_path / "model")]
    line += ["--input", str(tmp_path / "long.npy"), "--output", str(run), "--hang-timeout", "5"]
    line += ["--attention", "ring", "--checkpoint", "0", "--chunk-tokens", "50"]
    environment = clean_environment(**cluster._name, **cluster._mpi({}), **{TOKEN: token})
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(
            [str(SCRIPT), "on", "n1", *line], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
    on_n2 = f"{cluster._name['CLUSTER_PREFIX']}-n2"
    try:
        patience = time.monotonic() + 60
        while not any((run / "checkpoints").glob("*.json")):
            assert job.poll() is None, (tmp_path / "out").read_text()
            assert time.monotonic() < patience, (tmp_path / "out").read_text()
            time.sleep(0.02)
        subprocess.run(["ip", "-n", on_n2, "link", "set", "eth0", "down"], check=True)
        if end == "node":  # with everything on it
            there = subprocess.run(["ip", "netns", "pids", on_n2], capture_output=True, text=True, check=True)
            for pid in map(int, there.stdout.split()):
                os.kill(pid, signal.SIGKILL)
        status = job.wait(100)
        patience = time.monotonic() + 90
        while processes(token) and time.monotonic() < patience:
            time.sleep(0.2)
        left = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes(token)]
    finally:
        subprocess.run(["ip", "-n", on_n2, "link", "set", "eth0", "up"], check=True)
        for pid in processes(token):
            os.kill(pid, signal.SIGKILL)
        job.wait()
    said = (tmp_path / "out").read_text()
    assert left == [], said
    lines = re.findall(r"^error: .*$", said, re.MULTILINE)
    if end == "node" and not lines:  # Open MPI's launcher saw its daemon go, and ended all; its status may be 0
        assert "prterun" in said
        assert not (run / "summary.csv").exists()
        return
    assert status != 0
    assert len(lines) == 1, said
    assert last_hang(run).line == lines[0]
    if end == "node":
        assert re.search(r"error: rank 1/2 on n2 gives no sign of life, the last from document 'long.npy'", lines[0])
    else:
        assert re.search(r"error: all ranks wait; the first behind is rank \d/2 on n[12] in document", lines[0])
