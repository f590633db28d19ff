"""A run is given another list, or goes on with other ranks: what is finished stays, by content, and nothing is lost."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpmpi import open_run
from cpmpi.attention.grid import Grid
from cpmpi.errors import UserError
from cpmpi.run import checkpoint
from cpmpi.run.folder import start_index, what_is_deleted
from cpmpi.run.manifest import KVPlace, Manifest
from cpmpi.run.paths import RunPaths
from cpmpi.run.spec import DocumentSpec, RunSpec, ShardSet
from cpmpi.run.verify import verify_run
from tests.conftest import mpirun
from tests.power_cut import PowerCutError
from tests.runs import held, kv_of, make_run, make_spec, number_of, open_writers, outputs_of
from tests.test_exact import save_documents, save_llama

LENGTHS = (50, 2, 7, 30)
OLD_RUNS = Path(__file__).parent / "data" / "runs-of-format-1.tar.xz"


def listed(*numbers: int, world: int = 3, **changes) -> RunSpec:
    """A run of the documents with these numbers, in this order."""
    documents = make_spec(LENGTHS, world).documents
    return make_spec(LENGTHS, world, documents=tuple(documents[i] for i in numbers), **changes)


def check(folder: Path, *numbers: int) -> list[int]:
    """The run is whole and says of each document what it must; the ranks that did each."""
    assert verify_run(folder).problems == []
    with open_run(folder) as run:
        assert [document.id for document in run.documents] == [f"d{number}" for number in numbers]
        for document in (*run.documents, *run.set_aside):
            number = number_of(document)
            expected = outputs_of(number, LENGTHS[number])
            np.testing.assert_array_equal(document.logprobs, expected["logprobs"])
            np.testing.assert_array_equal(document.token_ids, expected["token_ids"])
            for layer in range(3):
                for found, whole in zip(document.kv(layer, as_torch=True), kv_of(number, layer, LENGTHS[number])):
                    assert found.equal(whole.bfloat16())
        return [document.world_size for document in run.documents]


def cut(*args, **kwargs):
    raise PowerCutError


def test_added_taken_away_reordered_and_by_other_ranks(tmp_path):
    make_run(tmp_path, listed(0, 1))
    shard = RunPaths(tmp_path).shard(0)
    before = shard.read_bytes(), shard.stat().st_ino
    assert start_index(tmp_path, listed(2, 0, 1)).finished == {1, 2}
    assert not RunPaths(tmp_path).summary.exists(), "of the old list"
    make_run(tmp_path, listed(2, 0, 1))
    assert check(tmp_path, 2, 0, 1) == [3, 3, 3]
    assert start_index(tmp_path, listed(3, 2, 0, 1, world=2)).finished == {1, 2, 3}
    make_run(tmp_path, listed(3, 2, 0, 1, world=2))
    assert check(tmp_path, 3, 2, 0, 1) == [2, 3, 3, 3]
    sets = {path.name: len(list(path.iterdir())) for path in RunPaths(tmp_path).shards.iterdir() if path.is_dir()}
    assert sets == {"000001": 3, "000002": 2}
    make_run(tmp_path, listed(0, 3, world=1))
    assert check(tmp_path, 0, 3) == [3, 2]
    with open_run(tmp_path) as run:
        assert {document.id for document in run.set_aside} == {"d1", "d2"}
    assert what_is_deleted(tmp_path).startswith("a run with 2 of 2 documents finished and 2 set aside (")
    make_run(tmp_path, listed(0, 1, 2, 3, world=1))
    assert check(tmp_path, 0, 1, 2, 3) == [3, 3, 3, 2]
    with open_run(tmp_path) as run:
        assert len(run.set_aside) == 0
    assert (shard.read_bytes(), shard.stat().st_ino) == before, "keys and values stay where they are"


def test_the_rest_is_done_by_another_number_of_ranks_and_other_segments(tmp_path):
    make_run(tmp_path, listed(0, 1, 2), stop_after=1)
    for world, segments in ((2, 4), (1, 4), (1, 2)):
        spec = make_spec(LENGTHS[:3], world, segments)
        assert start_index(tmp_path, spec).finished == {0}
    make_run(tmp_path, spec, stop_after=1)
    grid = Grid(tp=2, head_groups=2)
    shared = tuple(replace(document, grid=grid) for document in spec.documents)
    spec = replace(spec, world_size=2, shard_set=ShardSet(world_size=2), documents=shared)
    index = start_index(tmp_path, spec)
    assert index.finished == {0, 1}
    assert [document.grid.tp for document in index.spec.documents] == [1, 1, 2]
    make_run(tmp_path, spec)
    assert check(tmp_path, 0, 1, 2) == [3, 1, 2]
    with open_run(tmp_path) as run:
        assert run.documents[2].spec.heads(1, 2) == (1, 2)


def test_shards_that_hold_nothing_finished_are_deleted(tmp_path):
    index = start_index(tmp_path, listed(0, 1))
    for writer in open_writers(tmp_path, index):
        writer.close()
    assert RunPaths(tmp_path).shard(2).exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmpi.run.folder.delete_shards_but", cut)
        with pytest.raises(PowerCutError):
            start_index(tmp_path, listed(0, 1, world=2))
    assert RunPaths(tmp_path).shard(2).exists()
    start_index(tmp_path, listed(0, 1, world=2))
    assert not list(RunPaths(tmp_path).shards.glob("*.h5"))
    make_run(tmp_path, listed(0, 1, world=2))
    assert check(tmp_path, 0, 1) == [2, 2]


def test_names_may_change_and_twins_are_kept_by_name(tmp_path):
    def named(*names: str) -> RunSpec:
        twin = listed(0).documents[0]
        return replace(listed(0), documents=tuple(replace(twin, id=n, source=f"{n}.txt:0") for n in names))

    make_run(tmp_path, named("a", "b"), stop_after=1)
    assert start_index(tmp_path, named("b", "a")).finished == {1}, "a is finished, and b has the same content"
    assert start_index(tmp_path, named("c")).finished == {0}
    with open_run(tmp_path) as run:
        assert (run.documents[0].id, run.documents[0].source) == ("c", "c.txt:0")


def test_another_text_of_the_same_length_and_name_is_not_taken_for_the_old_one(tmp_path):
    make_run(tmp_path, listed(0, 1))
    spec = listed(0, 1)
    other = replace(spec.documents[0], token_ids_sha256="d" * 64)
    changed = replace(spec, documents=(other, spec.documents[1]))
    assert start_index(tmp_path, changed, keep_finished=True).finished == {1}
    unknown = replace(spec.documents[1], token_ids_sha256="")
    assert start_index(tmp_path, replace(spec, documents=(unknown,)), keep_finished=True).finished == frozenset()


@pytest.mark.parametrize("step", ["lay out", "replace", "delete"])
def test_a_kill_while_the_list_changes_loses_nothing(tmp_path, monkeypatch, step):
    make_run(tmp_path, listed(0, 1))

    places = {"lay out": ("cpmpi.run.index_layout", "_put_results"), "replace": ("os", "replace")}
    module, name = places.get(step, ("cpmpi.run.folder", "delete_shards_but"))
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", cut)
        with pytest.raises(PowerCutError):
            start_index(tmp_path, listed(1, 2, 0, world=2))
    assert [problem for problem in verify_run(tmp_path).problems if "not complete" not in problem] == []
    with open_run(tmp_path) as run:
        assert len(run.documents) == (3 if step == "delete" else 2)
    make_run(tmp_path, listed(1, 2, 0, world=2))
    assert check(tmp_path, 1, 2, 0) == [3, 2, 3]


def test_a_job_under_way_does_not_write_into_a_new_list(tmp_path):
    """Where the file system has no locks: its documents are at other places now."""
    old = start_index(tmp_path, listed(0, 1))
    start_index(tmp_path, listed(1, 0))
    digests = [0] * 3
    for write in (
        lambda: old.write_outputs(0, **outputs_of(0, 50), digests=digests),
        lambda: old.mark_failed(0, "bad"),
    ):
        with pytest.raises(UserError, match="another job has started this run anew"):
            write()


def test_damaged_results_are_not_taken_over(tmp_path):
    make_run(tmp_path, listed(0, 1))
    with open_run(tmp_path) as run:
        offset = run.documents[0].group["logprobs"].id.get_offset()
    with open(RunPaths(tmp_path).index, "r+b") as file:
        file.seek(offset + 9)
        file.write(b"\x55")
    with pytest.raises(UserError, match=r"run\.h5: document 'd0': its outputs do not have the checksum"):
        start_index(tmp_path, listed(1, 0))


@pytest.fixture
def old_runs(tmp_path):
    """Runs of format version 1, as cpmpi made them on three ranks: ``whole``, and ``begun`` with two of three done."""
    shutil.unpack_archive(OLD_RUNS, tmp_path)  # tarfile's filters came with Python 3.11.4
    return tmp_path


def test_runs_of_the_older_format_are_read_checked_and_continued(old_runs):
    assert check(old_runs / "whole", 0, 1, 2) == [3, 3, 3]
    assert verify_run(old_runs / "begun").problems == [
        f"{old_runs}/begun/run.h5: not complete: 2 of 3 documents are finished"
    ]
    with open_run(old_runs / "whole") as run:
        assert run.version == 1
        assert run.documents[0].kv_shape == (3, 50, 2, 4, 3)
        assert repr(run.documents[0]).startswith("<Document 'd0': 50 tokens, perplexity ")
    assert start_index(old_runs / "begun", listed(0, 1, 2, world=2)).finished == {0, 1}
    make_run(old_runs / "begun", listed(0, 1, 2, world=2))
    assert check(old_runs / "begun", 0, 1, 2) == [3, 3, 2]
    make_run(old_runs / "whole", listed(3, 2, 1, 0))
    assert check(old_runs / "whole", 3, 2, 1, 0) == [3, 3, 3, 3]


def test_a_flipped_bit_in_a_run_of_the_older_format(old_runs):
    folder = old_runs / "whole"
    with open_run(folder) as run:
        offset = run.shard(1).document(0).layers[2].value_offset
    shard = RunPaths(folder).shard(1)
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(bytes([shard.read_bytes()[offset] ^ 4]))
    (problem,) = verify_run(folder).problems
    assert "layer 2: value of tokens" in problem
    with open_run(folder) as run:
        run.documents[0].kv(1)
        with pytest.raises(UserError, match=r"rank-00001\.h5: document 'd0': layer 2: value of tokens .* checksum"):
            run.documents[0].kv(2)


def test_documents_of_a_score_run(tmp_path):
    def scored(*numbers: int, world: int) -> RunSpec:
        return listed(*numbers, world=world, kv=None)

    for numbers, world in (((0, 1), 3), ((2, 0, 1), 1), ((1, 0), 2)):
        index = start_index(tmp_path, scored(*numbers, world=world))
        for i in set(range(len(numbers))) - index.finished:
            document: DocumentSpec = index.spec.documents[i]
            index.write_outputs(i, **outputs_of(number_of(document), document.n_tokens))
        index.finish()
    assert verify_run(tmp_path).problems == []
    with open_run(tmp_path) as run:
        assert [document.world_size for document in run.documents] == [3, 3]
        assert [document.world_size for document in run.set_aside] == [1]


@pytest.mark.slow
def test_a_job_adds_a_document_on_another_number_of_ranks(tmp_path):
    save_llama(tmp_path / "model", 2)
    save_documents(tmp_path / "documents", (200, 90))
    first, second = sorted((tmp_path / "documents").iterdir())
    run = ["-m", "cpmpi", "prefill", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")]
    done = mpirun(1, *run, "--input", str(second))
    assert done.returncode == 0, done.stdout
    (tmp_path / "run" / "slurm-1.out").touch()
    with open_run(tmp_path / "run") as before:
        nll, shard = before.documents[0].nll, before.paths.shard(0).stat().st_mtime_ns
    done = mpirun(2, *run, "--input", str(first), "--input", str(second))
    assert done.returncode == 0, done.stdout
    assert "1 of 2 documents are finished already" in done.stdout
    assert verify_run(tmp_path / "run").problems == []
    with open_run(tmp_path / "run") as after:
        assert [document.world_size for document in after.documents] == [2, 1]
        assert after.documents[1].nll == nll
        assert after.paths.shard(0).stat().st_mtime_ns == shard


def saved(folder: Path, index, i: int, layers: int) -> Manifest:
    """A checkpoint of document ``i`` after so many layers, whose KV all ranks' shards have."""
    spec = index.spec
    document, writers = spec.documents[i], open_writers(folder, index)
    for rank, writer in enumerate(writers):
        for layer in range(layers):
            heads = slice(*document.heads(rank, spec.kv.shapes[layer].heads))
            whole = kv_of(number_of(document), layer, document.n_tokens, spec.kv)
            writer.put(i, layer, *(x[held(document, rank), heads] for x in whole))
        writer.sync()
    manifest = Manifest(
        identity=checkpoint.identity_of(spec, document), layer=layers - 1, attention=layers, n_tokens=document.n_tokens,
        shape=(8,), dtype="float32", seconds=1.0, parts=(),
        kv=KVPlace.of(spec, i, [writer.digest(i, layers) for writer in writers]),
    )  # fmt: skip
    for writer in writers:
        writer.close()
    RunPaths(folder).checkpoints.mkdir(exist_ok=True)
    checkpoint.publish(folder, manifest)
    return manifest


def test_shards_that_a_checkpoint_names_stay_as_long_as_it_does(tmp_path):
    manifest = saved(tmp_path, start_index(tmp_path, listed(0, 1)), 1, 2)
    assert Manifest.read(RunPaths(tmp_path).checkpoint(manifest.identity, 1)) == manifest
    for world in (2, 1, 4):  # killed before anything was moved
        index = start_index(tmp_path, listed(1, 0, world=world))
        for writer in open_writers(tmp_path, index):
            writer.close()
        assert len(list(RunPaths(tmp_path).shards.glob("*.h5"))) == 3
    assert [path.name for path in RunPaths(tmp_path).shards.glob("[0-9]*")] == ["000003"]
    assert index.spec.shard_set.number == 3
    start_index(tmp_path, listed(0, world=4))
    assert not list(RunPaths(tmp_path).checkpoints.iterdir()), "nobody asked for its document"
    assert not list(RunPaths(tmp_path).shards.glob("*.h5"))


def test_the_number_of_a_set_that_a_checkpoint_names_is_not_taken(tmp_path):
    make_run(tmp_path, listed(0))
    manifest = saved(tmp_path, start_index(tmp_path, listed(0, 1)), 1, 1)
    assert manifest.kv.shard_set == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmpi.run.checkpoint.delete_others", cut)
        with pytest.raises(PowerCutError):
            start_index(tmp_path, listed(0))  # its run.h5 knows set 0 alone
    assert start_index(tmp_path, listed(1, 0, world=2)).spec.shard_set.number == 2
    assert len(list((RunPaths(tmp_path).shards / "000001").iterdir())) == 3
