"""A prefill goes on on other ranks than began its document: the KV of finished layers is dealt anew, exactly."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.power_cut import PowerCutError

from .families import FAMILIES, UNSHARED
from .runs import make_spec
from .test_exact import shared_folder
from .test_resume import options_of, prepared, run_counted, run_stopped, same, save_document
from .tiny_models import save_tiny, tiny_config
from .tolerances import check_keys, check_logprobs

LAYERS = 5


def on(ranks, work, *args, **kwargs):
    """What the first ``ranks`` ranks do, with a communicator of their own; None on the others. Collective."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    some = world.Split(world.rank >= ranks, world.rank)
    result = work(*args, **kwargs, comm=some) if world.rank < ranks else None
    all_here = world.Ibarrier()
    while not all_here.Test():
        time.sleep(0.005)  # a barrier would take a core from those that work
    return result


def stop(ranks, folder, at, **own):
    """Some ranks go on with a document and are stopped after layer ``at``."""
    said = on(ranks, run_stopped, options_of(folder, "run", keep_kv=True, **own), at=at)
    assert said is None or f"is saved after layer {at + 1} of " in said


def finish(ranks, folder, output, **own):
    """Some ranks go on with a document to its end: the attentions that they compute."""
    found = on(ranks, run_counted, options_of(folder, output, keep_kv=True, **own))
    return None if found is None else found[0]


def check(folder, exact):
    """The run that many did is what one did, within rounding; the first layers, which one rank did, exactly.

    Returns:
        The set of shards that the KV is in, and how many ranks did the last part.
    """
    import cpmpi
    from cpmpi.run.verify import verify_run

    assert verify_run(folder / "run").problems == []
    assert not list((folder / "run" / "checkpoints").iterdir())
    with cpmpi.open_run(folder / "whole") as a, cpmpi.open_run(folder / "run") as b:
        x, y = a.documents[0], b.documents[0]
        check_logprobs(y.logprobs, x.logprobs)
        for layer in range(len(x.kv_shapes)):
            for got, want in zip(y.kv(layer), x.kv(layer), strict=True):
                if layer < exact:
                    np.testing.assert_array_equal(got, want)
                check_keys(got, want, layer)
        files = {path.relative_to(folder / "run").as_posix() for path in (folder / "run" / "shards").rglob("*.h5")}
        assert len(files) == y.world_size, "the shards of the jobs before are gone"
        return y.places[0].shard_set, y.world_size


def check_family(folder, family, tp=1, others=(2, 3)):
    """One rank, others, and one again do a layer of a document each."""
    from mpi4py import MPI

    root, each = MPI.COMM_WORLD.rank == 0, 2 if family.model_type == "diffllama" else 1
    if root:
        folder.mkdir()
        save_tiny(folder / "model", tiny_config(family.model_type, **{"num_hidden_layers": LAYERS, **family.own}))
        save_document(folder / "d.npy")
    MPI.COMM_WORLD.Barrier()
    whole = finish(1, folder, "whole")
    if each == 1:
        stop(1, folder, 0)
        for layer, ranks in enumerate(others, 1):
            stop(ranks, folder, layer, tp=tp if ranks == 2 else 1, segments=ranks + 1, attention="tree")
        done = len(others) + 1
    else:
        on(others[-1], run_stopped, options_of(folder, "run", keep_kv=True), at=2)
        done = 4
    computed = finish(1, folder, "run", segments=1)
    if root:
        assert computed == whole[done:], family.name
        assert check(folder, each % 2) == (len(others) + 1 if each == 1 else 1, 1), family.name


@pytest.mark.mpi(2)
def test_kv_of_finished_layers_is_dealt_anew(tmp_path):
    """The checks share a launch, which takes longer."""
    folder = shared_folder(tmp_path)
    check_family(folder / "llama", FAMILIES[0], tp=2, others=(2,))
    check_faults(prepared(folder / "faults", layers=3), ["read", "publish"])


@pytest.mark.slow
@pytest.mark.mpi(3)
@pytest.mark.parametrize("part", range(4))
def test_kv_of_every_family_is_dealt_anew(tmp_path, part):
    """Layers of several shapes, windows, latent attention, shared weights."""
    folder = shared_folder(tmp_path)
    folder.mkdir(exist_ok=True)
    for family in FAMILIES[part::4]:
        check_family(folder / family.name, family, tp=1 if family.name in UNSHARED else 2)


@pytest.mark.slow
@pytest.mark.mpi(3)
def test_faults_are_survived_and_other_documents_stay(tmp_path, capfd):
    folder = shared_folder(tmp_path)
    check_faults(prepared(folder / "faults", layers=3), ["put", "sync", "read", "publish"])
    check_damaged(prepared(folder / "damaged", layers=3), capfd, ["key", "checksum", "layer_done", ""])
    check_two(prepared(folder / "two", layers=3, lengths=(150, 90)))


def test_kv_moves_where_it_lies_elsewhere(tmp_path):
    """In another set, or as another document of the same set: a twin's."""
    from cpmpi.engine.redeal import Redeal
    from cpmpi.errors import UserError
    from cpmpi.run.manifest import KVPlace, Manifest

    spec = make_spec((50, 50))
    redeal = Redeal(folder=tmp_path, spec=spec, ranks=None, writer=None, stop=None, progress=None)
    place = KVPlace.of(spec, 0, [1, 2, 3])
    found = Manifest(
        identity="a", layer=0, attention=1, n_tokens=50, shape=(8,), dtype="float32", seconds=1.0, parts=(), kv=place
    )
    assert not redeal.needed(found, 0)
    assert redeal.needed(found, 1)
    assert redeal.needed(replace(found, kv=replace(place, set_id="another")), 0)
    with pytest.raises(UserError, match="it was made where no keys and values are kept"):
        redeal.needed(replace(found, kv=None), 0)


def check_faults(folder, kinds):
    """A kill, a full disk and a stop while KV moves leave the checkpoint and its shards as they were."""
    import signal

    from mpi4py import MPI

    from cpmpi.errors import Stopped, UserError
    from cpmpi.run.sharded_kv import ShardedKV
    from cpmpi.run.writer import ShardWriter

    root, read = MPI.COMM_WORLD.rank == 0, ShardedKV.read

    sync, synced = ShardWriter.sync, []

    def note_sync(writer, *first):
        sync(writer, *first)
        synced.append(writer.layers_done(0).tolist())

    def cut(*_, **__):
        raise PowerCutError

    def cut_at_publishing(_, manifest):
        assert synced == [[True, True, False]]
        assert manifest.kv.shard_set > 1
        raise PowerCutError

    def refuse(*_, **__):
        raise UserError("no space left")

    def read_and_signal(*args):
        signal.raise_signal(signal.SIGTERM)
        return read(*args)

    finish(1, folder, "whole")
    stop(1, folder, 0)
    stop(2, folder, 1)
    manifests = list((folder / "run" / "checkpoints").glob("*.json"))
    before = [path.read_bytes() for path in (*manifests, *(folder / "run" / "shards" / "000001").iterdir())]
    faults = {
        "put": (PowerCutError, cut, "cpmpi.run.writer.ShardWriter.put"),
        "sync": (UserError, refuse, "cpmpi.run.writer.ShardWriter.sync"),
        "read": (Stopped, read_and_signal, "cpmpi.run.sharded_kv.ShardedKV.read"),
        "publish": (PowerCutError, cut_at_publishing, "cpmpi.engine.redeal.checkpoint.publish"),
    }
    for error, fault, name in (faults[kind] for kind in kinds):
        if root:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ShardWriter, "sync", note_sync)
                patch.setattr(name, fault)
                synced.clear()
                said = fails(error, options_of(folder, "run", keep_kv=True))
            assert error is not Stopped or "document 'd.npy' was about to go on after layer 2; the same" in said
            held = [*manifests, *(folder / "run" / "shards" / "000001").iterdir()]
            assert [path.read_bytes() for path in held] == before, name
            assert len(list((folder / "run" / "shards").glob("[0-9]*"))) == 2, "only the latest attempt is kept beside"
        MPI.COMM_WORLD.Barrier()
    if root:  # a kill after the new shards hold, before the old ones are deleted
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cpmpi.engine.resume.folder.delete_unused_shards", cut)
            fails(PowerCutError, options_of(folder, "run", keep_kv=True))
    assert finish(1, folder, "run") == ([2] if root else None)
    if root:
        check(folder, 1)


def fails(error, options):
    """A job on this rank alone that ends so: what it says."""
    from mpi4py import MPI

    from cpmpi.comm.ranks import Ranks
    from cpmpi.comm.stop import listening
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared

    with pytest.raises(error) as raised, listening(options.grace) as asked:
        run_prepared(prepare(options, Ranks(MPI.COMM_SELF)), asked)
    return str(raised.value)


def check_damaged(folder, capfd, kinds):
    """A byte of KV or checksums, a layer that is not whole, a missing file: the document begins again."""
    import h5py
    from mpi4py import MPI

    from cpmpi.run.paths import RunPaths

    root, shard = MPI.COMM_WORLD.rank == 0, RunPaths(folder / "run").shard(1)
    finish(1, folder, "whole")
    reasons = {
        "key": r": document 'd.npy': layer 0: key of tokens \d+ to \d+ does not have its checksum",
        "checksum": r": document 'd.npy': its checksums are not those that the checkpoint recorded",
        "layer_done": r": KV of layers \[0\] is not whole",
        "": ": no such file",
    }
    for what, reason in ((kind, reasons[kind]) for kind in kinds):
        stop(2, folder, 1, overwrite=True)
        if root and what:
            with h5py.File(shard) as file:
                at = file[f"documents/000000/{what}"].id.get_offset()
            with shard.open("r+b") as file:
                file.seek(at)
                (byte,) = file.read(1)
                file.seek(at)
                file.write(bytes([byte ^ 1]))
        elif root:
            shard.unlink()
        capfd.readouterr()
        computed = finish(1, folder, "run", quiet=False)
        if root:
            said = capfd.readouterr().err
            assert computed == [0, 1, 2], what
            assert re.search(rf"^d\.npy: the checkpoint \S+ is not used: .*{shard}{reason}", said, re.M), said
            same(folder / "whole", folder / "run")
            assert not shard.exists()


def check_two(folder):
    """Of two documents the first is finished, the second goes on on more ranks: each has the ranks that did it."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.run.verify import verify_run

    root = MPI.COMM_WORLD.rank == 0
    both = {"inputs": (str(folder / "d.npy"), str(folder / "90.npy"))}
    finish(1, folder, "whole", **both)
    finish(2, folder, "run")
    on(2, run_stopped, options_of(folder, "run", keep_kv=True, **both), at=1)
    first = [path.stat().st_mtime_ns for path in sorted((folder / "run" / "shards").glob("*.h5"))]
    assert finish(3, folder, "run", **both) == [2]
    if root:
        assert verify_run(folder / "run").problems == []
        with cpmpi.open_run(folder / "whole") as a, cpmpi.open_run(folder / "run") as b:
            for x, y in zip(a.documents, b.documents, strict=True):
                check_logprobs(y.logprobs, x.logprobs)
            assert [(d.world_size, d.places[0].shard_set) for d in b.documents] == [(2, 0), (3, 2)]
        assert [path.stat().st_mtime_ns for path in sorted((folder / "run" / "shards").glob("*.h5"))] == first
        assert [path.name for path in sorted((folder / "run" / "shards").glob("[0-9]*"))] == ["000002"]
