"""The self-test passes on a machine that works, and a check notices when what it checks does not."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cpmpi.engine import selftest as module
from cpmpi.errors import UserError
from cpmpi.jobs.bench import command
from cpmpi.kernels.backend import Backend

from .test_exact import shared_folder


def checks_of(folder: Path) -> dict[str, module.Check]:
    from cpmpi.comm import ranks as launched
    from cpmpi.jobs.topology import described

    ranks = launched.start()
    topology = described(ranks, None, None)
    machine = module.Machine(ranks=ranks, device=torch.device("cpu"), topology=topology, folder=folder)
    told: list[module.Check] = []
    assert module.selftest(machine, told.append) == told
    assert (
        ranks.allgather([(check.outcome, check.told) for check in told])
        == [[(check.outcome, check.told) for check in told]] * ranks.size
    )
    return {check.name: check for check in told}


@pytest.mark.mpi(2)
def test_all_is_well_on_two_ranks(tmp_path, monkeypatch):
    folder = shared_folder(tmp_path)
    checks = checks_of(folder)
    outcomes = {name: check.outcome for name, check in checks.items()}
    assert outcomes.pop("attention over nccl") == ("left out" if not torch.cuda.is_available() else "ok")
    assert outcomes == dict.fromkeys(
        ["machine", "kernels", "attention over gloo", "attention over mpi", "files", "lock", "short job"], "ok"
    )
    assert "NCCL" in checks["attention over nccl"].told
    monkeypatch.setattr(module, "LOGPROB", 1e-12)
    with pytest.raises(UserError, match="off from transformers' in one process"):
        module._compare(folder / "document.npy", folder / "run")


@pytest.mark.slow
@pytest.mark.mpi(2)
def test_what_is_broken_is_named(tmp_path, monkeypatch):
    from mpi4py import MPI

    last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
    works = {name: getattr(module, name) for name in ("_pattern", "named")}

    def off_kernel(name):
        found = works["named"](name)
        if name == "reference":
            return found

        def contributions(*args, **kwargs):
            for each in found.contributions(*args, **kwargs):
                yield each._replace(out_nTHE=each.out_nTHE * (1 + 1e-3))

        return Backend(name=name, reason="", contributions=contributions)

    def other_bytes(n_bytes, rank, channel, device):
        """What the last rank sends in one direction is not what the others expect of it."""
        mine = last and rank == MPI.COMM_WORLD.rank and n_bytes == module.SIZES[1]
        return works["_pattern"](n_bytes, rank + 5 * mine, channel, device)

    monkeypatch.setattr(module, "FILE_BYTES", 1 << 12)
    monkeypatch.setattr(module, "_content", lambda rank: bytes([rank + MPI.COMM_WORLD.rank]) * 10)
    monkeypatch.setattr(module, "only_writer", lambda folder: nullcontext())
    monkeypatch.setattr(module, "_pattern", other_bytes)
    for name in ("kernels_agree", "job_is_exact"):
        monkeypatch.setattr(module, name, lambda machine: "")
    checks = checks_of(shared_folder(tmp_path))
    for name, words in {
        "attention over mpi": "arrived with other bytes",
        "files": "with other bytes than rank",
        "lock": "took the lock that rank 0 holds",
    }.items():
        assert checks[name].outcome == "FAILED", name
        assert words in checks[name].told

    monkeypatch.setattr(module, "_pattern", works["_pattern"])
    monkeypatch.setattr(module, "named", off_kernel)
    told = checks_of(shared_folder(tmp_path))["attention over mpi"]
    assert told.outcome == "FAILED"
    assert "ring: off from one process by" in told.told


def test_the_command_on_one_process(tmp_path, monkeypatch):
    for name in ("kernels_agree", "job_is_exact"):
        monkeypatch.setattr(module, name, lambda machine: "")
    line = ["selftest", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")]
    done = CliRunner().invoke(command, line)
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "found.json").read_text())
    assert {check["name"]: check["outcome"] for check in facts["checks"]}["lock"] == "left out"
    assert facts["topology"]["nodes"]
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"], "its folder is gone"

    monkeypatch.setattr(module, "lock_holds", _fails)
    for wrong, words in (
        (["--folder", str(tmp_path)], "1 of 8 checks failed: lock"),
        (["--folder", str(tmp_path / "none")], "none: no such folder"),
        (["--json", str(tmp_path / "none" / "x.json")], "x.json: no folder"),
    ):
        assert words in str(CliRunner().invoke(command, ["selftest", *wrong]).exception)


def _fails(machine):
    from cpmpi.comm.ranks import AgreedError

    raise AgreedError("no")
