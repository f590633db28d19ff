"""Pictures of a run: drawn for finished documents, inside the run folder, and no obstacle to running again."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from cpmpi.jobs.cli import cli

from .conftest import mpirun
from .test_exact import save_documents, save_llama


def test_report_draws_every_document_and_the_run_can_be_done_again(tmp_path):
    pytest.importorskip("matplotlib")
    save_llama(tmp_path / "model", 2)
    save_documents(tmp_path / "documents", (2, 500))
    job = ["-m", "cpmpi", "score", "--model", str(tmp_path / "model"), "--input", str(tmp_path / "documents")]
    job += ["--output", str(tmp_path / "run")]
    assert mpirun(1, *job).returncode == 0
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    pictures = [tmp_path / "run" / "report" / f"surprisal-{i:06d}.png" for i in range(2)]
    assert result.output.splitlines() == [str(p) for p in pictures]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    again = mpirun(1, *job, "--overwrite")
    assert again.returncode == 0, again.stdout
    assert not pictures[0].exists(), "a picture of the deleted run"
