"""Full, failing, slow disks: an error on all ranks alike, in one line; nothing wrong is left; the same job goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cpmpi
from cpmpi.comm.ranks import AgreedError, Ranks
from cpmpi.errors import UserError
from cpmpi.run import writer as writer_module
from cpmpi.run.folder import start_index
from cpmpi.run.verify import verify_run
from cpmpi.run.writer import ShardWriter

from .faults import build, faults, make
from .launched import Launched
from .runs import held, kv_of, make_spec, open_writers
from .test_exact import save_llama, shared_folder

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc)")


@pytest.mark.mpi(2)
def test_what_one_rank_cannot_write_all_ranks_learn_of(tmp_path, monkeypatch):
    """From Python, where no launcher ends the others: in the first layer, and in the last."""
    from mpi4py import MPI

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2, layers=5)
        np.save(folder / "a.npy", np.arange(40) % 300)
    comm.Barrier()
    job = {"model": folder / "model", "inputs": folder / "a.npy", "output": folder / "run", "attention": "ring"}
    write = ShardWriter._write
    for layer, number in ((0, errno.EIO), (4, errno.ENOSPC)):

        def fail(self, item, layer=layer, number=number):
            if comm.rank == 1 and item.layer == layer:
                raise OSError(number, os.strerror(number))
            write(self, item)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "_write", fail)
            with pytest.raises(cpmpi.UserError, match=rf"^rank 1/2: \S+/shards/rank-00001.h5: .*{os.strerror(number)}"):
                cpmpi.prefill(**job)
        log = (folder / "run" / "log" / f"rank-{comm.rank:05d}.log").read_text()
        assert ("attention 4 is done" in log) == (layer == 4), "the rest of the document is not computed in vain"
    with cpmpi.prefill(**job) as run:
        assert run.complete
    assert verify_run(folder / "run").problems == []

    def refuse() -> None:
        if comm.rank == 0:
            raise OSError(errno.ESTALE, "Stale file handle", "run.h5")

    for agree in (Ranks(comm).on_root, Ranks(comm).together):
        with pytest.raises(AgreedError, match=r"^(rank 0/2: )?run\.h5: Stale file handle$"):
            agree(refuse)


def test_a_slow_disk_is_told_of_once_while_it_lasts(tmp_path, monkeypatch):
    spec = make_spec((5,), world=1)
    index = start_index(tmp_path, spec)
    (path,) = [writer._path for writer in open_writers(tmp_path, index) if not writer.close()]
    monkeypatch.setattr(writer_module, "SLOW_S", 0.01)
    ready, told = threading.Event(), []
    write = ShardWriter._write
    monkeypatch.setattr(ShardWriter, "_write", lambda self, item: (ready.wait(60), write(self, item)))

    def tell(text):
        told.append(text)
        threading.Timer(0.1, ready.set).start()

    with ShardWriter(path, index.spec, 0, queue_bytes=0, tell=tell) as writer:
        for layer in range(3):
            writer.put(0, layer, *(x[held(spec.documents[0], 0)] for x in kv_of(0, layer, 5)))
            assert bool(told) == (layer > 0), "one layer may wait; computing goes on until then"
            if layer:
                ready.clear()
                threading.Timer(0.1, ready.set).start()
        writer.finish(0)
    size = 5 * 2 * 7 * 4
    assert told == [f"slow disk: computing waits until keys and values of 1 layer ({size} bytes) are written to {path}"]


def test_a_sync_that_failed_for_a_checkpoint_is_not_forgotten(tmp_path, monkeypatch):
    """The kernel tells of it once: another fsync of the file goes well, though bytes are lost."""
    spec = make_spec((5,), world=1)
    index = start_index(tmp_path, spec)
    (path,) = [writer._path for writer in open_writers(tmp_path, index) if not writer.close()]
    ready, write, fsync = threading.Event(), ShardWriter._write, os.fsync

    def fail_once(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ShardWriter, "_write", lambda self, item: (item.layer and ready.wait(60), write(self, item)))
    said = r"rank-00000\.h5: cannot be written \(Input/output error\)"
    with ShardWriter(path, index.spec, 0) as writer:
        for layer in range(2):
            writer.put(0, layer, *(x[held(spec.documents[0], 0)] for x in kv_of(0, layer, 5)))
        monkeypatch.setattr(os, "fsync", fail_once)
        with pytest.raises(UserError, match=said):
            writer.sync(1)
        ready.set()  # a layer that is written well says nothing of that
        while writer._waiting:
            time.sleep(0.001)
        with pytest.raises(UserError, match=said):
            writer.finish(0)
        with pytest.raises(UserError, match=said):
            writer.close()


@pytest.mark.slow
@compiler
@pytest.mark.parametrize(("ranks", "places"), [(2, 0), (1, 40)])
def test_every_call_that_writes_may_fail(ranks, places, tmp_path):
    figures = faults(tmp_path, places, ranks)
    print(figures)
    assert figures.problems == []
    assert figures.places >= (places or 100)
    assert {"open", "write", "pwrite", "fsync", "rename", "unlink", "ftruncate"} >= figures.operations.keys()
    assert {"open", "write", "pwrite", "fsync", "rename"} <= figures.operations.keys()
    assert figures.errors > figures.places / 3


@compiler
def test_some_calls_fail(tmp_path):
    """The short form: one rank, a few places of each kind."""
    figures = faults(tmp_path, 4, ranks=1)
    assert figures.problems == []
    assert figures.errors


def words(folder: Path, run: Path) -> list[str]:
    often = ["--attention", "ring", "--chunk-tokens", "20", "--checkpoint", "0", "--hang-timeout", "4"]
    inputs = [word for i in range(2) for word in ("--input", str(folder / f"{i}.npy"))]
    return ["prefill", "--model", str(folder / "model"), *inputs, "--output", str(run), *often]


@pytest.mark.slow
@compiler
def test_the_command_line_says_one_line_and_a_slow_minute_is_no_error(tmp_path):
    library = str(build(tmp_path))
    make(tmp_path)
    run = (tmp_path / "run").resolve()
    shard = run / "shards" / "rank-00001.h5"
    with Launched(words(tmp_path, tmp_path / "whole"), tmp_path / "out") as job:
        assert job.end() == (0, []), job.said()
    fault = {"LD_PRELOAD": library, "CPMPI_FAULT_FOLDER": str(run)}
    with Launched(
        words(tmp_path, run), tmp_path / "out", **fault, CPMPI_FAULT=f"pwrite 5 {errno.EIO} 1 0 {shard}"
    ) as job:
        status, left = job.end()
        errors = re.findall("^.*error.*$", job.said(), re.MULTILINE)
    assert (status, left) == (1, [])
    assert [re.sub("; start.*", "", line) for line in errors] == [
        f"error: rank 1/2: {shard}: cannot be written (Input/output error)"
    ]
    # Every write of a layer takes so long that the disk is slow for a minute in all: no error, and no hang.
    with Launched(words(tmp_path, run), tmp_path / "out", **fault, CPMPI_FAULT=f"pwrite 0 0 0 2500000 {shard}") as job:
        assert job.end(300) == (0, []), job.said()
        assert "waiting for rank 1 on" in job.said(), job.said()
        assert "which waits for its disk" in job.said(), job.said()
    assert "slow disk: computing waits until keys and values of 1 layer" in (run / "log/rank-00001.log").read_text()
    assert "error" not in job.said()
    with cpmpi.open_run(run) as opened, cpmpi.open_run(tmp_path / "whole") as whole:
        for a, b in zip(opened.documents, whole.documents, strict=True):
            np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert verify_run(run).problems == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_in_the_middle(small_disk, tmp_path):
    from .tiny_models import VOCABULARY, save_tiny, tiny_config

    save_tiny(tmp_path / "model", tiny_config("llama", num_hidden_layers=8, max_position_embeddings=8192))
    for i, n in enumerate((1000, 4000)):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).integers(3, VOCABULARY, n))
    line = [word if word != "20" else "100" for word in words(tmp_path, small_disk / "run")]
    with Launched(words(tmp_path, tmp_path / "whole"), tmp_path / "out") as job:
        assert job.end() == (0, []), job.said()
    filler = small_disk / "filler"

    def fill() -> bool:
        """Once the first document is done and the second has begun, somebody else takes the room that is left."""
        log = small_disk / "run" / "log" / "rank-00001.log"
        if not (log.exists() and "document 1: attention 0 is done" in log.read_text()):
            return False
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        return True

    with Launched(line, tmp_path / "out") as job:
        job.wait_until(fill)
        status, left = job.end()
        errors = re.findall("^error: .*$", job.said(), re.MULTILINE)
    assert (status, left) == (1, [])
    assert len(errors) == 1, job.said()
    said = (
        r"error: (rank \d/2: )?\S+rank-0000\d\.h5: no space left \(No space left on device\): .* \((\d+) bytes\) of it "
    )
    match = re.match(
        said + r"are still to be written, .* \((\d+) bytes\) are free; make room and start the same", errors[0]
    )
    assert match, errors
    assert int(match[2]) > int(match[3])
    with cpmpi.open_run(small_disk / "run") as run:
        assert [document.complete for document in run.documents] == [True, False]
    assert all("not complete: " in problem for problem in verify_run(small_disk / "run").problems)
    filler.unlink()
    with Launched(line, tmp_path / "out") as job:
        assert job.end() == (0, []), job.said()
        assert "1 of 2 documents are finished already" in job.said()
    with cpmpi.open_run(small_disk / "run") as run, cpmpi.open_run(tmp_path / "whole") as whole:
        for a, b in zip(run.documents, whole.documents, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert verify_run(small_disk / "run").problems == []
