"""Jobs on one run folder and one list of documents: each document once, one run in the end, nothing lost."""

from __future__ import annotations

import json

import pytest

from tests.conftest import mpirun
from tests.test_resume import options_of, prepared, run_stopped, same

LENGTHS = (150, 30, 31, 70, 12, 90, 55, 41)


def shared(folder, output, comm, **own):
    """A job on the ranks of ``comm``; which documents it did."""
    from cpmpi.comm.ranks import Ranks
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.share import share_documents

    outcome = share_documents(prepare(several(folder, output, **own), Ranks(comm)))
    return [outcome.job.spec.documents[i].id for i in outcome.seconds]


def several(folder, output, **own):
    from dataclasses import replace

    return replace(options_of(folder, output, **{"share": True, **own}), inputs=(str(folder / "*.npy"),))


def done(run):
    return [json.loads(line)["document"] for line in (run / "log" / "documents.jsonl").read_text().splitlines()]


def check_one_run(folder, output):
    """It is what one job makes of these documents, each done once, and nothing says that it was shared."""
    from cpmpi.run.verify import verify_run

    assert sorted(done(folder / output)) == sorted(f"{'d' if n == 150 else n}.npy" for n in LENGTHS)
    assert verify_run(folder / output).problems == []
    assert not (folder / output / "parts").exists()
    assert (folder / output / "summary.csv").read_text() == (folder / "alone" / "summary.csv").read_text()
    same(folder / "alone", folder / output)


@pytest.mark.mpi(2)
def test_jobs_share_a_run(tmp_path):
    """In one launch: two jobs at a time; a stopped one and its successor; long and short documents; other lists."""
    from mpi4py import MPI

    from cpmpi.engine.corpus import Corpus

    comm, alone = MPI.COMM_WORLD, MPI.COMM_SELF
    folder = prepared(tmp_path, lengths=LENGTHS)
    if comm.rank == 0:
        from cpmpi.comm.ranks import Ranks
        from cpmpi.engine.prepare import prepare
        from cpmpi.engine.run import run_prepared

        run_prepared(prepare(several(folder, "alone", keep_kv=True, share=False), Ranks(alone)))
    comm.Barrier()
    with pytest.MonkeyPatch.context() as patch:
        join = Corpus.join

        def join_together(corpus):
            ended = join(corpus)
            comm.Barrier()
            return ended

        patch.setattr(Corpus, "join", join_together)
        mine = shared(folder, "at-once", alone, keep_kv=True)
    everyone = comm.gather(mine)
    if comm.rank == 0:
        assert all(everyone), "each of the two did some"
        check_one_run(folder, "at-once")
    check_taken_over(folder, comm)
    check_lengths(folder, comm)
    check_lists(folder, comm)


def check_taken_over(folder, comm):
    """A job of two ranks is stopped in the first, longest document: another, of one rank, goes on inside it."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.score import Engine

    said = run_stopped(several(folder, "over"))
    assert "document 'd.npy' is saved after layer 3 of 5" in said
    if comm.rank == 0:
        with cpmpi.open_run(folder / "over") as run:
            assert not any(document.complete for document in run.documents)
        computed, gather = [], Engine._gather_keys

        def count(engine, way, layer, calls):
            computed.append(layer)
            return gather(engine, way, layer, calls)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "_gather_keys", count)
            assert len(shared(folder, "over", MPI.COMM_SELF)) == len(LENGTHS)
        assert computed[:7] == [3, 4, 0, 1, 2, 3, 4], "the layers that were saved are not computed again"
        with cpmpi.open_run(folder / "over") as run:
            assert run.complete
    comm.Barrier()


def check_lengths(folder, comm):
    """A job for short documents leaves the long ones, and readers see what is done; one of two ranks takes the rest."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.jobs.inspect import facts_of
    from cpmpi.run.verify import verify_run

    if comm.rank == 0:
        small = shared(folder, "mixed", MPI.COMM_SELF, keep_kv=True, most_tokens=60, take="shortest")
        assert small == ["12.npy", "30.npy", "31.npy", "41.npy", "55.npy"]
        problems = verify_run(folder / "mixed").problems
        assert [p.split(": ", 1)[1] for p in problems] == ["not complete: 5 of 8 documents are finished"]
        with cpmpi.open_run(folder / "mixed") as run, cpmpi.open_run(folder / "alone") as whole:
            facts = facts_of(run)
            assert facts["documents_complete"] == 5
            assert [s["problem"] for s in facts["shards"]] == [None] * 5
            for name in small:
                one, other = run.documents[name], whole.documents[name]
                assert (one.logprobs[1:] == other.logprobs[1:]).all()
                assert (one.kv(4)[0] == other.kv(4)[0]).all()
                assert one.index == other.index
        check_repair(folder / "mixed")
    comm.Barrier()
    assert shared(folder, "mixed", comm, keep_kv=True) == ["d.npy", "90.npy", "70.npy"]
    if comm.rank == 0:
        with cpmpi.open_run(folder / "mixed") as run:
            assert run.complete
            assert {d.id: d.world_size for d in run.documents if d.world_size > 1} == {
                "d.npy": 2, "70.npy": 2, "90.npy": 2,
            }  # fmt: skip
        assert verify_run(folder / "mixed").problems == []
        assert sorted(done(folder / "mixed")) == sorted(done(folder / "at-once"))
    comm.Barrier()


def check_repair(run):
    """What is damaged in parts is computed again there, and the run goes on as one that is not finished."""
    from mpi4py import MPI

    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.engine.repair import repair
    from cpmpi.run.paths import RunPaths

    parts = RunPaths(run).every_part()
    shard, index = parts[0].shard(0), parts[1].index
    before = [file.read_bytes() for file in (shard, index, RunPaths(run).index)]
    damage(shard, "key", 3)
    damage(index, "logprobs", 5)
    found = repair(run, None, Ranks(MPI.COMM_SELF), Progress(enabled=False))
    assert [problem.split(": ", 1)[1] for problem in found.problems] == ["not complete: 5 of 8 documents are finished"]
    assert [file.read_bytes() for file in (shard, index, RunPaths(run).index)] == before


def damage(file, dataset, at):
    """Change a byte of a dataset of the document in a file of a part."""
    import h5py

    with h5py.File(file, "r", locking=False) as opened:
        offset = opened[f"documents/000000/{dataset}"].id.get_offset() + at
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def check_lists(folder, comm):
    """Documents are added when nobody works; a job that does not share goes on with a run that was shared."""
    from mpi4py import MPI

    from cpmpi.comm.ranks import Ranks
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared

    if comm.rank == 0:
        shared(folder, "added", MPI.COMM_SELF, keep_kv=True, select="^[1-5]", most_tokens=40)
        run_prepared(
            prepare(several(folder, "added", keep_kv=True, share=False, select="^[1-9]"), Ranks(MPI.COMM_SELF))
        )
        assert not (folder / "added" / "parts").exists()
        assert len(shared(folder, "added", MPI.COMM_SELF, keep_kv=True)) == 1
        same(folder / "alone", folder / "added")
    comm.Barrier()


def test_options_that_do_not_go_together(tmp_path):
    from cpmpi.errors import UserError

    for own, told in (({"overwrite": True}, "each job would delete"), ({"share": False, "stay": True}, "--share")):
        with pytest.raises(UserError, match=told):
            options_of(tmp_path, "run", **{"share": True, **own})


@pytest.mark.slow
def test_a_killed_job_without_slurm(tmp_path):
    """Two launches on one folder; one is killed in a document, which the other takes over and completes the run."""
    import os
    import signal
    import subprocess
    import sys
    import time

    from tests.conftest import clean_environment
    from tests.test_exact import save_documents, save_llama

    save_llama(tmp_path / "model", 4)
    save_documents(tmp_path / "documents", (4000, 2500, 2400, 900, 100, 50))
    words = [sys.executable, "-m", "cpmpi", "score", "--share", "--stay", "--model", str(tmp_path / "model"), "--quiet"]
    words += ["--input", str(tmp_path / "documents"), "--output", str(tmp_path / "run"), "--attention", "ring"]
    first = subprocess.Popen(words, env=clean_environment(), start_new_session=True)
    claims = tmp_path / "run" / "parts"
    while not list(claims.glob("0*.claim")):
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    left = [path.name for path in claims.glob("0*.claim")]
    assert left
    out = mpirun(2, *words[1:])
    assert out.returncode == 0, out.stdout
    from cpmpi.run.verify import verify_run

    assert verify_run(tmp_path / "run").problems == []
    assert not claims.exists()
