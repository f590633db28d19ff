"""The sums tell checkpoints apart, and say what is missing from a folder that is none."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from cpmpi.errors import UserError
from cpmpi.model import file_digests
from cpmpi.model.fingerprint import model_sha256, tokenizer_sha256


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


def test_every_byte_counts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 100 bytes, read 30 at a time: what lies at their edges counts as the rest."""
    monkeypatch.setattr(file_digests, "BLOCK_BYTES", 100)
    monkeypatch.setattr(file_digests, "READ_BYTES", 30)
    weights = checkpoint / "model.safetensors"
    save_file({"w": torch.arange(200, dtype=torch.uint8)}, weights)
    size = weights.stat().st_size
    assert size > 200
    sums = {model_sha256(checkpoint)}
    for offset in range(size):
        flip(weights, offset)
        sums.add(model_sha256(checkpoint))
        flip(weights, offset)
    swapped = weights.read_bytes()
    weights.write_bytes(swapped[100:200] + swapped[:100] + swapped[200:])
    sums.add(model_sha256(checkpoint))
    assert len(sums) == 1 + size + 1


def test_the_model_sum_is_what_its_documentation_says(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "BLOCK_BYTES", 64)
    config, weights = ((checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors"))
    blocks = [weights[i : i + 64] for i in range(0, len(weights), 64)]
    sums = b"".join(xxhash.xxh3_128_digest(block) for block in blocks)
    parts = [b"config.json", config, b"model.safetensors", str(len(weights)).encode(), sums]
    expected = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert model_sha256(checkpoint) == expected


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files that are read, with a cache of the test's own, in which all is kept at once."""
    files: list[Path] = []
    digest = file_digests._block_digest

    def note(block: file_digests.Block) -> bytes:
        files.append(block[0])
        return digest(block)

    monkeypatch.setattr(file_digests, "_block_digest", note)
    monkeypatch.setattr(file_digests, "SETTLED_S", -1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return files


def entries() -> list[Path]:
    return list((Path(os.environ["XDG_CACHE_HOME"]) / "cpmpi" / "digests").iterdir())


def test_sums_are_remembered_while_the_file_is_as_it_was(checkpoint: Path, reads: list[Path]) -> None:
    weights = checkpoint / "model.safetensors"
    before = model_sha256(checkpoint)
    assert model_sha256(checkpoint) == before
    assert reads == [weights]
    assert len(entries()) == 1
    times = weights.stat()
    flip(weights, -1)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_mtime_ns == times.st_mtime_ns
    assert model_sha256(checkpoint) != before, "a change whose time was set back"
    flip(weights, -1)
    assert model_sha256(checkpoint) == before
    copy = weights.with_name("copy")
    copy.write_bytes(weights.read_bytes())
    copy.replace(weights)  # another inode of the same name
    reads.clear()
    assert model_sha256(checkpoint) == before
    assert reads == [weights]
    (checkpoint / "config.json").write_text("{}")
    assert model_sha256(checkpoint) != before
    assert reads == [weights]


@pytest.mark.parametrize("field", ["path", "size", "inode", "mtime_ns", "ctime_ns", "block_bytes"])
def test_another_state_is_not_the_file(checkpoint: Path, reads: list[Path], field: str) -> None:
    before = model_sha256(checkpoint)
    (entry,) = entries()
    entry.write_text(json.dumps({**json.loads(entry.read_text()), field: 1, "xxh3_128": "00" * 16}))
    assert model_sha256(checkpoint) == before
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"xxh3_128": 1}', '{"xxh3_128": "0"}', None])
def test_a_broken_cache_is_none(checkpoint: Path, reads: list[Path], content: str | None) -> None:
    before = model_sha256(checkpoint)
    (entry,) = entries()
    short = {**json.loads(entry.read_text()), "xxh3_128": "00" * 15}
    entry.write_text(json.dumps(short) if content is None else content)
    assert model_sha256(checkpoint) == before
    assert len(reads) == 2


def test_without_a_place_for_it_there_is_no_cache(
    checkpoint: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = model_sha256(checkpoint)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be written there
    assert model_sha256(checkpoint) == before
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert model_sha256(checkpoint) == before
    assert len(reads) == 3


def test_what_changed_just_now_is_not_remembered(
    checkpoint: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_S", 1e9)
    assert model_sha256(checkpoint) == model_sha256(checkpoint)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, weights = file_digests._block_digest, checkpoint / "model.safetensors"

    def write_meanwhile(block: file_digests.Block) -> bytes:
        found = digest(block)
        with weights.open("ab") as stream:
            stream.write(b"more")
        return found

    monkeypatch.setattr(file_digests, "_block_digest", write_meanwhile)
    assert refusal(checkpoint) == f"{weights}: changed while it was read; is it still being written?"


@pytest.mark.mpi(3)
def test_ranks_read_a_share_each_and_agree(tmp_path, monkeypatch):
    from mpi4py import MPI

    from cpmpi.comm.ranks import AgreedError, Ranks
    from tests.test_exact import shared_folder

    folder, comm = shared_folder(tmp_path), MPI.COMM_WORLD
    weights, digest, read = folder / "model.safetensors", file_digests._block_digest, []
    monkeypatch.setattr(file_digests, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(file_digests, "SETTLED_S", 1e9)
    monkeypatch.setattr(file_digests, "_block_digest", lambda block: read.append(block) or digest(block))
    if comm.rank == 0:
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.arange(1750.0)}, weights)  # eight blocks
    comm.Barrier()
    ranks = Ranks(comm)
    together = model_sha256(folder, ranks)
    assert len(read) == (3, 3, 2)[comm.rank]
    assert model_sha256(folder) == together
    if comm.rank == 1:
        monkeypatch.setattr(file_digests, "_block_digest", lambda block: digest((folder / "gone", 0)))
    with pytest.raises(AgreedError, match=r"rank 1/3: .*gone: cannot be read: "):
        model_sha256(folder, ranks)
    with pytest.raises(AgreedError, match=r"no config\.json there"):
        model_sha256(folder / "none", ranks)


def test_all_shards_of_an_index_count(checkpoint: Path) -> None:
    save_file({"a": torch.zeros(2)}, checkpoint / "one.safetensors")
    save_file({"b": torch.zeros(2)}, checkpoint / "two.safetensors")
    split(checkpoint, {"b": "two.safetensors", "a": "one.safetensors"})
    before = model_sha256(checkpoint)
    flip(checkpoint / "two.safetensors", -1)
    assert model_sha256(checkpoint) != before


def test_folders_that_are_no_checkpoints(checkpoint: Path) -> None:
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
