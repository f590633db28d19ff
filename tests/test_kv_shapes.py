"""Layers whose keys and values differ in shape: a pair of datasets per shape, and each layer is read as it was put."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from cpmpi import open_run
from cpmpi.attention.grid import Grid
from cpmpi.errors import UserError
from cpmpi.jobs import inspect
from cpmpi.run.spec import KVShape, KVSpec, index_bytes, shard_bytes
from cpmpi.run.verify import verify_run
from tests.runs import kv_of, make_run, make_spec

WIDE, NARROW = KVShape(2, 8, 6), KVShape(4, 4, 4)
UNEQUAL = KVSpec(shapes=(NARROW, NARROW, WIDE, NARROW, WIDE), dtype="bfloat16")


@pytest.fixture(params=[Grid(), Grid(tp=2, head_groups=2)], ids=["tokens", "heads"])
def unequal_run(request, tmp_path):
    """Two documents on four ranks, which share the heads or not."""
    spec = make_spec((50, 3), world=4, kv=UNEQUAL)
    documents = tuple(
        replace(document, grid=request.param, layout=replace(document.layout, world=4 // request.param.head_groups))
        for document in spec.documents
    )
    make_run(tmp_path, replace(spec, documents=documents))
    return tmp_path


def test_every_layer_is_read_as_it_was_put(unequal_run):
    assert verify_run(unequal_run).problems == []
    with open_run(unequal_run) as run, h5py.File(unequal_run / "run.h5") as file:
        for document in run.documents:
            assert document.kv_shapes == UNEQUAL.shapes
            kv = file[f"documents/{document.index:06d}/kv"]
            for layer in range(5):
                number, place = (1, (2, 4).index(layer)) if layer in (2, 4) else (0, (0, 1, 3).index(layer))
                expected = [
                    x.bfloat16().float().numpy() for x in kv_of(document.index, layer, document.n_tokens, UNEQUAL)
                ]
                for name, found, whole in zip(("key", "value"), document.kv(layer, 1, 40), expected):
                    np.testing.assert_array_equal(found, whole[1:40])
                    np.testing.assert_array_equal(kv[f"{name}{number}"][place], whole)
            assert kv["key0"].attrs["layers"].tolist() == [0, 1, 3]
            assert kv["value1"].attrs["layers"].tolist() == [2, 4]
        with pytest.raises(
            UserError, match=r"run\.h5: its layers have keys and values of several shapes; see kv_shapes"
        ):
            run.documents[0].kv_shape  # noqa: B018


def test_sizes_and_words(unequal_run):
    with open_run(unequal_run) as run:
        spec = make_spec((50, 3), world=4, kv=UNEQUAL)
        for rank in range(4):
            assert run.shard_size(rank) <= shard_bytes(spec, rank)
        assert run.paths.index.stat().st_size <= index_bytes(spec)
    text = CliRunner().invoke(inspect.command, [str(unequal_run)]).output
    shapes = "3 layers x T tokens x 4 heads x 4 + 4 and 2 layers x T tokens x 2 heads x 8 + 6"
    assert f"kv        bfloat16, {shapes}: {53 * UNEQUAL.bytes_per_token / 1000:.3g} kB\n" in text
    assert UNEQUAL.bytes_per_token == 2 * (3 * 4 * 8 + 2 * 2 * 14)


def test_a_layer_of_another_shape_is_refused(tmp_path):
    make_run(tmp_path, make_spec((50,), kv=UNEQUAL), stop_after=0)
    other = replace(UNEQUAL, shapes=UNEQUAL.shapes[::-1])
    make_run(tmp_path, make_spec((50,), kv=other))
    assert verify_run(tmp_path).problems == [], "laid out anew"
    with open_run(tmp_path) as run:
        assert run.documents[0].kv_shapes == other.shapes
    with pytest.raises(UserError, match="another number of layers or other shapes of keys and values"):
        make_run(tmp_path, make_spec((50, 3), kv=UNEQUAL))


def test_many_shapes_keep_their_order():
    shapes = tuple(KVShape(1, dim + 1, 1) for dim in range(12))
    groups = KVSpec(shapes=shapes).groups()
    assert [group.key for group in groups] == [f"key{number}" for number in range(12)]
    assert [group.layers for group in groups] == [(number,) for number in range(12)]
