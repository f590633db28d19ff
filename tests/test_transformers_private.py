"""What cpmpi uses of transformers beyond its documentation does what is expected: a test for each of those names.

When a new transformers fails here, setup.py does not allow it. ``tests/test_loading.py`` compares the whole.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpmpi.model import transformers_private as private
from cpmpi.model.checkpoint import Blueprint
from tests.conftest import ROOT
from tests.sweep import OWN
from tests.tiny_models import tiny_config


def skeleton(model_type, dtype=torch.float32, **own):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        config = tiny_config(model_type, **{**OWN.get(model_type, {}), **own})
        file.write_text(json.dumps({**config.to_dict(), "model_type": model_type}))
        return Blueprint(file).skeleton(dtype)


def test_the_transformers_here_is_one_that_setup_allows():
    """Its private names may change with every minor release; pip refuses the pinned one where setup.py does not."""
    (allowed,) = re.findall(r'"transformers>=5\.(\d+),<5\.(\d+)"', (ROOT / "setup.py").read_text())
    (pinned,) = re.findall(r"^transformers==5\.(\d+)\.\d+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    least, beyond = map(int, allowed)
    assert least <= int(pinned) < beyond
    major, minor, *_ = version("transformers").split(".")
    assert major == "5"
    assert least <= int(minor) < beyond


def test_private_names_are_in_one_file():
    """No other file of cpmpi touches a name of transformers that begins with an underscore, or its inner modules."""
    names = (
        r"_model_mapping|_is_hf_initialized|_get_dtype_plan|_keys_to_ignore|_keep_in_fp32|tie_weights|core_model_loading|conversion_mapping"
        r"|rename_source_key|dot_natural_key|WeightRenaming\(|\.add_tensor\(|MergeModulelist|\"Concatenate\""
    )
    used = [p.name for p in (ROOT / "cpmpi").rglob("*.py") if re.search(names, p.read_text())]
    assert used == ["transformers_private.py"]


def test_is_causal_lm():
    from transformers import CONFIG_MAPPING

    assert private.is_causal_lm(tiny_config("llama"))
    assert not private.is_causal_lm(CONFIG_MAPPING["clip_vision_model"]())


def test_not_to_initialize():
    """No random numbers are drawn for a skeleton's weights, but by torch's embedding itself; buffers are made."""
    drawn = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            drawn.extend([func] if "normal_" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        model = skeleton("gemma3_text")
        assert len(drawn) == sum(isinstance(module, torch.nn.Embedding) for module in model.modules())
        assert all(p.is_meta for p in model.parameters())
        assert not any(b.is_meta for b in model.buffers())


def test_kept_in_float32():
    model = skeleton("ernie4_5_moe", torch.bfloat16)
    assert private.kept_in_float32(skeleton("llama"), torch.bfloat16) is None
    assert private.kept_in_float32(model, torch.float32) is None
    kept = private.kept_in_float32(model, torch.bfloat16)
    found = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert found == {name for name in model.state_dict() if kept.search(name)}
    assert found


def test_tie():
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for missing in (head, embedding):
        model = skeleton("llama", tie_word_embeddings=True)
        for part in (model.lm_head, model.model.embed_tokens):
            part.weight = torch.nn.Parameter(torch.randn(part.weight.shape))
        kept = (model.lm_head if missing == embedding else model.model.embed_tokens).weight
        assert private.tie(model, {missing}) == set()
        assert model.lm_head.weight is kept
        assert model.model.embed_tokens.weight is kept
    model = skeleton("llama", tie_word_embeddings=True)
    assert private.tie(model, {head, embedding, "other"}) == {head, embedding, "other"}
    assert private.tie(skeleton("llama", tie_word_embeddings=False), {head}) == {head}


def test_tie_leaves_what_differs_without_a_word_and_the_log_level_as_it_was(capfd):
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.INFO)
    try:
        model = skeleton("llama", tie_word_embeddings=True)
        for part in (model.lm_head, model.model.embed_tokens):
            part.weight = torch.nn.Parameter(torch.randn(part.weight.shape))
        private.tie(model, ())
        assert theirs.get_verbosity() == logging.INFO
    finally:
        theirs.set_verbosity(before)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "tie" not in capfd.readouterr().err


def test_may_be_missing():
    model = skeleton("llama")
    assert model._keys_to_ignore_on_load_missing == set(), "what the class says, and its parts, once it is made"
    assert not private.may_be_missing(model).search("model.norm.weight")
    model._keys_to_ignore_on_load_missing = {"final_logits_bias", r"norm\."}
    assert private.may_be_missing(model).search("model.norm.weight")
    assert not private.may_be_missing(model).search("model.weight")


def test_may_be_unexpected():
    gpt2, llama = (private.may_be_unexpected(skeleton(t)) for t in ("gpt2", "llama"))
    assert gpt2.search("transformer.h.0.attn.bias")
    assert not gpt2.search("transformer.h.0.attn.rotary_emb.inv_freq"), "it has none"
    assert llama.search("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not llama.search("model.layers.0.self_attn.bias")
    assert not llama.search("position_ids")
    model = torch.nn.Module()
    model._keys_to_ignore_on_load_unexpected = None
    model.register_buffer("embeddings_position_ids", torch.zeros(1))
    pattern = private.may_be_unexpected(model)
    assert pattern.search("position_ids")
    assert pattern.search("a.position_ids")
    assert not pattern.search("my_position_ids")


def places(model, *keys):
    return {to.key: to for to in private.destinations(model, keys)}


def test_destinations_rename_and_add_the_prefix():
    model = skeleton("llama")
    norm, layer = "model.norm.weight", "layers.1.mlp.up_proj.weight"
    found = places(model, norm, layer, "nonesuch")
    assert found[norm].targets == [norm]
    assert found[layer].targets == [f"model.{layer}"]
    assert found["nonesuch"].targets == ["nonesuch"]
    assert [to.conversion is None for to in found.values()] == [False, False, True]
    value = torch.randn(3)
    made = private.convert(found[layer].conversion, model, f"model.{layer}", [(layer, layer, lambda: value)])
    assert made.keys() == {f"model.{layer}"}
    assert torch.equal(made[f"model.{layer}"], value)


def test_a_renaming_that_leads_nowhere_is_not_made(monkeypatch):
    """As transformers does: what the model has under its stored name keeps it."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renaming = WeightRenaming("norm", "nonesuch")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [renaming])
    found = places(skeleton("llama"), "model.norm.weight", "norm.bias")
    assert found["model.norm.weight"].targets == ["model.norm.weight"]
    assert found["model.norm.weight"].conversion is not None
    assert found["norm.bias"].targets == ["nonesuch.bias"]
    assert found["norm.bias"].conversion is None


def test_destinations_join_experts():
    model, name = skeleton("qwen3_moe"), "model.layers.1.mlp.experts"
    keys = [f"{name}.{i}.{part}_proj.weight" for i in range(12) for part in ("gate", "up")]
    found = places(model, *reversed(keys))
    assert {tuple(to.targets) for to in found.values()} == {(f"{name}.gate_up_proj",)}
    assert private.operations(found[keys[0]].conversion) == [private.MERGE, private.CONCATENATE]
    values = {key: torch.randn(2, 3) for key in keys}
    parts = [(key, to.pattern, lambda key=key: values[key]) for key, to in found.items()]
    for _ in range(2):  # a conversion is left as it was
        made = private.convert(found[keys[0]].conversion, model, f"{name}.gate_up_proj", parts)[f"{name}.gate_up_proj"]
        gate, up = (torch.stack([values[f"{name}.{i}.{p}_proj.weight"] for i in range(12)]) for p in ("gate", "up"))
        assert torch.equal(made, torch.cat([gate, up], 1)), "by the experts' numbers, not in the order of strings"


def test_a_conversion_is_used_by_several_threads_at_once():
    """Groups of one kind share it: what one adds to it is not the other's, even amid the other's conversion."""
    model = skeleton("qwen3_moe")
    names = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    keys = {name: [f"{name}.{i}.down_proj.weight" for i in range(4)] for name in names}
    found = places(model, *keys[names[0]], *keys[names[1]])
    assert found[keys[names[0]][0]].conversion is found[keys[names[1]][0]].conversion
    values = {key: torch.randn(2, 3) for key in found}
    made = {}

    def convert(name, amid=lambda: None):
        def parts():
            for i, key in enumerate(keys[name]):
                if i == 2:
                    amid()
                yield key, found[key].pattern, lambda key=key: values[key]

        made.update(private.convert(found[keys[name][0]].conversion, model, f"{name}.down_proj", parts()))

    convert(names[0], amid=lambda: convert(names[1]))
    for name in names:
        assert torch.equal(made[f"{name}.down_proj"], torch.stack([values[key] for key in keys[name]]))


def test_destinations_split_what_is_stored_together():
    model, name = skeleton("hrm_text"), "model.layers.0.mlp"
    modules = [n for n, _ in model.named_modules() if n.endswith(".mlp")]
    name = modules[0]
    found = places(model, f"{name}.gate_up_proj.weight")[f"{name}.gate_up_proj.weight"]
    assert found.targets == [f"{name}.gate_proj.weight", f"{name}.up_proj.weight"]
    gate_up = torch.randn(8, 3)
    made = private.convert(found.conversion, model, found.targets[0], [(found.key, found.pattern, lambda: gate_up)])
    assert [made[target].tolist() for target in found.targets] == [gate_up[:4].tolist(), gate_up[4:].tolist()]
    beyond = found.key.replace(".0.", ".99.")
    odd = private.unexpected(model, places(model, beyond).values())
    assert odd == {beyond: [target.replace(".0.", ".99.") for target in found.targets]}


def test_rotary_embeddings_say_their_type():
    """`cpmpi.model.rotary` asks the modules; a model whose frequencies depend on the length is told by it."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = skeleton("llama", rope_parameters=dynamic)
    assert [m.rope_type for m in model.modules() if hasattr(m, "rope_type")] == ["dynamic"]


def test_attention_functions_are_called_as_documented():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    assert callable(AttentionInterface.register)
    assert callable(AttentionMaskInterface.register)
    assert {"mask_function", "attention_mask", "local_size"} <= inspect.signature(sdpa_mask).parameters.keys()
