"""Configs and weight files that are damaged or absurd: one line that names the file, before anything is built."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Blueprint, Checkpoint
from cpmpi.model.weight_files import stored_tensors
from tests.tiny_models import tiny_config

A = {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
DAMAGED: dict[str, dict[str, Any]] = {
    "length beyond the file": {"length": 1 << 20},
    "length beyond all files": {"length": 1 << 63},
    "length within the header": {"length": 5},
    "length zero": {"length": 0},
    "not JSON": {"header": b"{not json}"},
    "not UTF-8": {"header": b"\xff\xfe{}"},
    "not an object": {"header": b"[1, 2]"},
    "no offsets": {"header": {"a": {"dtype": "F32", "shape": [16]}}},
    "overlapping": {"header": {**A, "b": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}},
    "a hole": {"header": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}},
    "reversed": {"header": {"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}},
    "unknown type": {"header": {"a": {"dtype": "F33", "shape": [16], "data_offsets": [0, 64]}}},
    "another type": {"header": {"a": {"dtype": "F16", "shape": [16], "data_offsets": [0, 64]}}},
    "another shape": {"header": {"a": {"dtype": "F32", "shape": [17], "data_offsets": [0, 64]}}},
    "cut short": {"body": bytes(60)},
    "too long": {"body": bytes(70)},
    "empty": {"whole": b""},
    "a few bytes": {"whole": b"abc"},
    "a pointer to the file": {"whole": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_weight_file_is_named(damage: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"header": A, "body": bytes(64), "length": None, "whole": None, **DAMAGED[damage]}
    header = given["header"] if isinstance(given["header"], bytes) else json.dumps(given["header"]).encode()
    length = len(header) if given["length"] is None else given["length"]
    content = struct.pack("<Q", length) + header + given["body"] if given["whole"] is None else given["whole"]
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(content)
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        Checkpoint(tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{weights}: damaged, or cut short to {len(content):,} bytes: ")
    assert len(line.splitlines()) == 1


def test_a_whole_weight_file_is_listed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = stored_tensors(tmp_path)
    assert {key: (t.path.name, t.dtype, t.shape) for key, t in found.items()} == {
        "a": ("model.safetensors", "F32", [2, 3]), "b": ("model.safetensors", "BF16", []),
    }  # fmt: skip


def config_file(folder: Path, model_type: str = "llama", **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**tiny_config(model_type).to_dict(), **changes}))
    return file


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("llama", "num_hidden_layers", 10**8), ("gpt2", "n_layer", 10**8), ("llama", "num_hidden_layers", 1e8),
        ("qwen3_moe", "num_experts", 10**8), ("deepseek_v3", "n_routed_experts", 10**8),
    ],
)  # fmt: skip
def test_a_config_of_a_hundred_million_layers_is_refused_before_it_is_built(
    model_type: str, field: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    file = config_file(tmp_path, model_type, **{field: value})
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it is built"))
    with pytest.raises(UserError, match=rf"^{file}: {field} is {value:,}; at most 4,096 are taken for a real model$"):
        Blueprint(tmp_path)


def test_the_bound_holds_in_the_parts_of_a_config(tmp_path: Path) -> None:
    nested = {**tiny_config("gemma3").text_config.to_dict(), "num_hidden_layers": 10**8}
    with pytest.raises(UserError, match=r"config\.json: num_hidden_layers is 100,000,000; at most 4,096"):
        Blueprint(config_file(tmp_path, "gemma3", text_config=nested))


def test_other_large_numbers_are_no_counts(tmp_path: Path) -> None:
    large = {"vocab_size_per_layer_input": 262_144, "max_position_embeddings": 10**7, "layer_types": None}
    Blueprint(config_file(tmp_path, "gemma4_text", **large))


@pytest.mark.parametrize("layers", [0, -3])
def test_a_config_without_layers_says_so(layers: int, tmp_path: Path) -> None:
    file = config_file(tmp_path, num_hidden_layers=layers)
    line = rf"llama has {layers} layers \(num_hidden_layers\) in its config; it takes at least 1$"
    with pytest.raises(UserError, match=line):
        Blueprint(file)
