"""Real processes that are stopped, slowed down, killed: the job ends, or goes on; no process is left, nothing is lost.

See `tests.test_watchdog` for the rules by which that is decided.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import cpmpi
from cpmpi.jobs.hang import last_hang
from cpmpi.run.verify import verify_run

from .launched import Launched
from .test_continuations import CHECKPOINT
from .tiny_models import VOCABULARY, save_tiny, tiny_config

pytestmark = pytest.mark.slow
LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hang")
    save_tiny(made / "model", tiny_config("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192))
    np.save(made / "long.npy", np.random.default_rng(0).integers(3, VOCABULARY, 5000))
    np.save(made / "short.npy", np.random.default_rng(1).integers(3, VOCABULARY, 1000))
    return made


def words(folder: Path, run: Path, document: str = "long", timeout: str = "4") -> list[str]:
    made = ["--model", str(folder / "model"), "--input", str(folder / f"{document}.npy"), "--output", str(run)]
    often = ["--attention", "ring", "--chunk-tokens", "100", "--checkpoint", "0"]
    return ["prefill", *made, *often, "--hang-timeout", timeout]


def in_the_middle(run: Path) -> bool:
    """A checkpoint is there, and rank 1 has told that it is in a layer."""
    beat = run / "log" / "beats" / "rank-00001"
    told = beat.read_text() if beat.exists() else ""
    return any((run / "checkpoints").glob("*.json")) and told.endswith(" ") and json.loads(told)["layer"] >= 1


@pytest.fixture(scope="module")
def whole(folder):
    with Launched(words(folder, folder / "whole"), folder / "whole.out") as job:
        assert job.end() == (0, []), job.said()
    with cpmpi.open_run(folder / "whole") as run:
        return run.documents[0].logprobs


@pytest.mark.parametrize("end", ["stopped", "rank killed", "launcher killed", "stopped and launcher killed"])
def test_a_job_ends_on_all_ranks_and_goes_on(end, folder, whole):
    run = folder / end.replace(" ", "-")
    with Launched(words(folder, run), run.with_suffix(".out")) as job:
        job.wait_until(lambda: in_the_middle(run))
        rank = job.rank(1)
        if end.startswith("stopped"):
            os.kill(rank, signal.SIGSTOP)
        if end != "stopped":
            os.kill(rank if end == "rank killed" else job.launcher.pid, signal.SIGKILL)
        status, left = job.end()
        said = job.said()
    assert status != 0
    if end == "stopped and launcher killed":
        assert set(left) <= {rank}, "a stopped process that nobody is left to end"
    else:
        assert left == []
    assert "Traceback" not in said
    lines = re.findall("^error: .*$", said, re.MULTILINE)
    if end == "stopped":
        (line,) = lines
        assert re.search(
            r"rank 1/2 on \S+ gives no sign of life, the last from document 'long.npy', layer \d of 8", line
        )
        found = last_hang(run)
        assert found.line == line
        assert 0 in found.dumps
        assert found.states[1].silent_s >= 0.7 * 4
    with Launched(words(folder, run), run.with_suffix(".out")) as job:
        assert job.end() == (0, []), job.said()
        assert re.search(r"goes on after layer \d of 8", job.said())
    with cpmpi.open_run(run) as opened:
        np.testing.assert_array_equal(opened.documents[0].logprobs, whole)
    assert verify_run(run).problems == []
    assert not (run / "log" / "beats").exists()


@pytest.mark.parametrize("command", ["extend", "append", "generate"])
def test_a_job_after_a_stored_document_ends_where_a_rank_is_stopped(command, tmp_path):
    """The run with the document stays as it was."""
    run, output, lines = tmp_path / "run", tmp_path / "scores", tmp_path / "lines.jsonl"
    np.save(tmp_path / "d.npy", np.random.default_rng(0).integers(3, 90, 900))
    text = np.random.default_rng(1).integers(3, 90, 4000).tolist()
    lines.write_text(json.dumps({"document": "d.npy", "id": "a", "token_ids": text}) + "\n")
    first = ["prefill", "--model", str(CHECKPOINT), "--input", str(tmp_path / "d.npy"), "--output", str(run)]
    with Launched(first, tmp_path / "first.out", 1) as job:
        assert job.end() == (0, []), job.said()
    given = ["--run", str(run), "--attention", "ring", "--chunk-tokens", "20", "--quiet", "--hang-timeout", "4"]
    line = {
        "extend": ["extend", *given, "--input", str(lines), "--output", str(output)],
        "append": ["extend", "--append", *given, "--input", str(lines)],
        "generate": ["generate", *given, "--prompt", "a", "--max-new-tokens", "20000"],
    }[command]
    watched = output if command == "extend" else run

    def under_way() -> bool:
        told = [path.read_text() for path in (watched / "log").glob("beats*/rank-00001")]
        return bool(told) and told[0].endswith(" ") and json.loads(told[0])["layer"] >= 1

    with Launched(line, tmp_path / "out") as job:
        job.wait_until(under_way)
        os.kill(job.rank(1), signal.SIGSTOP)
        status, left = job.end()
        said = job.said()
    assert (status != 0, left) == (True, []), said
    (error,) = re.findall("^error: .*$", said, re.MULTILINE)
    assert re.search(r"rank 1/2 on \S+ gives no sign of life, the last from document 'd.npy', layer \d of 3", error)
    assert last_hang(watched).line == error
    assert verify_run(run).problems == []


def test_a_rank_that_is_ten_times_slower_finishes(folder):
    """Nine tenths of the time it is stopped; a signal comes once a second, and the timeout is 4 s."""
    run, over = folder / "slow", threading.Event()
    with Launched(words(folder, run, "short"), folder / "slow.out") as job:
        job.wait_until(lambda: (run / "log" / "beats" / "rank-00001").exists())
        pid = job.rank(1)

        def slow_down() -> None:
            while not over.wait(0.1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    over.wait(0.9)
                    os.kill(pid, signal.SIGCONT)

        slowly = threading.Thread(target=slow_down)
        slowly.start()
        try:
            job.wait_until(lambda: Path(run / "summary.csv").exists(), timeout_s=230)
        finally:
            over.set()
            slowly.join()
        assert job.end() == (0, []), job.said()
    assert "error" not in job.said()
    assert not list((run / "log").glob("hang-*"))
