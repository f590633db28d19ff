"""The sums tell checkpoints apart, and say what is missing from a folder that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpmpi.errors import UserError
from cpmpi.model.fingerprint import BLOCK_BYTES, BLOCKS, model_sha256, tokenizer_sha256


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file({"w": torch.arange(6.0)}, tmp_path / "model.safetensors")
    return tmp_path


def flip(file: Path, offset: int) -> None:
    """Change one byte; a negative offset counts from the end."""
    with file.open("r+b") as stream:
        stream.seek(offset, 2 if offset < 0 else 0)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def split(checkpoint: Path, names: dict[str, str]) -> None:
    """Replace the single weight file by an index."""
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def refusal(checkpoint: Path) -> str:
    with pytest.raises(UserError) as refused:
        model_sha256(checkpoint)
    return str(refused.value)


def test_the_tokenizer_sum_is_over_names_and_bytes(checkpoint: Path) -> None:
    before = tokenizer_sha256(checkpoint)
    assert len(before) == 64
    (checkpoint / "chat_template.jinja").write_text("hi")
    assert tokenizer_sha256(checkpoint) == before
    (checkpoint / "added_tokens.json").write_text("{}")
    with_added = tokenizer_sha256(checkpoint)
    (checkpoint / "added_tokens.json").rename(checkpoint / "special_tokens_map.json")
    renamed = tokenizer_sha256(checkpoint)
    flip(checkpoint / "tokenizer.json", 4)
    assert len({before, with_added, renamed, tokenizer_sha256(checkpoint)}) == 4


def test_no_tokenizer_has_an_empty_sum(tmp_path: Path) -> None:
    assert tokenizer_sha256(tmp_path) == ""


@pytest.mark.parametrize(("file", "offset"), [("config.json", 2), ("model.safetensors", 10), ("model.safetensors", -1)])
def test_the_model_sum_is_over_config_header_and_content(checkpoint: Path, file: str, offset: int) -> None:
    before = model_sha256(checkpoint)
    assert model_sha256(checkpoint) == before
    flip(checkpoint / file, offset)
    assert len(before) == 64
    assert model_sha256(checkpoint) != before


def test_a_large_file_is_sampled(checkpoint: Path) -> None:
    save_file({"w": torch.zeros(2 * BLOCKS * BLOCK_BYTES, dtype=torch.uint8)}, checkpoint / "model.safetensors")
    before = model_sha256(checkpoint)
    # The first block ends one MiB into the content; the second begins a seventeenth of the way in, past two MiB.
    flip(checkpoint / "model.safetensors", 3 * BLOCK_BYTES // 2)
    assert model_sha256(checkpoint) == before
    flip(checkpoint / "model.safetensors", -BLOCK_BYTES)
    last = model_sha256(checkpoint)
    flip(checkpoint / "model.safetensors", BLOCK_BYTES // 2)
    first = model_sha256(checkpoint)
    with (checkpoint / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    assert len({before, last, first, model_sha256(checkpoint)}) == 4


def test_all_shards_of_an_index_count(checkpoint: Path) -> None:
    save_file({"a": torch.zeros(2)}, checkpoint / "one.safetensors")
    save_file({"b": torch.zeros(2)}, checkpoint / "two.safetensors")
    split(checkpoint, {"b": "two.safetensors", "a": "one.safetensors"})
    before = model_sha256(checkpoint)
    flip(checkpoint / "two.safetensors", -1)
    assert model_sha256(checkpoint) != before


def test_folders_that_are_no_checkpoints(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert refusal(checkpoint) == (f"{weights}: not a whole safetensors file: 10 bytes, and a header of 1000 bytes")
    save_file({"a": torch.zeros(2)}, checkpoint / "one.safetensors")
    split(checkpoint, {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"})
    assert refusal(checkpoint) == (f"{checkpoint}: 2 of 3 weight files are missing: three.safetensors, two.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        assert refusal(checkpoint) == f"{index}: not an index of safetensors files: no readable weight_map"
    index.unlink()
    assert refusal(checkpoint) == (
        f"{checkpoint}: no weights there: neither model.safetensors nor model.safetensors.index.json"
    )
    (checkpoint / "config.json").unlink()
    assert refusal(checkpoint) == f"{checkpoint}: no config.json there: not a checkpoint folder"
