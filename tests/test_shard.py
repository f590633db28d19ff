"""Shards and their writer: what is put in comes out bit for bit, and every failure is said."""

import errno
import itertools
import threading
import time
import weakref
from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.errors import UserError
from cpmpi.run import writer as writer_module
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.shard import ShardFile, create_shard, prepare_shard
from cpmpi.run.spec import KVSpec, shard_bytes
from cpmpi.run.writer import ShardWriter
from tests.runs import KV, held, kv_of, make_spec


def put_all(writer: ShardWriter, spec, rank: int, i: int) -> None:
    for layer in range(spec.kv.layers):
        key_TGD, value_TGE = kv_of(i, layer, spec.documents[i].n_tokens, spec.kv)
        writer.put(i, layer, key_TGD[held(spec.documents[i], rank)], value_TGE[held(spec.documents[i], rank)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(tmp_path, dtype, source):
    kv = replace(KV, dtype=dtype)
    spec = make_spec(kv=kv)
    document = spec.documents[0]
    path = create_shard(tmp_path, spec, 1)
    with ShardWriter(path, spec, 1) as writer:
        for layer in range(3):
            key_TGD, value_TGE = (x.to(getattr(torch, source)) for x in kv_of(0, layer, 50))
            writer.put(0, layer, key_TGD[held(document, 1)], value_TGE[held(document, 1)])
        writer.finish(0)
        assert writer.stats.bytes == document.layout.size(1) * kv.bytes_per_token
    with h5py.File(path) as file:
        group = file[document_name(0)]
        assert [dim.label for dim in group["key"].dims] == ["layer", "token", "head", "dim"]
        assert [(start, stop) for start, stop in group["pieces"][:]] == list(document.pieces(1))
        for layer in range(3):
            for name, whole in zip(("key", "value"), kv_of(0, layer, 50)):
                expected = whole.to(getattr(torch, source)).to(getattr(torch, dtype)).float()
                np.testing.assert_array_equal(group[name][layer], expected[held(document, 1)].numpy())


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    world=st.integers(1, 6),
    segments=st.integers(1, 5),
)
def test_any_layout_fits(tmp_path_factory, lengths, world, segments):
    """Also more ranks than tokens, and ranks without any: their datasets have no elements."""
    folder = tmp_path_factory.mktemp("shards")
    spec = make_spec(lengths, world, segments)
    for rank in range(world):
        path = create_shard(folder, spec, rank)
        assert path.stat().st_size <= shard_bytes(spec, rank)
        with ShardWriter(path, spec, rank) as writer:
            for i in range(len(lengths)):
                put_all(writer, spec, rank, i)
                writer.finish(i)
        with h5py.File(path) as file:
            for i, document in enumerate(spec.documents):
                expected = kv_of(i, 2, document.n_tokens)[0][held(document, rank)].bfloat16().float()
                np.testing.assert_array_equal(file[document_name(i)]["key"][2], expected.numpy())


def test_strided_tensors_and_numpy_arrays(tmp_path):
    """Attention gives (G, T, D): its transposed view is stored like a contiguous tensor."""
    spec = make_spec((40,), world=1, kv=KVSpec.alike(layers=2, heads=2, key_dim=4, value_dim=3, dtype="float32"))
    path = create_shard(tmp_path, spec, 0)
    key_TGD, value_TGE = kv_of(0, 0, 40)
    with ShardWriter(path, spec, 0) as writer:
        writer.put(0, 0, key_TGD.transpose(0, 1).contiguous().transpose(0, 1), value_TGE)
        writer.put(0, 1, key_TGD.numpy(), value_TGE.numpy())
        writer.finish(0)
    with h5py.File(path) as file:
        for layer in range(2):
            np.testing.assert_array_equal(file[document_name(0)]["key"][layer], key_TGD.numpy())
            np.testing.assert_array_equal(file[document_name(0)]["value"][layer], value_TGE.numpy())


def test_chunks_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 100)
    monkeypatch.setattr(writer_module, "SERIAL_ELEMENTS", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    spec = make_spec((50,), world=1)
    path = create_shard(tmp_path, spec, 0)
    with ShardWriter(path, spec, 0) as writer:
        put_all(writer, spec, 0, 0)
        small_chunks = writer.finish(0)
    monkeypatch.undo()
    with ShardWriter(path, spec, 0) as writer:
        put_all(writer, spec, 0, 0)
        assert writer.finish(0) == small_chunks


def test_layers_are_marked_only_when_they_are_whole(tmp_path, monkeypatch):
    spec = make_spec((50,), world=1)
    path = create_shard(tmp_path, spec, 0)
    with ShardWriter(path, spec, 0) as writer:
        put_all(writer, spec, 0, 0)
        writer.sync()
        assert writer.layers_done(0).tolist() == [True] * 3
        monkeypatch.setattr(writer, "_write_rows", lambda *args: 1 / 0)
        writer.put(0, 1, *kv_of(0, 1, 50))
        with pytest.raises(ZeroDivisionError):
            writer.finish(0)
        assert writer.layers_done(0).tolist() == [True, False, True]
        with pytest.raises(ZeroDivisionError):
            writer.put(0, 2, *kv_of(0, 2, 50))
        with pytest.raises(ZeroDivisionError):
            writer.close()
    with ShardWriter(path, spec, 0) as writer:
        with pytest.raises(ValueError, match=r"document 0 lacks layers \[1\]"):
            writer.finish(0)
        writer.put(0, 1, *kv_of(0, 1, 50))
        writer.finish(0)


def test_a_full_queue_blocks_and_a_large_layer_passes(tmp_path, monkeypatch):
    spec = make_spec((50,), world=1)
    path = create_shard(tmp_path, spec, 0)
    gate = threading.Event()
    with ShardWriter(path, spec, 0, queue_bytes=3000) as writer:
        write = writer._write
        monkeypatch.setattr(writer, "_write", lambda item: (gate.wait(), write(item)))
        layer = kv_of(0, 0, 50)
        assert sum(x.nbytes for x in layer) == 2800
        writer.put(0, 0, *layer)
        threading.Timer(0.2, gate.set).start()
        writer.put(0, 1, *layer)
        assert gate.is_set()  # it came back only once the first layer could be written
        assert writer.stats.blocked_s > 0
    with ShardWriter(path, spec, 0, queue_bytes=1) as writer:
        put_all(writer, spec, 0, 0)
        writer.finish(0)


def test_a_full_disk_is_said_with_its_numbers(tmp_path, monkeypatch):
    spec = make_spec((50,), world=1)
    path = create_shard(tmp_path, spec, 0)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(path, spec, 0)
    monkeypatch.setattr("cpmpi.run.hdf5.os.pwrite", full)
    writer.put(0, 0, *kv_of(0, 0, 50))
    with pytest.raises(
        UserError, match=r"rank-00000\.h5: no space left .*\(\d+ bytes\) .* still .*\(\d+ bytes\) are free"
    ):
        writer.finish(0)
    with pytest.raises(UserError, match="no space left"):
        writer.close()
    writer.close()


def test_a_full_disk_that_shows_only_at_fsync(tmp_path, monkeypatch):
    """Network file systems take the bytes and refuse them later."""
    spec = make_spec((50,), world=1)

    def full(*args):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with ShardWriter(create_shard(tmp_path, spec, 0), spec, 0) as writer:
        put_all(writer, spec, 0, 0)
        monkeypatch.setattr("cpmpi.run.writer.os.fsync", full)
        for call in (partial(writer.finish, 0), writer.close):
            with pytest.raises(UserError, match=r"no space left \(Disk quota exceeded\)"):
                call()


def test_memory_of_a_written_layer_is_free(tmp_path):
    spec = make_spec((50,), world=1)
    with ShardWriter(create_shard(tmp_path, spec, 0), spec, 0) as writer:
        arrays = [x.numpy().copy() for x in kv_of(0, 0, 50)]
        alive = [weakref.ref(array) for array in arrays]
        writer.put(0, 0, *arrays)
        del arrays
        writer.sync()
        deadline = time.perf_counter() + 5
        while any(reference() is not None for reference in alive) and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert [reference() for reference in alive] == [None, None]


def test_another_error_of_the_system_names_the_file(tmp_path, monkeypatch):
    spec = make_spec((50,), world=1)
    path = create_shard(tmp_path, spec, 0)

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    with ShardWriter(path, spec, 0) as writer:
        monkeypatch.setattr("cpmpi.run.hdf5.os.pwrite", broken)
        writer.put(0, 0, *kv_of(0, 0, 50))
        with pytest.raises(UserError, match=r"rank-00000\.h5: cannot be written \(Input/output error\)"):
            writer.sync()
        with pytest.raises(UserError, match="Input/output error"):
            writer.close()


def test_an_error_of_the_caller_is_not_hidden(tmp_path):
    spec = make_spec((50,), world=1)
    path = create_shard(tmp_path, spec, 0)

    def fail_halfway() -> None:
        with ShardWriter(path, spec, 0) as writer:
            writer.put(0, 0, *kv_of(0, 0, 50))
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail_halfway()


def test_float16_overflow_is_an_error(tmp_path):
    spec = make_spec((50,), world=1, kv=replace(KV, dtype="float16"))
    path = create_shard(tmp_path, spec, 0)
    key_TGD, value_TGE = kv_of(0, 0, 50)
    key_TGD[3, 1, 2] = 70000
    writer = ShardWriter(path, spec, 0)
    writer.put(0, 0, key_TGD, value_TGE)
    with pytest.raises(UserError, match=r"exceed the range of float16 \(65504\).*--kv-dtype bfloat16"):
        writer.finish(0)
    with pytest.raises(UserError):
        writer.close()


def test_wrong_shapes_layers_and_types(tmp_path):
    spec = make_spec((50,), world=1)
    with ShardWriter(create_shard(tmp_path, spec, 0), spec, 0) as writer:
        key_TGD, value_TGE = kv_of(0, 0, 50)
        with pytest.raises(ValueError, match=r"\(49, 2, 4\).*expected \(\(50, 2, 4\), \(50, 2, 3\)\)"):
            writer.put(0, 0, key_TGD[1:], value_TGE)
        with pytest.raises(ValueError, match="layer 3 of 3"):
            writer.put(0, 3, key_TGD, value_TGE)
        with pytest.raises(ValueError, match="key and value are on cpu, meta, expected cpu"):
            writer.put(0, 0, key_TGD.to("meta"), value_TGE)
    with pytest.raises(UserError, match="KV type 'int8' is not one of float32, bfloat16, float16"):
        KVSpec.alike(layers=1, heads=1, key_dim=1, value_dim=1, dtype="int8")


def test_shards_of_other_runs_and_ranks_are_refused(tmp_path):
    spec, other = make_spec(), make_spec()
    path = create_shard(tmp_path, spec, 0)
    with pytest.raises(
        UserError, match=rf"rank-00000\.h5: belongs to run {spec.shard_set.id}, not to this run {other.shard_set.id}"
    ):
        ShardWriter(path, other, 0)
    with pytest.raises(UserError, match="is the shard of rank 0, not of rank 1"):
        ShardFile(path, spec.shard_set.id, 1)
    with pytest.raises(UserError, match=r"has \d+ bytes, but the run recorded 5"):
        ShardFile(path, spec.shard_set.id, 0, size=5)
    with h5py.File(tmp_path / "plain.h5", "w"):
        pass
    with pytest.raises(UserError, match="not a shard of a run"):
        ShardFile(tmp_path / "plain.h5", spec.shard_set.id, 0)
    with pytest.raises(UserError, match="has no group /documents/000009"):
        ShardFile(path, spec.shard_set.id, 0).document(9)


def test_prepare_keeps_replaces_or_refuses(tmp_path):
    spec = make_spec()
    path = prepare_shard(tmp_path, spec, 0, finished=())
    inode = path.stat().st_ino
    assert prepare_shard(tmp_path, spec, 0, finished=(0,)).stat().st_ino == inode
    other = make_spec()
    with pytest.raises(UserError, match="belongs to run"):
        prepare_shard(tmp_path, other, 0, finished=(0,))
    prepare_shard(tmp_path, other, 0, finished=())
    ShardFile(path, other.shard_set.id, 0).close()
    path.unlink()
    with pytest.raises(UserError, match=r"rank-00000\.h5: no such file, but 1 finished documents .*--overwrite"):
        prepare_shard(tmp_path, other, 0, finished=(0,))
    assert not RunPaths(tmp_path).shard(0).exists()


def test_a_document_on_some_of_the_ranks(tmp_path):
    """A short document may lie on ranks 2 and 3 of 4: the others hold none of it."""
    short = replace(make_spec((10,), world=2).documents[0], first_rank=2)
    spec = make_spec((10,), world=4, documents=(short,))
    sizes = []
    for rank in range(4):
        with ShardWriter(create_shard(tmp_path, spec, rank), spec, rank) as writer:
            put_all(writer, spec, rank, 0)
            writer.finish(0)
        sizes.append(len(held(short, rank)))
    assert sizes == [0, 0, 6, 4]
    assert sorted(itertools.chain.from_iterable(held(short, rank) for rank in range(4))) == list(range(10))
