"""Which checkpoint and which tokenizer a run was made with, as SHA-256 sums that are quick to take.

They tell checkpoints apart so that a run is resumed or extended with the model that began it. They do not vouch for the
integrity of the weights: ``model_sha256`` reads a sample.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from cpmpi.documents.tokenization import tokenizer_files
from cpmpi.errors import UserError
from cpmpi.model.weight_files import weight_files

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
