"""Checkpoints inside a document: the hidden state after a layer, beside the KV written so far.

    checkpoints/0123456789ab-layer-00017-rank-00000.h5    a rank's rows of the hidden state (`cpmpi.run.hidden`)
    checkpoints/0123456789ab-layer-00017.json             the manifest, written last: the checkpoint is whole

The name begins with the document's identity, of which model, type and tokens decide: a checkpoint is found whatever the
list of documents, the ranks and the schedule are when the job goes on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from cpmpi.errors import UserError
from cpmpi.run.manifest import Manifest
from cpmpi.run.paths import CHECKPOINT, IDENTITY_DIGITS, RunPaths
from cpmpi.run.publish import TEMPORARY_SUFFIX, publish_text, sync_path
from cpmpi.run.spec import DocumentSpec, RunSpec


def identity_of(run: RunSpec, document: DocumentSpec) -> str:
    """What decides a document's hidden states: model, type to compute in, tokens and the one before them; as 64
    hexadecimal digits."""
    before = [str(run.scoring.prefix_token_id)] * run.scoring.prefix
    text = "\n".join((run.model_sha256, run.dtype, document.token_ids_sha256, *before))
    return hashlib.sha256(text.encode()).hexdigest()


def publish(folder: Path, manifest: Manifest) -> None:
    """Say that a checkpoint is whole, then delete the older ones. On one rank, once all files are durable."""
    publish_text(RunPaths(folder).checkpoint(manifest.identity, manifest.layer), manifest.text())
    delete(folder, manifest.identity, before=manifest.layer)


def find(folder: Path, identity: str) -> list[tuple[Path, Manifest | UserError]]:
    """The checkpoints of a document, the latest first: what their manifests say, or why that cannot be known."""
    found: list[tuple[Path, Manifest | UserError]] = []
    for path, name in sorted(_all(folder), key=lambda entry: int(entry[1]["layer"]), reverse=True):
        if path.suffix != ".json" or name["document"] != identity[:IDENTITY_DIGITS]:
            continue
        manifest = _read(path)
        if isinstance(manifest, Manifest) and (manifest.identity, manifest.layer) != (identity, int(name["layer"])):
            manifest = UserError(f"{path}: is a checkpoint of another document or layer")
        found.append((path, manifest))
    return found


def _read(path: Path) -> Manifest | UserError:
    try:
        return Manifest.read(path)
    except UserError as problem:
        return problem


def shard_sets(folder: Path) -> frozenset[int]:
    """Numbers of the sets of shards in which a checkpoint's KV lies."""
    manifests = (_read(path) for path, name in _all(folder) if path.suffix == ".json")
    return frozenset(found.kv.shard_set for found in manifests if isinstance(found, Manifest) and found.kv is not None)


def delete(folder: Path, identity: str, *, before: int | None = None, keep: int | None = None) -> None:
    """Delete checkpoints of a document, manifests first: of all layers, of those before one, or of all but one."""
    gone = [
        path
        for path, name in _all(folder)
        if name["document"] == identity[:IDENTITY_DIGITS]
        and (before is None or int(name["layer"]) < before)
        and int(name["layer"]) != keep
    ]
    _unlink(folder, gone)


def delete_others(folder: Path, identities: Collection[str]) -> None:
    """Delete all checkpoints but those of some documents."""
    kept = {identity[:IDENTITY_DIGITS] for identity in identities}
    _unlink(folder, [path for path, name in _all(folder) if name["document"] not in kept])


def _all(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """The files of all checkpoints, and what their names say; what a killed writer left among them."""
    checkpoints = RunPaths(folder).checkpoints
    paths = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    named = ((path, CHECKPOINT.fullmatch(path.name.removesuffix(TEMPORARY_SUFFIX))) for path in paths)
    return [(path, name) for path, name in named if name is not None]


def _unlink(folder: Path, paths: Sequence[Path]) -> None:
    for path in sorted(paths, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)
    if paths:
        sync_path(RunPaths(folder).checkpoints)
