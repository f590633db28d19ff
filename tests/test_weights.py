"""Weights from files of every kind, resident and streamed; what is wrong with them is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpmpi.comm.device import Room
from cpmpi.cost.memory import choose_residence
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.probe import probe
from cpmpi.model.stages import stages_of
from cpmpi.model.weight_reader import WeightReader
from cpmpi.model.weights import WeightBytes, weight_bytes
from cpmpi.text import parse_bytes
from tests.sweep import OWN
from tests.test_models import LENGTHS, scores
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
    reader = reader_of(checkpoint)
    sizes = weight_bytes(reader)
    weights = Checkpoint(checkpoint).weights(reader, stream=True)

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


def test_what_a_layer_used_is_gone_when_its_keys_are_kept(checkpoint):
    """Beside weights outside of layers, those of the next stage alone are there, however long the writer takes."""
    from mpi4py import MPI

    sizes, seen = weight_bytes(reader_of(checkpoint)), []

    def keep_of(weights):
        def keep(layer, *_):
            held = sum(p.nbytes for p in weights.model.parameters() if not p.is_meta)
            coming = sum(tensor.nbytes for tensor in weights._coming.result().values())
            seen.append((layer, held, held + coming <= sizes.lasting + sizes.streamed))

        return keep

    scores(MPI.COMM_SELF, checkpoint, stream=True, keep_of=keep_of)
    assert seen == [(layer, sizes.lasting, True) for _ in LENGTHS for layer in range(4)]


def test_stages_lie_between_attentions(checkpoint):
    spans = stages_of(Checkpoint(checkpoint).skeleton(torch.float32))
    assert spans["model.layers.2.self_attn.q_proj"] == (2, 2)
    assert spans["model.layers.2.self_attn"] == (2, 3)
    assert spans["model.layers.2.mlp.down_proj"] == (3, 3)
    assert spans["model.norm"] == (4, 4)
    assert "lm_head" not in spans


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "glm4_moe"])
def test_what_stays_in_float32_does_so_when_streamed(model_type, tmp_path):
    """Their routers are computed in float32 whatever the type of the rest."""
    from mpi4py import MPI

    save_tiny(tmp_path, tiny_config(model_type, **OWN.get(model_type, {})), dtype="bfloat16")
    kept = [t for t in reader_of(tmp_path, torch.bfloat16).meta.values() if t.dtype == torch.float32]
    assert kept
    resident, streamed = (scores(MPI.COMM_SELF, tmp_path, stream, "bfloat16") for stream in (False, True))
    for a, b in zip(resident, streamed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tied_weights_count_once(tmp_path):
    save_tiny(tmp_path, tiny_config("qwen3", tie_word_embeddings=True))
    stored = [tensor.nbytes for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values()]
    assert weight_bytes(reader_of(tmp_path)).total == sum(stored)


def test_a_head_of_its_own_is_not_tied(checkpoint):
    """As transformers does: what both have, and differs, is not tied; where one is missing it is the other."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for tied in (False, True):
        if tied:
            change(checkpoint, "model.embed_tokens.weight", lambda _: None)
        resident, streamed = (load(checkpoint, stream) for stream in (False, True))
        for part in ("lm_head", "model.embed_tokens"):
            a, b = (model.get_submodule(part).weight for model in (resident, streamed))
            assert torch.equal(a, b)
        assert torch.equal(streamed.lm_head.weight, streamed.model.embed_tokens.weight) == tied


def test_a_missing_tensor_is_named(checkpoint):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda _: None)
    with pytest.raises(UserError, match=r"1 tensors missing in the weights: model\.layers\.1\.mlp\.down_proj\.weight"):
        reader_of(checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda w: w[:, :-1].clone())
    message = r"model\.layers\.1\.mlp\.down_proj\.weight has the wrong shape: \(32, 47\), not \(32, 48\)"
    with pytest.raises(UserError, match=message):
        reader_of(checkpoint)


@pytest.mark.parametrize("make", [lambda w: w[:, :-1].clone(), lambda _: None])
def test_an_expert_that_is_missing_or_of_the_wrong_shape_is_named(make, tmp_path):
    save_tiny(tmp_path, tiny_config("qwen3_moe"))
    change(tmp_path, "model.layers.1.mlp.experts.1.down_proj.weight", make)
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.experts\.down_proj"):
        reader_of(tmp_path)


def test_a_type_that_is_not_read_is_named(checkpoint):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda w: w.to(torch.float8_e4m3fn))
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight is stored as F8_E4M3; cpmpi reads F64, F"):
        reader_of(checkpoint)


def test_an_adapter_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"an adapter \(adapter_config.json\) is not applied; merge it"):
        Checkpoint(checkpoint)


def test_quantized_weights_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"llama has quantized weights \(fp8\); cpmpi runs float32, bfl"):
        Checkpoint(checkpoint)


@pytest.mark.parametrize("stream", [False, True])
def test_nan_in_weights_is_named(checkpoint, stream):
    change(checkpoint, "model.layers.1.mlp.down_proj.weight", lambda w: w.index_fill(0, torch.tensor([3]), np.nan))
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight: 48 of 1536 numbers are NaN"):
        load(checkpoint, stream, check_finite=True)


def test_what_is_made_together_must_all_have_a_place(tmp_path):
    save_tiny(tmp_path, tiny_config("hrm_text", **OWN.get("hrm_text", {})))
    checkpoint = Checkpoint(tmp_path)
    skeleton, model = checkpoint.skeleton(torch.float32), checkpoint.skeleton(torch.float32)
    mlp = next(module for name, module in model.named_modules() if name.endswith(".mlp"))
    mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UserError, match=r"1 tensors of the weights have no place .*mlp\.gate_up_proj\.weight; is it"):
        WeightReader(model, tmp_path, checkpoint.stored, CPU, stages_of(skeleton))


def test_a_missing_shard_is_named(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    name = sorted(set(index["weight_map"].values()))[1]
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=rf"1 of \d+ weight files are missing: {name}"):
        Checkpoint(checkpoint)


def reader_of(folder, dtype=torch.float32, **options):
    checkpoint = Checkpoint(folder)
    return checkpoint.reader(checkpoint.skeleton(dtype), CPU, **options)


def load(folder, stream, **options):
    weights = Checkpoint(folder).weights(reader_of(folder, **options), stream=stream)
    for stage in range(5):
        weights.enter(stage)
    return weights.model


def test_the_plan_keeps_weights_where_they_fit():
    weights = WeightBytes(total=10**12, lasting=10**10, streamed=10**9)
    plenty, little = Room(bytes=10**13), Room(bytes=10**11)

    def chosen(choice, limit, room, **parts):
        return choose_residence(parts, weights, choice=choice, limit=limit, room=room)

    assert not chosen("auto", None, plenty).stream
    assert chosen("auto", None, little).stream
    assert chosen("auto", little.bytes, plenty).stream
    assert chosen("stream", None, plenty).stream
    assert "warning: a rank can have 100.00 GB here" in str(chosen("resident", None, little))
    assert "warning" not in str(chosen("auto", None, little))
    with pytest.raises(UserError, match=r"resident needs at least 100\d\.\d\d GB, --weights stream 11\.\d\d GB"):
        chosen("resident", little.bytes, plenty)
    with pytest.raises(UserError, match=r"--memory-limit 1\.00 GB .* stream needs at least 11\.\d\d GB"):
        chosen("auto", 10**9, plenty)


def test_what_is_in_the_node_s_memory_does_not_count_against_a_device():
    weights = WeightBytes(total=10**10, lasting=10**9, streamed=10**9)
    parts = {"KV writer": 8 * 10**9, "logits": 10**9}
    on_cpu = choose_residence(
        parts, weights, choice="auto", limit=None, room=Room(bytes=20 * 10**9, program_bytes=2 * 10**9)
    )  # fmt: skip
    assert on_cpu.parts == {"program": 2 * 10**9, **parts, "weights": 2 * 10**9}
    assert (on_cpu.stream, on_cpu.host_parts, on_cpu.total) == (True, {}, 13 * 10**9)
    room = Room(bytes=12 * 10**9, host_bytes=9 * 10**9, program_bytes=2 * 10**9)
    on_gpu = choose_residence(parts, weights, choice="auto", limit=None, room=room)
    assert (on_gpu.stream, on_gpu.parts) == (False, {"logits": 10**9, "weights": 10**10})
    assert on_gpu.host_parts == {"program": 2 * 10**9, "KV writer": 8 * 10**9}
    assert str(on_gpu) == (
        "memory per rank: about 11.00 GB (weights all in memory; logits 1.00, weights 10.00); of the node's: about "
        "10.00 GB (program 2.00, KV writer 8.00); warning: a rank can have 9.00 GB here, use more ranks or nodes"
    )


def test_sizes():
    assert [parse_bytes(t, "--memory-limit") for t in ("8GB", "1.5 tb", "800M", "7")] == [
        8 * 10**9,
        15 * 10**11,
        8 * 10**8,
        7,
    ]
    for bad in ("", "GB", "8XB", "-1GB", "0", "inf"):
        with pytest.raises(UserError, match="--memory-limit"):
            parse_bytes(bad, "--memory-limit")


def test_the_probe_needs_no_weights(checkpoint):
    layers = probe(Checkpoint(checkpoint).skeleton(torch.float32))
    assert len(layers) == 4
    assert (layers[0].heads.query_heads, layers[0].heads.kv_heads, layers[0].heads.key_dim) == (4, 2, 8)
