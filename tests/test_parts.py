"""Parts of a shared run: readers see one run before and after they are folded, a kill at any moment loses none."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cpmpi import open_run
from cpmpi.engine import append, corpus
from cpmpi.errors import UserError
from cpmpi.jobs.inspect import facts_of
from cpmpi.run import growth, parts
from cpmpi.run.folder import start_index
from cpmpi.run.lock import HeldError, is_held, only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record
from tests.runs import kv_of, make_run, make_spec, outputs_of
from tests.slurm.fake import FakeSlurm

LENGTHS = (50, 2, 7, 30)


def make_part(folder, i, world=3, lengths=LENGTHS, **own):
    """Document ``i`` done by a job of ``world`` ranks, as a part."""
    make_run(RunPaths(folder).part(i).folder, parts.part_spec(make_spec(lengths, world, **own), i))


def shared_run(folder, *done, **own):
    spec = make_spec(LENGTHS, **own)
    assert parts.join(folder, spec)
    for i in done:
        make_part(folder, i, world=1 + i, **own)
    return spec


def check(folder, *done, kv=True):
    with open_run(folder) as run:
        assert [d.index for d in run.documents] == list(range(len(LENGTHS)))
        assert [d.index for d in run.documents if d.complete] == list(done)
        for i in done:
            document = run.documents[f"d{i}"]
            assert document.world_size == 1 + i
            np.testing.assert_array_equal(document.logprobs, outputs_of(i, LENGTHS[i])["logprobs"])
            for layer in range(3) if kv else ():
                for found, whole in zip(document.kv(layer, as_torch=True), kv_of(i, layer, LENGTHS[i])):
                    assert found.equal(whole.bfloat16())
    return [problem.partition(": ")[2] for problem in verify_run(folder).problems]


def test_readers_see_one_run_before_and_after(tmp_path):
    spec = shared_run(tmp_path, 2, 0)
    assert check(tmp_path, 0, 2) == ["not complete: 2 of 4 documents are finished"]
    parts.fold(tmp_path, spec)  # on the way
    assert list(RunPaths(tmp_path).parts.glob("*")) == []
    assert check(tmp_path, 0, 2) == ["not complete: 2 of 4 documents are finished"]
    make_part(tmp_path, 3, world=4)
    make_part(tmp_path, 1, world=2)
    assert check(tmp_path, 0, 1, 2, 3) == ["not complete: 4 of 4 documents are finished"]
    parts.fold(tmp_path, spec)
    assert check(tmp_path, 0, 1, 2, 3) == []
    assert not RunPaths(tmp_path).parts.exists()
    with open_run(tmp_path) as run:
        assert run.complete


def test_without_keys_and_values(tmp_path):
    spec = shared_run(tmp_path, 0, 1, 2, 3, kv=None)
    check(tmp_path, 0, 1, 2, 3, kv=False)
    parts.fold(tmp_path, spec)
    assert check(tmp_path, 0, 1, 2, 3, kv=False) == []


@pytest.mark.parametrize("at", ["before", "create_index", "delete_parts"])
def test_a_kill_while_parts_are_folded_loses_none(tmp_path, monkeypatch, at):
    """Before the new run.h5 is there, and after it: both ways all can be read, and folding again ends it."""
    spec = shared_run(tmp_path, 0, 1, 2, 3)

    create = parts.create_index

    def cut(*args, **kwargs):
        if at == "create_index":
            create(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "create_index" if at == "before" else at, cut)
        with pytest.raises(KeyboardInterrupt):
            parts.fold(tmp_path, spec)
    check(tmp_path, 0, 1, 2, 3)
    parts.fold(tmp_path, spec)
    assert check(tmp_path, 0, 1, 2, 3) == []
    shards = [path for path in RunPaths(tmp_path).contents() if path.name.startswith("rank-")]
    assert len(shards) == 1 + 2 + 3 + 4


def test_damage_in_a_part_is_told(tmp_path):
    shared_run(tmp_path, 0, 2)
    shard = RunPaths(tmp_path).part(2).shard(1)
    data = shard.read_bytes()
    shard.write_bytes(data[:-200] + bytes(200))
    problems = verify_run(tmp_path).problems
    assert any(str(shard) in problem for problem in problems), problems
    shard.write_bytes(data)
    index = RunPaths(tmp_path).part(0).index
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(UserError, match=str(index)):
        open_run(tmp_path)
    RunPaths(tmp_path).claim(0).touch()  # somebody just writes it
    check(tmp_path, 2)


def test_a_part_of_another_list_is_not_taken_for_this_document(tmp_path):
    spec = shared_run(tmp_path)
    make_run(RunPaths(tmp_path).part(1).folder, parts.part_spec(make_spec((50, 30, 7, 2)), 3))
    check(tmp_path)
    results = parts.Results(tmp_path, spec)
    results.refresh()
    assert results.ends == {}


def test_failed_documents_stay_marked(tmp_path):
    spec = shared_run(tmp_path, 0, 1, 2)
    failed_part(tmp_path, spec, 3)
    results = parts.Results(tmp_path, spec)
    results.refresh()
    assert results.ends == {0: "", 1: "", 2: "", 3: "not finite"}
    parts.fold(tmp_path, spec)
    with open_run(tmp_path) as run:
        assert run.complete
        assert [document.failed for document in run.documents] == ["", "", "", "not finite"]


def failed_part(folder, spec, i):
    """Document ``i`` failed in a part."""
    index = start_index(RunPaths(folder).part(i).folder, parts.part_spec(spec, i))
    index.mark_failed(0, "not finite")
    index.finish()


def test_documents_that_failed_are_tried_again_by_who_comes_first(shared_job, tmp_path):
    """In parts, or in run.h5 already; not by each that joins while others work, which would never end."""
    folder = tmp_path / "run"
    with shared_job() as one:
        one.join()
        make_part(folder, 0, world=1)
        failed_part(folder, one.spec, 1)
        parts.fold(folder, one.spec)
        failed_part(folder, one.spec, 2)
        claim_of(folder, 3, "SLURM 0 12")
    with shared_job(retry_failed=True) as late:
        assert late.join() == 3
    RunPaths(folder).claim(3).unlink()
    with shared_job() as other:
        assert other.join() == 3
    with shared_job(retry_failed=True) as again:
        assert again.join() == 1
        assert again.next().index == 3
        again.give_back()
        assert not RunPaths(folder).part(2).index.exists()
    with open_run(folder) as run:
        assert [d.failed for d in run.documents] == [""] * 4
    check(folder, 0)


def test_documents_that_have_changed_are_refused_or_kept(shared_job, tmp_path):
    """As where a run is not shared: by the job that would lay the list out anew."""
    folder = tmp_path / "run"
    spec = make_spec(LENGTHS)
    new = replace(spec.documents[2], token_ids_sha256=spec.documents[2].token_ids_sha256[::-1])
    changed = replace(spec, documents=(*spec.documents[:2], new, spec.documents[3]))
    with shared_job() as one:
        one.join()
        make_part(folder, 0, world=1)
    for own, told in (({}, "1 document has changed"), ({"keep_finished": True}, "")):
        with shared_job(**own) as other:
            other.spec = changed
            if told:
                with pytest.raises(UserError, match=told):
                    other.join()
            else:
                assert other.join() == 1


def test_a_run_that_is_read_while_it_is_made_one(tmp_path):
    """Who has it open reads on: the shards have the same numbers then."""
    spec = shared_run(tmp_path, 0, 1, 2, 3)
    with open_run(tmp_path) as run:
        parts.fold(tmp_path, spec)
        assert not RunPaths(tmp_path).parts.exists()
        for i, length in enumerate(LENGTHS):
            found = run.documents[i].kv(1, as_torch=True)
            assert all(a.equal(b.bfloat16()) for a, b in zip(found, kv_of(i, 1, length)))


def test_before_a_run_grows_its_parts_become_one(tmp_path):
    """All documents are done, but the last job was killed before it made them one run."""
    spec = shared_run(tmp_path, 0, 1, 2)
    with pytest.raises(UserError, match="1 of 4 documents are not finished"):
        growth.finish(tmp_path)
    failed_part(tmp_path, spec, 3)
    growth.finish(tmp_path)
    growth.finish(tmp_path)
    assert not RunPaths(tmp_path).parts.exists()
    assert check(tmp_path, 0, 1, 2) == ["document 'd3' failed: not finite"]
    with open_run(tmp_path) as run:
        assert run.complete
        assert [s["set"] for s in facts_of(run)["shards"]] == [1, 2, 2, 3, 3, 3]


def test_a_part_is_no_run_to_append_to(tmp_path):
    shared_run(tmp_path, 0)
    with pytest.raises(UserError, match=rf"000000: is a part of the run {tmp_path}, which several jobs share"):
        append._check_whole(RunPaths(tmp_path).part(0).folder)
    append._check_whole(tmp_path)


def test_a_damaged_checkpoint_in_a_part_is_told(tmp_path):
    spec = shared_run(tmp_path, 0)
    part = RunPaths(tmp_path).part(1)
    start_index(part.folder, parts.part_spec(spec, 1))
    part.checkpoints.mkdir()
    manifest = part.checkpoint("0" * 64, 1)
    manifest.write_text("{}")
    problems = verify_run(tmp_path).problems
    assert len(problems) == 2
    assert any(problem.startswith(f"{manifest}: ") for problem in problems)


def test_what_left_the_parts_is_found_in_the_run(tmp_path):
    """Whoever looks while another job folds must not take a document that is done for one that is not."""
    spec = shared_run(tmp_path, 0, 1)
    results = parts.Results(tmp_path, spec)
    results.refresh()
    make_part(tmp_path, 2, world=3)
    look = results._look_at_part

    def look_late(index):
        parts.fold(tmp_path, spec)
        look(index)

    results._look_at_part = look_late  # type: ignore[method-assign]
    results.refresh()
    assert set(results.ends) == {0, 1, 2}
    results.refresh()
    assert results.parts == 0


def test_overwrite_deletes_parts_and_nothing_else(tmp_path):
    shared_run(tmp_path, 0, 1)
    (tmp_path / "parts" / "000002.claim").touch()
    (tmp_path / "parts" / "000002.claim.lock_2").touch()
    mine = tmp_path / "parts" / "notes.txt"
    mine.touch()
    start_index(tmp_path, make_spec(LENGTHS), overwrite=True)
    assert [path for path in (tmp_path / "parts").rglob("*") if path.is_file()] == [mine]


def test_who_shares_and_who_is_alone(tmp_path):
    """In another process: locks of the file system are a process's."""
    (tmp_path / "run").mkdir()
    assert is_held(tmp_path / "run") is False
    for shared in (True, False):
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            with only_writer(tmp_path / "run", shared=shared):
                os.write(ready[1], b".")
                os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        try:
            assert is_held(tmp_path / "run") is True
            with pytest.raises(HeldError), only_writer(tmp_path / "run"):
                pass
            if shared:
                with only_writer(tmp_path / "run", shared=True):
                    pass
        finally:
            os.write(go[1], b".")
            os.waitpid(child, 0)


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Of a job of two ranks with 200 s left, 100 of them to stop in; tokens alone cost something."""
    monkeypatch.setattr(corpus, "pair_weight", lambda *_: 0.0)
    monkeypatch.setattr(corpus, "allocation", lambda: SimpleNamespace(end_time=time.time() + 200, job_id=17))
    (tmp_path / "log").mkdir()
    job = SimpleNamespace(
        options=SimpleNamespace(output=tmp_path, grace=100), ranks=SimpleNamespace(size=2),
        model=SimpleNamespace(skeleton=None, layers=()), inputs=SimpleNamespace(checkpoint=None),
    )  # fmt: skip
    return lambda: corpus.Clock(job)


@pytest.fixture
def shared_job(tmp_path, monkeypatch):
    """Makes corpora of jobs on one folder, each as if its process had this number; squeue knows job 12 alone."""
    monkeypatch.setattr(corpus, "pair_weight", lambda *_: 0.0)
    monkeypatch.setattr(corpus, "allocation", lambda: None)
    monkeypatch.setattr(corpus, "publish_circumstances", lambda *_: None)
    fake = FakeSlurm(tmp_path / "fake", ["squeue"])
    fake.prints("squeue", "12 RUNNING\n")
    monkeypatch.setenv("PATH", fake.path)

    def made(**own):
        options = {"output": tmp_path / "run", "grace": 0, "most_tokens": None, "take": "longest", "stay": False}
        options |= {"keep_finished": False, "retry_failed": False, "overwrite": False, **own}
        job = SimpleNamespace(
            options=SimpleNamespace(**options), ranks=SimpleNamespace(size=3), spec=make_spec(LENGTHS),
            model=SimpleNamespace(skeleton=None, layers=()), inputs=SimpleNamespace(checkpoint=None),
        )  # fmt: skip
        return corpus.Corpus.opened(job)

    return made


def claim_of(folder, i, owner, age_s=100.0):
    path = RunPaths(folder).claim(i)
    path.write_text(f"{owner}\nnode1\n")
    os.utime(path, (time.time() - age_s,) * 2)


def test_one_after_the_other_until_none_is_left(shared_job, tmp_path):
    with shared_job() as one:
        assert one.join() == 0
        taken = []
        for ended in range(4):
            turn = one.next()
            assert turn.ended == ended
            taken.append(turn.index)
            make_part(tmp_path / "run", turn.index, world=1 + turn.index)
            one.give_back()
        assert taken == [0, 3, 2, 1], "the longest first"
        assert one.next() == corpus.Turn(ended=4)
        assert one.close_up() == 0
    assert check(tmp_path / "run", 0, 1, 2, 3) == []
    assert not (tmp_path / "run" / "parts").exists()


def test_what_others_have_is_left_and_what_the_dead_had_is_taken(shared_job, tmp_path):
    with shared_job(take="shortest") as one:
        one.join()
        claim_of(tmp_path / "run", 1, "SLURM 0 12")
        claim_of(tmp_path / "run", 2, "SLURM 0 11")
        assert one.next().index == 2
        one.give_back()
        for i in (0, 2, 3):
            make_part(tmp_path / "run", i, world=1 + i)
        assert one.next() == corpus.Turn(ended=3), "its job lives: nothing to wait for"
        claim_of(tmp_path / "run", 1, "SLURM 0 12", age_s=1)
        assert one.next() == corpus.Turn(ended=3, wait=True), "too young to be sure"
        assert one.close_up() == 1
    with shared_job(stay=True) as patient:
        claim_of(tmp_path / "run", 1, "SLURM 0 12")
        patient.join()
        assert patient.next().wait
    with shared_job(most_tokens=1) as small:
        assert small.next() == corpus.Turn(ended=3), "longer documents are none of its business"


def test_a_part_that_is_half_deleted_is_begun_anew(shared_job, tmp_path):
    with shared_job() as one:
        one.join()
        make_part(tmp_path / "run", 0, world=1)
        part = RunPaths(tmp_path / "run").part(0)
        os.replace(part.index, part.deleted)
        assert one.next().index == 0
        assert [path for path in part.contents() if path != part.lock] == []


def test_a_document_that_was_done_meanwhile_is_not_begun_again(shared_job, tmp_path):
    with shared_job() as one:
        one.join()
        refresh, done = one.results.refresh, []

        def late(*_):
            if RunPaths(tmp_path / "run").claim(0).exists() and not done:  # another job had it until just now
                done.append(0)
                make_part(tmp_path / "run", 0, world=1)
            refresh()

        one.results.refresh = late
        assert one.next().index == 3
        assert done == [0]
        assert not RunPaths(tmp_path / "run").claim(0).exists()


def test_another_list_and_a_job_alone_wait_for_those_that_share(shared_job, tmp_path):
    with shared_job() as one:
        one.join()
        claim_of(tmp_path / "run", 1, "SLURM 0 12")
        make_part(tmp_path / "run", 0, world=1)
        with pytest.raises(UserError, match="job 12 share the documents of this run"):
            one.absorb()
        one.spec = make_spec(LENGTHS[:3])
        with pytest.raises(UserError, match="job 12 work on another list of documents here"):
            one.join()
        RunPaths(tmp_path / "run").claim(1).unlink()
        one.join()
        with open_run(tmp_path / "run") as run:
            assert [document.complete for document in run.documents] == [True, False, False]


def test_parts_are_folded_on_the_way_before_there_are_many(shared_job, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MOST_PARTS", 2)
    with shared_job() as one:
        one.join()
        for i in (0, 1):
            make_part(tmp_path / "run", i, world=1 + i)
        assert one.next().index == 3
        assert not RunPaths(tmp_path / "run").part(0).folder.exists()
        check(tmp_path / "run", 0, 1)


def test_too_little_time_for_a_document(clock, tmp_path):
    """Nobody knows before the first; then the slowest of the last counts, of jobs of any size."""
    first = clock()
    assert first.late(1_000_000) == ""
    record.note_document(tmp_path / "log", rank_seconds=40.0, cost=1000.0)
    second = clock()  # of this job's two ranks: 20 s for 1,000 tokens, and a fifth more to be sure
    assert second.late(4_000) == ""
    assert re.match(r"takes about 1 min 43 s, and 1 min \d+ s are left", second.late(4_300))
    second.done("d", 1_000, 80.0, "17")
    assert second.late(4_000) != ""
    assert record.documents(tmp_path / "log")[-1]["rank_seconds"] == 160.0
