"""run.h5: outputs, resuming, refusing, and surviving SIGKILL at any moment."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from cpmpi import open_run
from cpmpi.attention.layout import Layout
from cpmpi.errors import UserError
from cpmpi.run import checkpoint
from cpmpi.run.folder import check_room, delete_run, start_index
from cpmpi.run.index import create_index
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.spec import DocumentSpec, KVSpec, checkpoint_bytes, index_bytes, shard_bytes
from cpmpi.run.spec import check_room as check_free
from cpmpi.run.verify import verify_run
from cpmpi.text import human_bytes
from tests.runs import KV, make_run, make_spec, open_writers, outputs_of, write_document

KILL_LENGTHS = tuple(range(1, 17))


def test_the_contract(tmp_path):
    """The attributes and datasets of docs/run-folder.md, read with plain h5py."""
    spec = make_run(tmp_path / "run")
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert file.attrs["format"] == "cpmpi-run"
        assert file.attrs["format_version"] == 2
        assert file.attrs["cpmpi_version"] == spec.version
        for name in ("model", "model_sha256", "tokenizer_sha256", "dtype", "world_size", "topology", "command"):
            assert file.attrs[name] == getattr(spec, name)
        assert file.attrs["complete"].dtype == np.bool_
        assert file.attrs["complete"]
        assert [name.decode() for name in file["shards/000000/name"][:]] == [
            f"shards/rank-{r:05d}.h5" for r in range(3)
        ]
        group = file["documents/000001"]
        assert group.attrs["id"] == "d1"
        assert group.attrs["source"] == "corpus.jsonl:1"
        assert group.attrs["n_tokens"] == 2
        assert group.attrs["complete"]
        expected = outputs_of(1, 2)
        for name, values in expected.items():
            np.testing.assert_array_equal(group[name][:], values)
            assert group[name].dtype == values.dtype
        assert group.attrs["nll"] == -expected["logprobs"][1]
        assert group.attrs["perplexity"] == np.exp(group.attrs["nll"])
        for name, dim in (("key", 4), ("value", 3)):
            dataset = file[f"documents/000000/kv/{name}"]
            assert dataset.shape == (3, 50, 2, dim)
            assert dataset.is_virtual
            assert [label.label for label in dataset.dims] == ["layer", "token", "head", "dim"]


def test_summary_is_a_line_per_document(tmp_path):
    make_run(tmp_path)
    with open(tmp_path / "summary.csv", newline="") as file, h5py.File(tmp_path / "run.h5") as run:
        lines = list(csv.DictReader(file))
        assert [line["id"] for line in lines] == ["d0", "d1", "d2"]
        for i, line in enumerate(lines):
            assert float(line["nll"]) == run[f"documents/{i:06d}"].attrs["nll"]


def test_summary_quotes_what_csv_must_quote(tmp_path):
    spec = make_spec((5,), world=1, kv=None)
    named = replace(spec.documents[0], id='a, "b"\nc', source="Ünïcode, too.txt")
    make_run(tmp_path, replace(spec, documents=(named,)))
    with open(tmp_path / "summary.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["id"], line["source"]) == (named.id, named.source)


def test_without_kv_there_are_no_shards(tmp_path):
    spec = make_spec(kv=None)
    index = start_index(tmp_path, spec)
    for i, document in enumerate(spec.documents):
        index.write_outputs(i, **outputs_of(i, document.n_tokens))
    index.finish()
    assert not RunPaths(tmp_path).shards.exists()
    assert verify_run(tmp_path).problems == []
    with open_run(tmp_path) as run:
        assert run.kv_dtype is None
        with pytest.raises(UserError, match="keeps no KV"):
            run.documents[0].kv(0)


def test_one_token_has_no_perplexity(tmp_path):
    make_run(tmp_path, make_spec((1,)))
    assert verify_run(tmp_path).problems == []
    with open_run(tmp_path) as run:
        assert run.documents[0].nll == 0
        assert np.isnan(run.documents[0].perplexity)


def test_large_attributes(tmp_path):
    """A topology of a large machine exceeds the 64 KiB that HDF5 gives an attribute itself."""
    spec = make_spec(topology='"' + "x" * (1 << 20) + '"')
    make_run(tmp_path, spec)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file.attrs["topology"] == spec.topology


def test_estimates_are_upper_bounds_and_not_wild(tmp_path):
    spec = make_spec((4000, 2, 700), world=4, segments=8, kv=KVSpec.alike(layers=3, heads=16, key_dim=64, value_dim=3))
    make_run(tmp_path, spec)
    for rank in range(4):
        size = RunPaths(tmp_path).shard(rank).stat().st_size
        assert size <= shard_bytes(spec, rank) <= size + (200 << 10)
    size = RunPaths(tmp_path).index.stat().st_size
    assert size <= index_bytes(spec) <= size + (300 << 10)


def test_no_room(tmp_path):
    check_free(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(
        UserError, match=r"run: the run needs 1000000 TB \(10{18} bytes\), but .* \(\d+ bytes\) free; choose"
    ):
        check_free(tmp_path / "run", 10**18)


def test_what_is_written_needs_no_room(tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr("cpmpi.run.folder.check_free", lambda folder, count, checkpoints: needed.append(count))
    spec = make_spec((4000, 300), world=2, kv=KVSpec.alike(layers=3, heads=16, key_dim=64, value_dim=3))
    kv_bytes = 4000 * spec.kv.bytes_per_token
    check_room(tmp_path, spec)
    make_run(tmp_path, spec, stop_after=1)
    check_room(tmp_path, spec)
    check_room(tmp_path, make_spec((4000, 300), world=1, kv=spec.kv))
    check_room(tmp_path, spec, overwrite=True)
    new, same, by_one_rank, anew = needed
    assert new > kv_bytes
    assert same < new - kv_bytes
    assert by_one_rank < new - kv_bytes
    assert anew == same


def test_room_for_checkpoints(tmp_path):
    """The next one beside the last, of the longest document that is left; those that are there need no more."""
    spec = make_spec((4000, 300), world=2, kv=None)
    none, some = check_room(tmp_path, spec), check_room(tmp_path, spec, hidden_bytes=1000)
    assert none == f"disk: {human_bytes(index_bytes(spec))} to be written"
    assert some == (
        f"disk: {human_bytes(index_bytes(spec) + checkpoint_bytes(spec, 1000))} to be written, "
        f"{human_bytes(checkpoint_bytes(spec, 1000))} of it for checkpoints"
    )
    assert 2 * 4000 * 1000 < checkpoint_bytes(spec, 1000) < 2.1 * 4000 * 1000
    index = start_index(tmp_path, spec)
    (tmp_path / "checkpoints").mkdir()
    saved = RunPaths(tmp_path).checkpoint_part(checkpoint.identity_of(spec, spec.documents[0]), 1, 0)
    saved.write_bytes(b"0" * 4_000_000)
    left = check_room(tmp_path, spec, hidden_bytes=1000)
    assert re.search(r"([\d.]+ MB) of it for checkpoints", left)[1] == human_bytes(
        checkpoint_bytes(spec, 1000) - saved.stat().st_blocks * 512
    )
    assert check_room(tmp_path, spec, hidden_bytes=1000, overwrite=True).endswith(some.split(",")[1])
    index.write_outputs(0, **outputs_of(0, 4000))
    assert "of it" not in check_room(tmp_path, spec, hidden_bytes=1000), "that of the short one has room enough"
    with pytest.raises(UserError, match=r"needs .*, 1000000 TB of it for checkpoints, but .* --checkpoint off, or"):
        check_free(tmp_path, 2 * 10**18, 10**18)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (131e9, "131 GB"), (2e15, "2000 TB"), (999999, "1000 kB")],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_resume_does_the_rest_only(tmp_path):
    spec = make_run(tmp_path, make_spec(), stop_after=1)
    index = start_index(tmp_path, make_spec())
    assert index.finished == {0}
    assert index.spec.run_id == spec.run_id, "not laid out anew"
    assert not RunPaths(tmp_path).summary.exists()
    make_run(tmp_path, make_spec())
    assert verify_run(tmp_path).problems == []
    before = RunPaths(tmp_path).index.read_bytes()
    make_run(tmp_path, make_spec())
    assert RunPaths(tmp_path).index.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model_sha256": "c" * 64}, "holds a run with model_sha256 aaaa.* this one has c+"),
        ({"tokenizer_sha256": "c" * 64}, "tokenizer_sha256 bbbb.* this one has c+"),
        ({"dtype": "bfloat16"}, "dtype float32, this one has bfloat16"),
        ({"kv": None}, "kv_dtype bfloat16, this one has none"),
        ({"kv": replace(KV, dtype="float32")}, "kv_dtype bfloat16, this one has float32"),
        ({"hidden_size": 9}, "hidden_size 8, this one has 9"),
    ],
)
def test_another_run_is_refused(tmp_path, other, message):
    make_run(tmp_path, stop_after=1)
    deletes = r"--overwrite, which deletes a run with 1 of 3 documents finished \(\d+ kB\)"
    with pytest.raises(UserError, match=f"{message}; choose another --output, or {deletes}"):
        start_index(tmp_path, make_spec(**other))
    assert start_index(tmp_path, make_spec(**other), overwrite=True).finished == frozenset()
    assert not RunPaths(tmp_path).shards.exists()


def test_folders_that_are_no_run(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").touch()
    (folder / "summary.csv").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis: holds summary\.csv, which a run would replace; choose another"):
            start_index(folder, make_spec(), overwrite=overwrite)
        with pytest.raises(UserError, match="is a file, not a folder"):
            start_index(folder / "chapter.tex", make_spec(), overwrite=overwrite)
    other = tmp_path / "other"
    (other / "run.h5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run\.h5: is not a file"):
        start_index(other, make_spec(), overwrite=True)
    (other / "run.h5").rmdir()
    (other / "run.h5").write_text("a diary")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"run\.h5: is not a run's, or damaged beyond reading"):
            start_index(other, make_spec(), overwrite=overwrite)
    with h5py.File(other / "run.h5", "w") as file:
        file.attrs["format"] = "something"
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"run\.h5: is not a run's \(format 'something'"):
            start_index(other, make_spec(), overwrite=overwrite)
    with h5py.File(other / "run.h5", "a") as file:
        file.attrs["format"] = "cpmpi-run"
        file.attrs["format_version"] = 99
    with pytest.raises(UserError, match="format 'cpmpi-run' version 99, expected 'cpmpi-run' 2"):
        start_index(other, make_spec())


def test_a_run_without_its_index_is_not_begun_anew_without_a_word(tmp_path):
    make_run(tmp_path)
    index = RunPaths(tmp_path).index
    kept = index.read_bytes()
    for damage, message in (
        (
            index.unlink,
            r"holds shards/rank-00000\.h5, .*summary\.csv, but no run\.h5, .*or --overwrite, which deletes them",
        ),
        (lambda: index.write_bytes(kept[:5000]), r"run\.h5: has 5000 bytes, but was laid out with .*or --overwrite"),
        (lambda: index.write_bytes(kept[:4200] + b"x" + kept[4201:]), r"run\.h5: damaged: .*or --overwrite"),
    ):
        damage()
        with pytest.raises(UserError, match=message):
            start_index(tmp_path, make_spec())
        assert RunPaths(tmp_path).shard(2).exists()
    assert start_index(tmp_path, make_spec(), overwrite=True).finished == frozenset()
    assert not RunPaths(tmp_path).shards.exists()


def test_what_a_killed_start_leaves_behind_is_no_obstacle(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "job-17.out").touch()
    (tmp_path / "run.h5.tmp").write_text("half")
    make_run(tmp_path)
    assert verify_run(tmp_path).problems == []
    delete_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_other_files_in_the_folder_are_no_obstacle_and_stay(tmp_path):
    names = ["notes.txt", "slurm-1.out", ".nfs0001", "shards/other.h5", "report/mine.png", "checkpoints/a.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    make_run(tmp_path, stop_after=1)
    make_run(tmp_path)
    assert verify_run(tmp_path).problems == []
    start_index(tmp_path, make_spec(), overwrite=True)
    assert all((tmp_path / name).exists() for name in names)
    assert not RunPaths(tmp_path).shard(0).exists()


def test_a_shard_that_changed_its_size_stops_a_resume(tmp_path):
    spec = make_run(tmp_path, stop_after=1)
    index = start_index(tmp_path, spec)
    with pytest.raises(
        UserError, match=r"rank-00001\.h5: has 5 bytes, but the run recorded \d+: truncated or replaced"
    ):
        index.write_manifest([RunPaths(tmp_path).shard(0).stat().st_size, 5, 6])


def test_one_writer_at_a_time(tmp_path):
    code = "import sys, pathlib, cpmpi.run.lock as f; f.only_writer(pathlib.Path(sys.argv[1])).__enter__()"
    other = [sys.executable, "-c", code, str(tmp_path)]
    with only_writer(tmp_path):
        done = subprocess.run(other, capture_output=True, text=True, check=False)
        assert "HeldError: " in done.stderr
        assert "another process is writing this run" in done.stderr
    subprocess.run(other, check=True)


def test_a_job_does_not_write_into_a_run_that_another_began_anew(tmp_path):
    spec = make_spec()
    index = start_index(tmp_path, spec)
    start_index(tmp_path, replace(make_spec(), run_id="another"), overwrite=True)
    with pytest.raises(UserError, match="another job has started this run anew"):
        index.write_outputs(0, **outputs_of(0, spec.documents[0].n_tokens), digests=[0] * spec.world_size)


def test_outputs_that_cannot_be_right(tmp_path):
    index = start_index(tmp_path, make_spec(kv=None))
    good = outputs_of(0, 50)
    logprobs = good["logprobs"].copy()
    logprobs[[17, 20]] = np.nan, -np.inf
    with pytest.raises(
        UserError, match=r"document 'd0' \(corpus.jsonl:0\): 2 log-prob.* not finite, the first at token 17"
    ):
        index.write_outputs(0, **{**good, "logprobs": logprobs})
    with pytest.raises(UserError, match="last hidden state is not finite"):
        index.write_outputs(0, **{**good, "last_hidden": np.full(8, np.inf)})
    with pytest.raises(UserError, match="its token ids have SHA-256"):
        index.write_outputs(0, **{**good, "token_ids": good["token_ids"] + 1})
    assert index.finished == frozenset()


def test_specs_that_cannot_be_run():
    with pytest.raises(UserError, match=r"ids must differ, .*'d0'"):
        make_spec(documents=make_spec((5,)).documents * 2)
    with pytest.raises(UserError, match="there are no documents"):
        make_spec(())
    with pytest.raises(UserError, match=r"document 'e' \(e.txt\) has no tokens"):
        DocumentSpec(id="e", source="e.txt", n_tokens=0, layout=Layout(n_tokens=0, world=1))


def test_an_unfinished_document_reads_as_nothing_known(tmp_path):
    create_index(tmp_path, make_spec())
    with h5py.File(tmp_path / "run.h5") as file:
        group = file["documents/000000"]
        assert np.isnan(group["logprobs"][:]).all()
        assert np.isnan(group.attrs["nll"])
        assert (group["token_ids"][:] == -1).all()
        assert np.isnan(group["kv/key"][:]).all(), "shards that do not exist must not read as numbers"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot make this folder \(Not a directory\)"):
        create_index(tmp_path / "file" / "run", make_spec())
    (tmp_path / "run.h5.tmp").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match=r"run\.h5: cannot be laid out \("):
        create_index(tmp_path, make_spec())


def work_until_killed(folder: Path, progress: int) -> None:
    """In a child process: make runs, one after another, each resumed where it stopped, on one to three ranks.

    A byte a step tells how far it is.
    """
    while True:
        index = start_index(folder, make_spec(KILL_LENGTHS, world=1 + os.getpid() % 3, segments=2))
        os.write(progress, b".")
        writers = open_writers(folder, index)
        os.write(progress, b".")
        for i in range(len(KILL_LENGTHS)):
            if i not in index.finished:
                write_document(index, writers, i)
                os.write(progress, b".")
        index.finish()
        folder.rename(folder.parent / f"whole-{time.monotonic_ns()}")


def kill_at_random(folder: Path, chance: random.Random) -> None:
    """Start a child that works, and SIGKILL it a few steps later, at any moment of the next step."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work_until_killed(folder, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    began = time.perf_counter()
    steps = chance.randrange(7)
    for _ in range(steps):
        os.read(read_end, 1)
    step_s = (time.perf_counter() - began) / max(1, steps)
    time.sleep(chance.uniform(0, min(2 * step_s, 0.1)) if steps else chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.close(read_end)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child must die of the signal, not of an error"


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_kill_9_at_any_moment(tmp_path):
    """After each of 22 kills the file opens, finished documents are intact, and none is lost."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    folder = tmp_path / "run"
    finished: set[int] = set()
    kills_between_documents = n_whole = 0
    for _ in range(22):
        kill_at_random(folder, chance)
        whole = list(tmp_path.glob("whole-*"))
        if len(whole) > n_whole:
            n_whole, finished = len(whole), set()
            assert all(verify_run(path).problems == [] for path in whole)
        if not RunPaths(folder).index.exists():
            assert not finished
            continue
        assert [problem for problem in verify_run(folder).problems if "not complete" not in problem] == []
        with open_run(folder) as run:
            now = {document.index for document in run.documents if document.complete}
            for i in now:
                np.testing.assert_array_equal(run.documents[i].logprobs, outputs_of(i, KILL_LENGTHS[i])["logprobs"])
        assert finished <= now, "a finished document was lost"
        kills_between_documents += 0 < len(now) < len(KILL_LENGTHS)
        finished = now
    assert kills_between_documents >= 5
    make_run(folder, make_spec(KILL_LENGTHS, world=2, segments=2))
    assert verify_run(folder).problems == []
