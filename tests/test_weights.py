"""Weights from files of every kind, resident and streamed; what is wrong with them is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpmpi.checkpoint import Checkpoint
from cpmpi.errors import UserError
from cpmpi.memory import WeightBytes, parse_bytes, plan
from cpmpi.probe import probe
from cpmpi.weights import spans_of, weight_bytes
from tests.test_models import scores
from tests.tiny_models import save_tiny, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    save_tiny(tmp_path, tiny_config("llama"), max_shard_size="20KB")
    return tmp_path


def change(folder, name, make):
    """Replace a tensor in whichever file it is in; ``make`` returns None to take it out."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            changed = make(tensors.pop(name))
            save_file({**tensors, **({} if changed is None else {name: changed})}, path, {"format": "pt"})
            return
    raise AssertionError(name)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_streamed_equals_resident_bit_for_bit(stored, computed, tmp_path):
    from mpi4py import MPI

    save_tiny(tmp_path, tiny_config("qwen3", tie_word_embeddings=True), dtype=stored, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    resident, streamed = (scores(MPI.COMM_SELF, tmp_path, stream, computed) for stream in (False, True))
    for a, b in zip(resident, streamed, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a[1:]).all()


def test_a_stage_and_the_next_are_in_memory_at_a_time(checkpoint):
    weights = Checkpoint(checkpoint).weights(torch.float32, CPU, stream=True)
    sizes = weight_bytes(Checkpoint(checkpoint).skeleton(torch.float32))

    def held():
        return sum(p.nbytes for p in weights.model.parameters() if not p.is_meta)

    def coming():
        return sum(tensor.nbytes for tensor in weights._coming.result().values())

    assert held() == sizes.lasting
    most = 0
    for stage in range(5):
        weights.enter(stage)
        assert sizes.lasting < held()
        most = max(most, held() + coming())
        weights.leave(stage)
        assert held() == sizes.lasting
    assert most == sizes.lasting + sizes.streamed
    assert sizes.total - sizes.lasting == 2 * sizes.streamed  # two layers of four


def test_stages_lie_between_attentions(checkpoint):
    spans = spans_of(Checkpoint(checkpoint).skeleton(torch.float32))
    assert spans["model.layers.2.self_attn.q_proj"] == (2, 2)
    assert spans["model.layers.2.self_attn"] == (2, 3)
    assert spans["model.layers.2.mlp.down_proj"] == (3, 3)
    assert spans["model.norm"] == (4, 4)
    assert "lm_head" not in spans


@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_tensor_is_named(checkpoint, stream):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda _: None)
    with pytest.raises(UserError, match=r"missing in the weights: model\.layers\.1\.mlp\.down_proj\.weight"):
        load(checkpoint, stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tensor_of_the_wrong_shape_is_named(checkpoint, stream):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda w: w[:, :-1].clone())
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load(checkpoint, stream)


@pytest.mark.parametrize("stream", [False, True])
def test_nan_in_weights_is_named(checkpoint, stream):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda w: w.index_fill(0, torch.tensor([3]), np.nan))
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight: 48 of 1536 numbers are NaN"):
        load(checkpoint, stream, check_finite=True)


def test_a_missing_shard_is_named(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    name = sorted(set(index["weight_map"].values()))[1]
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=rf"1 of \d+ weight files are missing: {name}"):
        Checkpoint(checkpoint)


def load(folder, stream, **options):
    if not stream:
        return Checkpoint(folder).load(torch.float32, CPU, **options)
    weights = Checkpoint(folder).weights(torch.float32, CPU, stream=True, **options)
    for stage in range(5):
        weights.enter(stage)
    return weights.model


def test_the_plan_keeps_weights_where_they_fit():
    weights = WeightBytes(total=10**12, lasting=10**10, streamed=10**9)
    plenty, little = 10**13, 10**11
    assert not plan({}, weights, choice="auto", limit=None, available=plenty).stream
    assert plan({}, weights, choice="auto", limit=None, available=little).stream
    assert plan({}, weights, choice="auto", limit=little, available=plenty).stream
    assert plan({}, weights, choice="stream", limit=None, available=plenty).stream
    assert "warning: a rank can have 100.00 GB here" in str(
        plan({}, weights, choice="resident", limit=None, available=little)
    )
    assert "warning" not in str(plan({}, weights, choice="auto", limit=None, available=little))
    with pytest.raises(UserError, match=r"resident needs at least 100\d\.\d\d GB, --weights stream 11\.\d\d GB"):
        plan({}, weights, choice="resident", limit=little, available=plenty)
    with pytest.raises(UserError, match=r"--memory-limit 1\.00 GB .* stream needs at least 11\.\d\d GB"):
        plan({}, weights, choice="auto", limit=10**9, available=plenty)


def test_sizes():
    assert [parse_bytes(t) for t in ("8GB", "1.5 tb", "800M", "7")] == [8 * 10**9, 15 * 10**11, 8 * 10**8, 7]
    for bad in ("", "GB", "8XB", "-1GB", "0", "inf"):
        with pytest.raises(UserError, match="--memory-limit"):
            parse_bytes(bad)


def test_the_probe_needs_no_weights(checkpoint):
    layers = probe(Checkpoint(checkpoint).skeleton(torch.float32))
    assert len(layers) == 4
    assert (layers[0].heads.query_heads, layers[0].heads.kv_heads, layers[0].heads.key_dim) == (4, 2, 8)
