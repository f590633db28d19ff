"""Weights are loaded as transformers loads them, bit for bit; what it calls unexpected is refused by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpmpi.errors import UserError
from cpmpi.model.attention_call import ATTENTION
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.transformers_private import destinations, unexpected
from tests.sweep import OWN, cases, is_supported
from tests.tiny_models import save_tiny, tiny_config

CPU = torch.device("cpu")
# Renamed, converted (experts in one weight), nested, tied, kept in float32, with ignorable tensors and with none.
FEW = ["llama", "qwen3_moe", "gemma3", "gpt2", "gpt_neox", "glm4_moe", "deepseek_v3", "phi", "opt"]


def theirs(folder, dtype=torch.float32):
    """The model that transformers loads, with cpmpi's attention, and what it reports."""
    from transformers import AutoModelForCausalLM

    from cpmpi.model.forward import register

    register()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=ATTENTION, output_loading_info=True
    )


def ours(folder, dtype=torch.float32):
    checkpoint = Checkpoint(folder)
    return checkpoint.weights(checkpoint.reader(checkpoint.skeleton(dtype), CPU), stream=False).model


def tensors(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def add_odd(folder):
    """Add tensors that a model may have no place for; their names."""
    stored = tensors(folder)
    weights = [key for key in stored if key.endswith(".weight") and ".experts." not in key]
    odd = {
        "nonesuch.weight", "position_ids", "lm_head.nonesuch", "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.masked_bias", "rotary_emb.inv_freq", "model.position_ids",
        *(re.sub(r"^(\D*)\.0\.", r"\1.99.", key) for key in stored),
        *(f"{key.removesuffix('weight')}bias" for key in weights),
    } - stored.keys()  # fmt: skip
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({**stored, **{name: torch.zeros(2) for name in odd}}, folder / "model.safetensors", {"format": "pt"})
    return odd


def check_case(folder, model_type, own):
    """A small checkpoint of a type: bit-equal in both types, and the same tensors unexpected."""
    config = tiny_config(model_type, **own)
    save_tiny(folder, config, seed=1)
    config.save_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        check_equal(ours(folder, dtype), theirs(folder, dtype)[0], (model_type, dtype))
    add_odd(folder)
    checkpoint = Checkpoint(folder)
    model = checkpoint.skeleton(torch.float32)
    found = unexpected(model, destinations(model, checkpoint.stored))
    reported = theirs(folder)[1]["unexpected_keys"]
    assert {name for names in found.values() for name in names} == reported, model_type
    assert reported
    with pytest.raises(UserError, match=rf"{len(found)} tensors of the weights have no place in the model"):
        checkpoint.reader(model, CPU)


def check_equal(model, expected, what):
    """All parameters and buffers, and their types."""
    found, wanted = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, expected))
    assert found.keys() == wanted.keys(), what
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, (*what, name)
        assert torch.equal(tensor.nan_to_num(), wanted[name].nan_to_num()), (*what, name)
    assert found


@pytest.mark.parametrize("model_type", FEW)
def test_some_models_load_as_transformers_loads_them(model_type, tmp_path):
    check_case(tmp_path, model_type, OWN.get(model_type, {}))


@pytest.mark.slow
@pytest.mark.mpi(2)
def test_every_model_loads_as_transformers_loads_it(tmp_path):
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm, tried = MPI.COMM_WORLD, 0
    for i, case in list(enumerate(cases()))[comm.rank :: comm.size]:
        if is_supported(case, tmp_path / f"{i}"):
            check_case(tmp_path / f"{i}", case.model_type, case.own)
            tried += 1
    assert comm.allreduce(tried) > 100


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def reader_of(folder):
    checkpoint = Checkpoint(folder)
    return checkpoint.reader(checkpoint.skeleton(torch.float32), CPU)


def test_a_config_with_fewer_layers_than_the_weights_is_refused(tmp_path):
    save_tiny(tmp_path, tiny_config("llama", num_hidden_layers=3), max_shard_size="20KB")
    edit_config(tmp_path, num_hidden_layers=2)
    message = (
        r"9 tensors of the weights have no place in the model that config\.json describes: "
        r"model\.layers\.2\.input_layernorm\.weight, .* and 5 more; is it the config of these weights\?"
    )
    with pytest.raises(UserError, match=message):
        reader_of(tmp_path)


def test_biases_that_the_config_leaves_out_are_refused(tmp_path):
    save_tiny(tmp_path, tiny_config("llama", attention_bias=True, num_hidden_layers=1))
    edit_config(tmp_path, attention_bias=False)
    with pytest.raises(UserError, match=r"4 tensors .* no place .*: model\.layers\.0\.self_attn\.k_proj\.bias, "):
        reader_of(tmp_path)


def test_experts_that_the_config_leaves_out_are_refused(tmp_path):
    save_tiny(tmp_path, tiny_config("qwen3_moe", num_hidden_layers=1))
    edit_config(tmp_path, num_local_experts=3)
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.mlp\.experts\.\w+ has the wrong shape: \(4, "):
        reader_of(tmp_path)


def test_what_transformers_says_may_be_there_is_no_problem(tmp_path):
    save_tiny(tmp_path, tiny_config("gpt2"))
    stored = load_file(tmp_path / "model.safetensors")
    stored["transformer.h.0.attn.bias"] = torch.zeros(1)  # declared by GPT-2
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    reader_of(tmp_path)
    save_tiny(tmp_path / "llama", tiny_config("llama"))
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)  # of older checkpoints of any model
    save_file(stored, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    reader_of(tmp_path / "llama")
