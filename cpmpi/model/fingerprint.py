"""Which checkpoint and which tokenizer a run was made with: a SHA-256 sum of each.

They tell checkpoints apart so that a run is resumed or extended with the model that began it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpmpi.comm.ranks import Ranks
from cpmpi.documents.tokenization import tokenizer_files
from cpmpi.errors import UserError
from cpmpi.model.file_digests import call, digests_of
from cpmpi.model.weight_files import weight_files


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


class Fingerprint(NamedTuple):
    """What a checkpoint is: the sums of model and tokenizer, and of each file that counts, to say which one differs."""

    model_sha256: str
    tokenizer_sha256: str
    files: dict[str, str]
    """Name and digest: SHA-256 of the file, of a weight file over its size and the XXH3 sums of its blocks."""


def model_sha256(checkpoint: Path, ranks: Ranks | None = None) -> str:
    """SHA-256 over config.json, and over each weight file's name, size and the XXH3 sums of all its blocks.

    Every byte of the weights counts, through XXH3 sums of 128 bits for every 64 MiB (`cpmpi.model.file_digests`): any
    accident and any other training gives another sum. It is no signature: whoever may write the files could forge one.
    Rewriting config.json with the same content in other bytes gives another sum, too.

    Args:
        checkpoint: the folder.
        ranks: that read a share each; collective. None: this process reads all.

    Raises:
        UserError: there is no config.json, no safetensors weights, or a weight file is missing or cannot be read.
    """
    return fingerprint(checkpoint, ranks).model_sha256


def fingerprint(checkpoint: Path, ranks: Ranks | None = None) -> Fingerprint:
    """All sums of a checkpoint; see `model_sha256`."""
    on_root = call if ranks is None else ranks.on_root
    files = on_root(_model_files, checkpoint)
    return on_root(_fingerprint, checkpoint, files, digests_of(files[1:], ranks))


def _model_files(checkpoint: Path) -> list[Path]:
    """The config and the weight files."""
    config = checkpoint / "config.json"
    if not config.is_file():
        raise UserError(f"{checkpoint}: no config.json there: not a checkpoint folder")
    return [config, *weight_files(checkpoint)]


def _fingerprint(checkpoint: Path, files: Sequence[Path], sums: Sequence[bytes]) -> Fingerprint:
    config, *weights = files
    digest = hashlib.sha256()
    _add(digest, config.name, config.read_bytes())
    whole = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (config, *tokenizer_files(checkpoint))
    }
    for file, blocks in zip(weights, sums, strict=True):
        size = str(file.stat().st_size).encode()
        _add(digest, file.name, size, blocks)
        whole[file.name] = hashlib.sha256(size + b":" + blocks).hexdigest()
    return Fingerprint(digest.hexdigest(), tokenizer_sha256(checkpoint), whole)


def _add(digest: Any, name: str, *parts: bytes) -> None:
    """Add a file's parts, each with its length before it: parts cannot be mistaken for others joined differently."""
    for part in (name.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
