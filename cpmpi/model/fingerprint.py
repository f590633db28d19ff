"""Which checkpoint and which tokenizer a run was made with, as SHA-256 sums that are quick to take.

They tell checkpoints apart so that a run is resumed or extended with the model that began it. They do not vouch for the
integrity of the weights: ``model_sha256`` reads a sample.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cpmpi.documents.tokenization import tokenizer_files
from cpmpi.errors import UserError

BLOCK_BYTES = 1 << 20
BLOCKS = 18


def tokenizer_sha256(checkpoint: Path) -> str:
    """Over the names and bytes of the tokenizer's files; empty for a folder without any.

    A chat template is no part of it: it does not change the tokens of a text.
    """
    files = tokenizer_files(checkpoint)
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        _add(digest, file.name, file.read_bytes())
    return digest.hexdigest()


def model_sha256(checkpoint: Path) -> str:
    """Over config.json, and of each weight file its name, size, safetensors header and a sample of its content.

    The sample is ``BLOCKS`` blocks of 1 MiB: the first, the last, and 16 evenly spaced between; a file of up to 18 MiB
    is read whole. So any change of architecture, of tensor names, shapes, dtypes or order, and any retraining, which
    moves nearly all weights, gives another sum. A change of single tensors or bytes between the blocks does not.
    Rewriting config.json with the same content in other bytes gives another sum, too.

    Raises:
        UserError: there is no config.json, no safetensors weights, a missing or a broken weight file.
    """
    config = checkpoint / "config.json"
    if not config.is_file():
        raise UserError(f"{checkpoint}: no config.json there: not a checkpoint folder")
    digest = hashlib.sha256()
    _add(digest, config.name, config.read_bytes())
    for file in weight_files(checkpoint):
        _add(digest, file.name, *_sample(file))
    return digest.hexdigest()


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files that transformers loads from the folder, sorted by name.

    Raises:
        UserError: there are none, the index is broken, or a file that it names is missing.
    """
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{checkpoint}: no weights there: neither {single.name} nor {index.name}")
    try:
        files = [checkpoint / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files: no readable weight_map") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{checkpoint}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing)}")
    return files


def check_whole(file: Path) -> None:
    """Check that a safetensors file is as long as its header says; reads the header alone.

    Raises:
        UserError: the file was cut short or is not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_bytes) if 8 + header_bytes <= size else b"")
            content = max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: not a safetensors file, or cut short: no readable header in {size} bytes"
            ) from error
    if 8 + header_bytes + content != size:
        raise UserError(f"{file}: has {size} bytes where its header asks for {8 + header_bytes + content}: cut short?")


def _sample(file: Path) -> list[bytes]:
    """The file's size, its header, and the sampled blocks of what follows."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        content_bytes = size - 8 - header_bytes
        if content_bytes < 0:
            raise UserError(f"{file}: not a whole safetensors file: {size} bytes, and a header of {header_bytes} bytes")
        parts = [str(size).encode(), stream.read(header_bytes)]
        if content_bytes <= BLOCKS * BLOCK_BYTES:
            return [*parts, stream.read()]
        for block in range(BLOCKS):
            stream.seek(8 + header_bytes + (content_bytes - BLOCK_BYTES) * block // (BLOCKS - 1))
            parts.append(stream.read(BLOCK_BYTES))
    return parts


def _add(digest: Any, name: str, *parts: bytes) -> None:
    """Add a file's parts, each with its length before it: parts cannot be mistaken for others joined differently."""
    for part in (name.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
