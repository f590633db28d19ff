"""`verify --repair` computes again what is damaged, and only that; afterwards the run is what it was, to the bit."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from cpmpi import open_run
from cpmpi.errors import UserError
from cpmpi.jobs import verify
from cpmpi.run.paths import RunPaths
from cpmpi.run.verify import verify_run
from tests.test_damage import said_of
from tests.test_exact import save_llama, shared_folder

LAYERS, LENGTHS = 4, {"a": 150, "b": 90}
OPTIONS = {"chunk_tokens": 32, "segments": 3, "checkpoint": "off"}


def flip(path, offset, bit=0):
    with open(path, "r+b") as raw:
        byte = os.pread(raw.fileno(), 1, offset)[0]
        os.pwrite(raw.fileno(), bytes([byte ^ 1 << bit]), offset)


def place_of(folder, document=0, rank=0):
    with open_run(folder) as run:
        return run.shard(rank).document(document)


def output_offset(folder, document, name):
    with open_run(folder) as run:
        return run.documents[document].group[name].id.get_offset()


def attribute_offset(folder, name):
    """Where the attribute of the first document has its value."""
    from cpmpi.run.hdf5 import changed_file, set_attribute

    index = RunPaths(folder).index
    before = index.read_bytes()
    with open_run(folder) as run:
        value = run.documents[0].group.attrs[name]
    with changed_file(index) as file:
        set_attribute(file["documents/000000"], name, not value if isinstance(value, np.bool_) else value + 1)
    after = index.read_bytes()
    index.write_bytes(before)
    return next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)


# How a run is damaged, given its folder; returns how many layers of each document are computed again.
def a_key(folder):
    flip(RunPaths(folder).shard(0), place_of(folder).layers[1].key_offset + 7)
    return (2,)


def values_of_two_layers(folder):
    for layer in (0, 2):
        flip(RunPaths(folder).shard(0), place_of(folder).layers[layer].value_offset + 100, 6)
    return (3,)


def a_checksum(folder):
    flip(RunPaths(folder).shard(0), place_of(folder).checksum_offset + 3)
    return (LAYERS,)


def a_marker(folder):
    flip(RunPaths(folder).shard(0), place_of(folder).layer_done_offset + 1)
    return (2,)


def the_structure(folder):
    flip(RunPaths(folder).shard(0), 4096 + 40)
    return ()


def a_shard_that_is_cut_off(folder):
    place = place_of(folder)
    os.truncate(RunPaths(folder).shard(0), place.layers[2].key_offset + 10)
    return (LAYERS, LAYERS)


def a_shard_that_is_gone(folder):
    RunPaths(folder).shard(0).unlink()
    return (LAYERS, LAYERS)


def a_log_probability(folder):
    flip(RunPaths(folder).index, output_offset(folder, 0, "logprobs") + 41)
    return (LAYERS,)


def the_last_hidden_state(folder):
    flip(RunPaths(folder).index, output_offset(folder, 0, "last_hidden") + 41)
    return (LAYERS,)


def the_nll(folder):
    flip(RunPaths(folder).index, attribute_offset(folder, "nll"))
    return (LAYERS,)


def what_is_complete(folder):
    flip(RunPaths(folder).index, attribute_offset(folder, "complete"))
    return ()


def what_is_complete_beyond_reading(folder):
    flip(RunPaths(folder).index, attribute_offset(folder, "complete"), 5)
    return ()


def the_summary(folder):
    flip(RunPaths(folder).summary, 30)
    return ()


DAMAGES = [
    a_key, values_of_two_layers, a_checksum, a_marker, the_structure, a_shard_that_is_cut_off, a_shard_that_is_gone,
    a_log_probability, the_last_hidden_state, the_nll, what_is_complete, what_is_complete_beyond_reading, the_summary,
]  # fmt: skip

FEW = [a_shard_that_is_cut_off, a_log_probability, what_is_complete]


def prefill(folder, output, **more):
    import cpmpi

    inputs = [folder / f"{name}.npy" for name in LENGTHS]
    cpmpi.prefill(model=folder / "model", inputs=inputs, output=folder / output, **(OPTIONS | more)).close()


def repaired(folder, comm, **more):
    """Repair on the ranks of ``comm``; what is left, and how many layers of each document went through the model."""
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.engine.repair import repair
    from cpmpi.engine.score import Engine

    gather, computed = Engine._gather_keys, []

    def note(engine, way, layer, calls):
        computed.append(layer)
        return gather(engine, way, layer, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_gather_keys", note)
        found = repair(folder, more.get("model"), Ranks(comm), Progress(enabled=False))
    return found.problems, computed


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in RunPaths(folder).contents() if p.name != "status.json"}


@pytest.fixture
def made(tmp_path):
    """A run of this test's ranks, on all of them."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2, LAYERS)
        for name, length in LENGTHS.items():
            np.save(folder / f"{name}.npy", np.random.default_rng(length).integers(3, 90, length))
    comm.Barrier()
    prefill(folder, "run")
    comm.Barrier()
    return folder


@pytest.mark.mpi(2)
@pytest.mark.parametrize("damages", [FEW, pytest.param(DAMAGES, marks=pytest.mark.slow)])
def test_every_damage_is_repaired_to_the_bit(made, damages):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    run, whole = made / "run", bytes_of(made / "run")
    for damage in damages:
        layers = comm.bcast(damage(run) if comm.rank == 0 else None)
        if comm.rank == 0:
            assert said_of(run), damage.__name__
        problems, computed = repaired(run, comm)
        assert problems == [], damage.__name__
        assert computed == [layer for count in layers for layer in range(count)], (
            f"{damage.__name__}: only what is damaged"
        )
        if comm.rank == 0:
            differ = [str(path) for path, data in bytes_of(run).items() if data != whole[path]]
            assert differ == [], damage.__name__
        comm.Barrier()


@pytest.mark.slow
@pytest.mark.mpi(2)
def test_on_another_number_of_ranks_it_is_right_within_rounding(made):
    """One rank repairs what two made, and two what one made with other segments; the rest stays as it is."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    run = made / "run"
    if comm.rank == 0:
        with open_run(run) as before:
            layers = [before.documents[0].kv(layer) for layer in range(LAYERS)]
            logprobs = before.documents[0].logprobs
        a_key(run)
        flip(RunPaths(run).shard(1), place_of(run, rank=1).layers[2].value_offset)
        a_log_probability(run)
        problems, computed = repaired(run, MPI.COMM_SELF)
        assert problems == []
        assert computed == list(range(LAYERS))
        with open_run(run) as after:
            np.testing.assert_allclose(after.documents[0].logprobs, logprobs, atol=1e-4)
            for layer, pair in enumerate(layers):
                for then, now in zip(pair, after.documents[0].kv(layer)):
                    if layer in (0, 3):
                        np.testing.assert_array_equal(now, then)
                    np.testing.assert_allclose(now, then, rtol=2**-7, atol=1e-2)
        assert repaired(run, MPI.COMM_SELF) == ([], []), "nothing is left to do"
    comm.Barrier()


@pytest.mark.mpi(2)
def test_heads_that_two_ranks_held_are_repaired_by_one_that_has_all(made, monkeypatch):
    """Whoever wrote into a shard syncs it, before rank 0 records its checksums: it may be on another node."""
    from mpi4py import MPI

    from cpmpi.run import mend

    comm, run, synced = MPI.COMM_WORLD, made / "shared", []
    fsync, write_tables = os.fsync, mend.write_tables

    def record(shard, number, layers):
        assert os.path.realpath(shard.path) in synced
        return write_tables(shard, number, layers)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(mend, "write_tables", record)
    prefill(made, "shared", tp=2)
    comm.Barrier()
    if comm.rank == 0:
        with open_run(run) as before:
            layers = [before.documents[0].kv(layer) for layer in range(LAYERS)]
        for rank in range(2):
            at = place_of(run, rank=rank).layers[1]
            flip(RunPaths(run).shard(rank), at.key_offset + 7)
            flip(RunPaths(run).shard(rank), at.value_offset + 7)
        synced.clear()
        assert repaired(run, MPI.COMM_SELF)[0] == []
        with open_run(run) as after:
            for layer, pair in enumerate(layers):
                for then, now in zip(pair, after.documents[0].kv(layer)):
                    np.testing.assert_allclose(now, then, rtol=2**-7, atol=1e-2)
    comm.Barrier()


@pytest.mark.slow
@pytest.mark.mpi(1)
def test_a_kill_in_the_middle_of_a_repair_loses_nothing(made):
    """At each step that writes; the same command goes on, and in the end all is as it was."""
    from mpi4py import MPI

    class KilledError(BaseException):
        pass

    def die(*_args, **_kwargs):
        raise KilledError

    steps = {
        "cpmpi.run.mend.create_shard": the_structure, "cpmpi.run.mend._copy_places": the_structure,
        "cpmpi.run.mend.os.replace": a_shard_that_is_cut_off, "cpmpi.run.mend.write_datasets": a_shard_that_is_gone,
        "cpmpi.engine.repair.Mender.keep": a_key, "cpmpi.engine.repair.Mender.sync": values_of_two_layers,
        "cpmpi.run.mend.layer_checksums": a_key, "cpmpi.run.mend.pwrite_all": a_checksum,
        "cpmpi.engine.repair.write_datasets": the_nll, "cpmpi.engine.repair.write_results": a_log_probability,
        "cpmpi.run.mend.publish_text": the_summary,
    }  # fmt: skip
    run, whole = made / "run", bytes_of(made / "run")
    for step, damage in steps.items():
        damage(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, die)
            with pytest.raises(KilledError):
                repaired(run, MPI.COMM_WORLD)
        assert repaired(run, MPI.COMM_WORLD)[0] == [], step
        assert not (run / "repair").exists()
        assert bytes_of(run) == whole, step


@pytest.mark.mpi(1)
def test_what_cannot_be_repaired_is_said(made, capsys):
    from mpi4py import MPI

    run, comm = made / "run", MPI.COMM_WORLD
    shutil.copytree(run, made / "copy")
    flip(RunPaths(made / "copy").index, 5000)
    with pytest.raises(UserError, match=r"run\.h5: damaged: its structure"):
        repaired(made / "copy", comm)
    flip(RunPaths(run).index, output_offset(run, 1, "token_ids"))
    problems, computed = repaired(run, comm)
    assert problems == [f"{run}/run.h5: not complete: 1 of 2 documents are finished"]
    assert computed == []
    prefill(made, "run")
    assert verify_run(run).problems == [], "the job that made it does it again"
    a_key(run)
    shutil.move(made / "model", made / "moved")
    with pytest.raises(
        UserError, match=r"the checkpoint that made this run is not at .*/model any more; .*--model DIR"
    ):
        repaired(run, comm)
    save_llama(made / "other", 1, LAYERS)
    with pytest.raises(UserError, match=r"its model has the digest .*model\.safetensors has changed"):
        repaired(run, comm, model=made / "other")
    said = CliRunner().invoke(verify.command, [str(run), "--repair", "--model", str(made / "moved")])
    assert (said.exit_code, said.stdout) == (0, f"{run}: ok (2 documents, 1 shard, {said.stdout.split(', ')[-1]}")
    assert "a.npy: layers 1 of rank 0 computed again; " in said.stderr
    assert "written as they were, bit for bit" in said.stderr
    assert "come out with other bytes" not in said.stderr
    with pytest.raises(UserError, match="--model is for --repair"):
        verify.command.main([str(run), "--model", "x"], standalone_mode=False)
