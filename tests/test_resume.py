"""A document goes on after the layer that was saved: the result is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .families import FAMILIES
from .test_exact import shared_folder
from .tiny_models import VOCABULARY, save_tiny, tiny_config

N_TOKENS = 150
FEW = {
    "Llama 3": {"keep_kv": True, "weights": "stream"},
    "Gemma 2": {"keep_kv": True, "tp": 2},  # windows and soft caps
    "GPT-2": {},  # learned positions
    "Mixtral": {"weights": "stream"},  # experts
    "Gemma 4": {"attention": "tree"},  # inputs of every layer
}
STOP_AT = 2  # a signal comes while this attention is computed: layers 0 to 2 are done at the next one


def save_document(path, n_tokens=N_TOKENS):
    np.save(path, np.random.default_rng(n_tokens).integers(3, VOCABULARY, n_tokens))


def options_of(folder, output, **own):
    from cpmpi.engine.options import JobOptions

    given = {"keep_kv": False, "kv_dtype": "float32", "chunk_tokens": 20, "quiet": True, "attention": "ring"}
    given |= {"inputs": (str(folder / "d.npy"),), "allow_longer": True, **own}
    return JobOptions(model=folder / "model", output=folder / output, **given)


def run_stopped(options, at=STOP_AT, rank=-1, comm=None):
    """Run a job, on the ranks of ``comm`` where given, of which one rank, by default the last, is asked to stop while
    attention ``at`` is computed.

    Returns:
        What the job says when it stops.
    """
    import signal

    from mpi4py import MPI

    from cpmpi.comm.ranks import Ranks
    from cpmpi.comm.stop import listening
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared
    from cpmpi.engine.score import Engine
    from cpmpi.errors import Stopped

    comm = MPI.COMM_WORLD if comm is None else comm
    asked = rank % comm.size
    gather = Engine._gather_keys

    def gather_and_signal(engine, way, layer, calls):
        if layer == at and engine.rank == asked:
            signal.raise_signal(signal.SIGTERM)
        return gather(engine, way, layer, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_gather_keys", gather_and_signal)
        with pytest.raises(Stopped) as stopped, listening(options.grace) as stop:
            run_prepared(prepare(options, Ranks(comm)), stop)
    return str(stopped.value)


def run_counted(options, comm=None):
    """Run a job, on the ranks of ``comm`` where given; the attentions that it computed, and the weights it read."""
    from mpi4py import MPI

    from cpmpi.comm.ranks import Ranks
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared
    from cpmpi.engine.score import Engine
    from cpmpi.model.weight_reader import WeightReader

    computed, weights = [], []
    read = WeightReader.read

    def note(reader, groups):
        weights.extend(name for group in groups for name in group.targets)
        return read(reader, groups)

    gather = Engine._gather_keys

    def count(engine, way, layer, calls):
        computed.append(layer)
        return gather(engine, way, layer, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_gather_keys", count)
        patch.setattr(WeightReader, "read", note)
        run_prepared(prepare(options, Ranks(MPI.COMM_WORLD if comm is None else comm)))
    return computed, weights


def same(one, two):
    """Assert that two runs hold the same numbers."""
    import cpmpi

    with cpmpi.open_run(one) as a, cpmpi.open_run(two) as b:
        assert a.complete
        assert b.complete
        for x, y in zip(a.documents, b.documents, strict=True):
            np.testing.assert_array_equal(x.logprobs, y.logprobs)
            np.testing.assert_array_equal(x.group["last_hidden"][:], y.group["last_hidden"][:])
            assert x.nll == y.nll
            if a.kv_dtype is not None:
                for layer in range(x.group["kv/key"].shape[0]):
                    for got, want in zip(x.kv(layer), y.kv(layer), strict=True):
                        np.testing.assert_array_equal(got, want)


def check_family(folder, family, **own):
    """Stopped and gone on, a family's document is what it is undisturbed."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.rank == 0:
        folder.mkdir()
        save_tiny(folder / "model", tiny_config(family.model_type, **family.own))
        save_document(folder / "d.npy")
    comm.Barrier()
    whole, _ = run_counted(options_of(folder, "whole", **own))
    per_layer = 2 if family.model_type == "diffllama" else 1
    said = run_stopped(options_of(folder, "run", **own), at=STOP_AT * per_layer)
    assert (
        f"stopped by SIGTERM: document 'd.npy' is saved after layer {STOP_AT + 1} of {len(whole) // per_layer}; "
        in said
    ), family.name
    computed, weights = run_counted(options_of(folder, "run", **own))
    assert computed == whole[(STOP_AT + 1) * per_layer :], family.name
    in_layers = {int(found[1]) for name in weights if (found := re.search(r"\.(\d+)\.", name))}
    if own.get("weights") == "stream":
        assert in_layers == set(range(STOP_AT + 1, len(whole) // per_layer)), "finished layers are not read"
    comm.Barrier()
    if comm.rank == 0:
        same(folder / "whole", folder / "run")
        assert not list((folder / "run" / "checkpoints").iterdir())


@pytest.mark.mpi(2)
def test_some_families_go_on_bit_for_bit(tmp_path):
    folder = shared_folder(tmp_path)
    for family in FAMILIES:
        if family.name in FEW:
            check_family(folder / family.name, family, **FEW[family.name])


@pytest.mark.slow
@pytest.mark.mpi(3)
def test_every_family_goes_on_bit_for_bit(tmp_path):
    folder = shared_folder(tmp_path)
    for family in FAMILIES:
        check_family(folder / family.name, family, weights="stream")


def prepared(tmp_path, layers=5, lengths=(N_TOKENS,)):
    """A folder with a model and documents, on all ranks."""
    from mpi4py import MPI

    folder = shared_folder(tmp_path)
    if MPI.COMM_WORLD.rank == 0:
        folder.mkdir(exist_ok=True)
        save_tiny(folder / "model", tiny_config("llama", num_hidden_layers=layers))
        for n in lengths:
            save_document(folder / ("d.npy" if n == N_TOKENS else f"{n}.npy"), n)
    MPI.COMM_WORLD.Barrier()
    return folder


@pytest.mark.mpi(4)
def test_other_ranks_go_on(tmp_path):
    """Stopped on 4 ranks of which two share the weights each; goes on on 3 and on 1, another schedule and segments."""
    from mpi4py import MPI

    import cpmpi

    comm, folder = MPI.COMM_WORLD, prepared(tmp_path)
    run_counted(options_of(folder, "whole"))
    for output, size, own in (("three", 3, {"segments": 5, "attention": "tree"}), ("one", 1, {"chunk_tokens": 7})):
        run_stopped(options_of(folder, output, tp=2))
        some = comm.Split(comm.rank >= size, comm.rank)
        if comm.rank < size:
            computed, _ = run_counted(options_of(folder, output, **own), some)
            assert computed == [3, 4]
        comm.Barrier()
        if comm.rank == 0:
            with cpmpi.open_run(folder / "whole") as a, cpmpi.open_run(folder / output) as b:
                error = np.abs(a.documents[0].logprobs - b.documents[0].logprobs)[1:]
            assert 0 < error.max() <= 1e-4, "rounding differs, and nothing else"
            assert error.mean() <= 1e-5


@pytest.mark.mpi(2)
def test_checkpoints_of_a_job(tmp_path, capfd):
    """In one launch, which takes longer than what it checks."""
    check_order(prepared(tmp_path / "order", layers=8))
    check_unwritable(prepared(tmp_path / "unwritable", layers=9), capfd)
    check_damaged(prepared(tmp_path / "damaged"), capfd)
    check_the_one_before(prepared(tmp_path / "before"), capfd)


def check_damaged(folder, capfd):
    """Damaged, or its KV is: the document begins again, says why, and its result is right."""
    from mpi4py import MPI

    from cpmpi.run.paths import RunPaths

    comm = MPI.COMM_WORLD
    kept = {"keep_kv": True, "quiet": False}
    run_counted(options_of(folder, "whole", **kept))
    paths = RunPaths(folder / "run")

    def change(find, at=None, data=b"\1"):
        def work():
            path = find()
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2 if at is None else at())
                file.write(data)

        return work

    def manifest():
        return next(paths.checkpoints.glob(f"*-layer-{STOP_AT:05d}.json"))

    def part():
        return next(paths.checkpoints.glob(f"*-layer-{STOP_AT:05d}-rank-00001.h5"))

    def shard():
        return paths.shard(1)

    def offset(find, name):
        import h5py

        with h5py.File(find()) as file:
            return file[name].id.get_offset()

    damages = {
        "not a checkpoint's manifest": change(manifest),
        "is not the file|no such file|cannot be read|laid out": lambda: part().write_bytes(b""),
        "do not have their checksum": change(part, lambda: offset(part, "hidden")),
        r"rank-00001.h5: KV of layers \[0\] is not whole": change(
            shard, lambda: offset(shard, "documents/000000/layer_done"), b"\0"
        ),
        "rank-00001.h5: document 'd.npy': its checksums are not those that the checkpoint recorded": change(
            shard, lambda: offset(shard, "documents/000000/checksum")
        ),
    }
    for reason, damage in damages.items():
        run_stopped(options_of(folder, "run", overwrite=True, **kept))
        comm.Barrier()
        if comm.rank == 0:
            damage()
        comm.Barrier()
        capfd.readouterr()
        assert run_counted(options_of(folder, "run", **kept))[0] == list(range(5)), reason
        if comm.rank == 0:
            assert re.search(rf"^d\.npy: the checkpoint \S+ is not used: .*{reason}", capfd.readouterr().err, re.M)
            same(folder / "whole", folder / "run")


def check_the_one_before(folder, capfd):
    """Two checkpoints are there, as after a kill before the older was deleted, and the later one is damaged."""
    from mpi4py import MPI

    comm, kept = MPI.COMM_WORLD, {"keep_kv": True, "quiet": False}
    run_counted(options_of(folder, "whole", **kept))
    run_stopped(options_of(folder, "run", **kept), at=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpmpi.run.checkpoint.delete", lambda *_, **__: None)
        run_stopped(options_of(folder, "run", **kept), at=1)
    saved = sorted((folder / "run" / "checkpoints").glob("*.json"))
    assert [path.name[-10:] for path in saved] == ["00000.json", "00001.json"]
    comm.Barrier()
    if comm.rank == 0:
        saved[1].write_bytes(saved[1].read_bytes()[:-40])
    comm.Barrier()
    capfd.readouterr()
    assert run_counted(options_of(folder, "run", **kept))[0] == [1, 2, 3, 4]
    if comm.rank == 0:
        said = capfd.readouterr().err
        assert f"d.npy: the checkpoint {saved[1]} is not used: {saved[1]}: not a checkpoint's manifest" in said
        assert "d.npy: goes on after layer 1 of 5: " in said
        same(folder / "whole", folder / "run")


def leave_when_written(patch):
    """Every rank's file is whole when it leaves an attention: a checkpoint after every other layer, at every speed."""
    from cpmpi.engine.checkpoint import Checkpoints

    leave = Checkpoints.leave

    def wait_and_leave(checkpoints, attention):
        checkpoints.wait()
        leave(checkpoints, attention)

    patch.setattr(Checkpoints, "leave", wait_and_leave)


def check_unwritable(folder, capfd):
    """One rank's disk is full: said once, the document goes on; the checkpoint before stays until the next is whole."""
    from mpi4py import MPI

    from cpmpi.run import hidden

    comm = MPI.COMM_WORLD
    real, tried = hidden.write_part, []

    def full(run, identity, layer, rank, runs):
        tried.append(layer)
        if len(tried) == 1 and rank == 1:
            raise OSError(28, "No space left on device")
        return real(run, identity, layer, rank, runs)

    with pytest.MonkeyPatch.context() as patch:
        leave_when_written(patch)
        patch.setattr(hidden, "write_part", full)
        run_counted(options_of(folder, "run", checkpoint="0", quiet=False, grace=0))
    assert tried == [0, 2, 4, 6]
    if comm.rank == 0:
        said = capfd.readouterr().err
        assert said.count("could not be written") == 1
        warned = r"^warning: a layer and its checkpoint take about [\d.]+ m?s, more than --grace 0 s: a stop would drop"
        assert len(re.findall(warned, said, re.M)) == 1, said
        assert f"the checkpoint after layer {tried[0] + 1} could not be written (see " in said
        assert "No space left" in (folder / "run" / "log" / "rank-00001.log").read_text()


def check_order(folder):
    """KV is synced before its checkpoint is written, and all ranks' files are whole before it is named."""
    from mpi4py import MPI

    from cpmpi.run import checkpoint
    from cpmpi.run.hidden import SavedHidden
    from cpmpi.run.writer import ShardWriter

    synced, published, digests = [], [], []
    sync, publish, digest = ShardWriter.sync, checkpoint.publish, ShardWriter.digest

    def note_sync(writer, first=None):
        sync(writer, first)
        synced.append((first, writer.layers_done(0)[:first].all()))

    def note_digest(writer, document, layers):
        digests.append((layers, writer.layers_done(document)[:layers].all()))
        return digest(writer, document, layers)

    def note_publish(run, manifest):
        saved = SavedHidden(run, manifest)
        saved.check(0, 1)
        saved.close()
        publish(run, manifest)
        published.append(manifest.layer)
        assert [m.layer for _, m in checkpoint.find(run, manifest.identity)] == [manifest.layer]

    with pytest.MonkeyPatch.context() as patch:
        leave_when_written(patch)
        patch.setattr(ShardWriter, "sync", note_sync)
        patch.setattr(ShardWriter, "digest", note_digest)
        patch.setattr(checkpoint, "publish", note_publish)
        run_counted(options_of(folder, "run", checkpoint="0", keep_kv=True))
    assert [(layers, done) for layers, done in synced if layers is not None] == digests
    assert [layers for layers, _ in digests] == [1, 3, 5, 7]
    assert all(done for _, done in digests)
    assert published == ([0, 2, 4] if MPI.COMM_WORLD.rank == 0 else [])
    checkpoints_off = options_of(folder, "off", checkpoint="off")
    assert run_stopped(checkpoints_off).endswith("begins again (--checkpoint off); the same command goes on")
    assert run_counted(checkpoints_off)[0] == list(range(8))
    assert not (folder / "off" / "checkpoints").exists()
