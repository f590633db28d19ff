"""KV in a set of shards, whole or in its first layers: any tokens and heads come back bit for bit, or not at all."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi import open_run
from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout, Piece
from cpmpi.errors import UserError
from cpmpi.run import layer_reader, shard
from cpmpi.run.folder import start_index
from cpmpi.run.hdf5 import tensor_of
from cpmpi.run.manifest import KVPlace
from cpmpi.run.shard import OpenShards
from cpmpi.run.sharded_kv import ShardedKV
from cpmpi.run.spec import KVShape, KVSpec, ShardSet
from tests.runs import kv_of, make_run, make_spec, open_writers

KV = KVSpec(shapes=(KVShape(4, 3, 2), KVShape(2, 5, 5), KVShape(4, 3, 2)), dtype="bfloat16")
TOKENS, INDEX = 40, 1


def dealt(positions: int, segments: int, grid: Grid):
    """A run of two documents, dealt to ``positions`` ranks, times its copies, of each head group."""
    positions *= grid.copies
    spec = make_spec((5, TOKENS), world=positions, segments=segments, kv=KV)
    world = positions * grid.head_groups
    documents = tuple(replace(document, grid=grid) for document in spec.documents)
    return replace(spec, documents=documents, world_size=world, shard_set=ShardSet(world_size=world))


def begun(folder, spec, layers):
    """The first layers of the second document, on disk: where."""
    index = start_index(folder, spec)
    document, digests = index.spec.documents[INDEX], []
    for rank, writer in enumerate(open_writers(folder, index)):
        for layer in range(layers):
            rows = [row for piece in document.pieces(rank) for row in range(*piece)]
            heads = slice(*document.heads(rank, KV.shapes[layer].heads))
            writer.put(INDEX, layer, *(whole[rows, heads] for whole in kv_of(INDEX, layer, TOKENS, KV)))
        writer.sync()
        digests.append(writer.digest(INDEX, layers))
        writer.close()
    return KVPlace.of(index.spec, INDEX, digests)


def stored(folder, place, spec, layers, **changes):
    shards = OpenShards(folder)
    return ShardedKV(
        name=spec.documents[INDEX].id, part=place.dealt(spec.documents[INDEX]).parts[0], number=place.shard_document,
        shapes=KV.shapes, stored=KV.stored, done=layers, recorded_in="the checkpoint",
        shard=lambda rank: shards.get(place.shards, rank), digest=place.digests.__getitem__, **changes,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    old=st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([Grid(), Grid(tp=2, head_groups=2)])),
    new=st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([Grid(), Grid(tp=4, head_groups=2)])),
)  # fmt: skip
def test_any_ranks_find_theirs(tmp_path_factory, old, new):
    folder, spec = tmp_path_factory.mktemp("run"), dealt(*old)
    place = begun(folder, spec, layers=2)
    kv = stored(folder, place, spec, 2)
    document = dealt(*new).documents[INDEX]
    for rank in range(document.n_ranks):
        for layer in range(2):
            heads = document.heads(rank, KV.shapes[layer].heads)
            found = kv.read(layer, document.pieces(rank), heads)
            rows = [row for piece in document.pieces(rank) for row in range(*piece)]
            for bits, whole in zip(found, kv_of(INDEX, layer, TOKENS, KV), strict=True):
                assert tensor_of(bits, "bfloat16").equal(whole[rows, slice(*heads)].bfloat16())
    for rank in kv.ranks:
        kv.check(rank)


def test_shards_of_other_heads_are_not_read(tmp_path):
    spec = dealt(1, 2, Grid(tp=2, head_groups=2))
    place = begun(tmp_path, spec, layers=1)
    (tmp_path / "shards" / "rank-00001.h5").unlink()
    stored(tmp_path, place, spec, 1).read(0, [Piece(3, 9)], Piece(0, 2))
    with pytest.raises(UserError, match=r"rank-00001.h5: no such file"):
        stored(tmp_path, place, spec, 1).read(0, [Piece(3, 9)], Piece(1, 3))


def test_what_is_not_as_recorded_is_refused(tmp_path):
    spec = dealt(2, 2, Grid())
    place = begun(tmp_path, spec, layers=2)
    for layers, reason in ((3, r"KV of layers \[2\] is not whole"), (1, "are not those that the checkpoint recorded")):
        with pytest.raises(UserError, match=rf"rank-00000.h5: .*{reason}"):
            stored(tmp_path, place, spec, layers).check(0)
    others = [replace(place, segments=3), replace(place, tp=2, head_groups=2), replace(place, shard_document=0)]
    for other in others:
        with pytest.raises(
            UserError, match=r"rank-00000.h5: damaged: document 'd1' is not laid out as in the check|not"
        ):
            stored(tmp_path, other, spec, 2).check(0)
    with pytest.raises(UserError, match=r"rank-00000.h5: belongs to run \w+, not to this run another"):
        stored(tmp_path, replace(place, set_id="another"), spec, 2).check(0)


def test_a_flipped_bit_is_found_when_it_is_read(tmp_path):
    spec = dealt(2, 2, Grid())
    place = begun(tmp_path, spec, layers=2)
    path = tmp_path / "shards" / "rank-00001.h5"
    with h5py.File(path) as file:
        at = file[f"documents/00000{INDEX}/value0"].id.get_offset()  # of layers 0 and 2
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    kv = stored(tmp_path, place, spec, 2)
    kv.read(1, [Piece(0, TOKENS)], Piece(0, 2))
    with pytest.raises(UserError, match=r"rank-00001.h5: document 'd1': layer 0: value of tokens \d+ to \d+ does not"):
        kv.read(0, [Piece(0, TOKENS)], Piece(0, 4))


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    """Those that are read from together are open together."""
    monkeypatch.setattr(shard, "MOST_OPEN", 4)
    monkeypatch.setattr(layer_reader, "MOST_OPEN", 4)
    make_run(tmp_path, make_spec((TOKENS,), world=9))
    with open_run(tmp_path) as run:
        document = run.documents[0]
        for start in (0, 30, 0, 17):
            key, _ = document.kv(1, start, start + 10, as_torch=True)
            assert key.equal(kv_of(0, 1, TOKENS)[0][start : start + 10].bfloat16())
            assert document.kv(2, as_torch=True)[1].equal(kv_of(0, 2, TOKENS)[1].bfloat16())
        assert len(run._shards._open) == 4


def test_layouts_survive_the_manifest():
    spec = dealt(3, 5, Grid(tp=2, head_groups=2))
    document = spec.documents[INDEX]
    again = KVPlace.of(spec, INDEX, [1] * 6).dealt(
        replace(document, layout=Layout(n_tokens=TOKENS, world=1), grid=Grid())
    )
    for rank in range(6):
        assert again.pieces(rank) == document.pieces(rank)
        assert again.heads(rank, 4) == document.heads(rank, 4)
    assert np.array_equal(again.origin, (6, 0, INDEX))
