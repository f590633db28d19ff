"""Checkpoints inside a document: the hidden state after a layer, beside the KV written so far.

    checkpoints/0123456789ab-layer-00017-rank-00000.h5    a rank's rows of the hidden state
    checkpoints/0123456789ab-layer-00017.json             the manifest, written last: the checkpoint is whole

The name begins with the document's identity, of which model, type and tokens decide: a checkpoint is found whatever the
list of documents, the ranks and the schedule are when the job goes on.

A rank's file holds ``hidden`` (T, ...), its rows one run of positions after another, ``runs`` (P, 2) int64, start and
stop position of each run, and ``checksum`` (P,) uint64, xxh3_64 of the bytes of each run. Rows are found by position,
so that any number of ranks can read them. The manifest names every file with its size and the xxh3_64 of its checksums,
and carries a checksum of its own.

Legend: T tokens of a rank, P runs of positions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from h5py import h5t

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError, one_line
from cpmpi.run.hdf5 import (
    STORED_FLOATS,
    RawArray,
    create_contiguous,
    created_file,
    dataset_offset,
    open_file,
    pread_all,
    pwrite_all,
)
from cpmpi.run.paths import CHECKPOINT, IDENTITY_DIGITS, RunPaths
from cpmpi.run.publish import TEMPORARY_SUFFIX, make_folder, naming, publish_text, sync_path
from cpmpi.run.spec import DocumentSpec, RunSpec

FORMAT = "cpmpi-checkpoint"
FORMAT_VERSION = 1
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the manifest says of one rank's file.

    Attributes:
        name: relative to the run folder.
        size: bytes.
        digest: xxh3_64 of its checksums.
        kv_digest: xxh3_64 of the checksums, in the rank's shard, of the KV of all layers so far; 0 without KV.
    """

    name: str
    size: int
    digest: int
    kv_digest: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole checkpoint.

    Attributes:
        identity: of the document, see `identity_of`.
        layer: the last layer that is done.
        attention: the attention that comes next: so many layers' KV are done.
        n_tokens: of the document.
        shape, dtype: of a token's hidden state.
        seconds: of work on the document so far.
        parts: by rank.
    """

    identity: str
    layer: int
    attention: int
    n_tokens: int
    shape: tuple[int, ...]
    dtype: str
    seconds: float
    parts: tuple[Part, ...]

    def text(self) -> str:
        """As JSON, with a checksum."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**content, "xxh3": _digest(content)}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Manifest:
        """The manifest in a file.

        Raises:
            UserError: it is none, or damaged.
        """
        try:
            content = json.loads(path.read_bytes())
            digest = content.pop("xxh3")
            if digest != _digest(content):
                raise UserError(f"{path}: does not have its checksum")
            if (content.pop("format"), content.pop("format_version")) != (FORMAT, FORMAT_VERSION):
                raise UserError(f"{path}: not a checkpoint of this version of cpmpi")
            parts = tuple(Part(**part) for part in content.pop("parts"))
            return Manifest(**{**content, "shape": tuple(content["shape"]), "parts": parts})
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint's manifest ({one_line(error)})") from error


def _digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def identity_of(run: RunSpec, document: DocumentSpec) -> str:
    """What decides a document's hidden states: model, type to compute in, tokens and the one before them; as 64
    hexadecimal digits."""
    before = [str(run.scoring.prefix_token_id)] * run.scoring.prefix
    text = "\n".join((run.model_sha256, run.dtype, document.token_ids_sha256, *before))
    return hashlib.sha256(text.encode()).hexdigest()


def write_part(
    folder: Path, identity: str, layer: int, rank: int, runs: Sequence[tuple[Piece, torch.Tensor]]
) -> Part:  # fmt: skip
    """Write a rank's rows of the hidden state, durably, and say what the manifest must know of them.

    The file has its name before it has its rows: it counts once the manifest names it.

    Args:
        folder: the run folder.
        identity, layer, rank: what it is of.
        runs: each with its rows (tokens, ...) on the CPU, all of one shape and float type; perhaps none.

    Raises:
        UserError: the file cannot be written.
    """
    paths = RunPaths(folder)
    path = paths.checkpoint_part(identity, layer, rank)
    make_folder(path.parent)
    shape, dtype = (tuple(runs[0][1].shape[1:]), runs[0][1].dtype) if runs else ((1,), torch.float32)
    stored = STORED_FLOATS[str(dtype).removeprefix("torch.")]
    with created_file(path, most_places=2) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["identity"], file.attrs["layer"], file.attrs["rank"] = identity, layer, rank
        tokens = sum(piece.size for piece, _ in runs)
        file.create_dataset("runs", data=np.array([piece for piece, _ in runs], np.int64).reshape(-1, 2))
        labels = ("token", *["dim"] * len(shape))
        create_contiguous(file, "hidden", (tokens, *shape), stored.h5type(), labels=labels)
        create_contiguous(file, "checksum", (len(runs),), h5t.STD_U64LE, fill=np.uint64(0), labels=("run",))
    _fill(path, runs)
    with PartFile(path) as part:
        return Part(name=path.relative_to(folder).as_posix(), size=path.stat().st_size, digest=part.digest())


def _fill(path: Path, runs: Sequence[tuple[Piece, torch.Tensor]]) -> None:
    """Write the rows at their places in a file that was laid out, then their checksums, durably."""
    with open_file(path, locking=False) as file:
        offset, table = dataset_offset(file["hidden"]), dataset_offset(file["checksum"])
    checksums = np.zeros(len(runs), np.dtype("<u8"))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with naming(path):
            for number, (_, rows) in enumerate(runs):
                checksum = xxhash.xxh3_64()
                step = max(1, CHUNK_BYTES // max(1, rows[0].nbytes))
                for first in range(0, len(rows), step):
                    data = rows[first : first + step].contiguous().view(-1).view(torch.uint8).numpy()
                    checksum.update(data.data)
                    pwrite_all(descriptor, data, offset)
                    offset += data.nbytes
                checksums[number] = checksum.intdigest()
            pwrite_all(descriptor, checksums, table)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PartFile:
    """A rank's file, opened for reading.

    Raises:
        UserError: it is missing or no part of a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as file:
            try:
                if file.attrs["format"] != FORMAT:
                    raise UserError(f"{path}: not a part of a checkpoint")
                self.owner = {name: file.attrs[name] for name in ("identity", "layer", "rank")}
                self.runs = tuple(Piece(int(a), int(b)) for a, b in file["runs"][:])
                hidden = file["hidden"]
                self.shape, self._itemsize = tuple(hidden.shape[1:]), hidden.id.get_type().get_size()
                self.checksums = file["checksum"][:]
                self._offset = dataset_offset(hidden)
            except UserError:
                raise
            except (KeyError, OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
        self._row_bytes = int(np.prod(self.shape, dtype=np.int64)) * self._itemsize
        self._descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def digest(self) -> int:
        """xxh3_64 of the checksums."""
        return int(xxhash.xxh3_64_intdigest(self.checksums.astype("<u8").tobytes()))

    def read(self, number: int, first: int, data: RawArray) -> None:
        """Fill ``data`` with the bytes of rows of run ``number``, from its row ``first`` on."""
        row = sum(run.size for run in self.runs[:number]) + first
        pread_all(self._descriptor, data, self._offset + row * self._row_bytes, self.path)

    def check(self) -> None:
        """Compare all rows with their checksums.

        Raises:
            UserError: some differ.
        """
        for number, run in enumerate(self.runs):
            checksum = xxhash.xxh3_64()
            step = max(1, CHUNK_BYTES // max(1, self._row_bytes))
            for first in range(0, run.size, step):
                data = np.empty(min(step, run.size - first) * self._row_bytes, np.uint8)
                self.read(number, first, data)
                checksum.update(data.data)
            if checksum.intdigest() != self.checksums[number]:
                raise UserError(f"{self.path}: tokens {run.start} to {run.stop - 1} do not have their checksum")


class SavedHidden:
    """The hidden states of a checkpoint, by position. Close it after use.

    Args:
        folder: the run folder.
        manifest: of the checkpoint.

    Raises:
        UserError: a file is missing, of another checkpoint, or not what the manifest says; or not every position is
            there once.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._parts: list[PartFile] = []
        try:
            for rank, part in enumerate(manifest.parts):
                self._parts.append(self._open(folder / part.name, rank, part))
            found = sorted((run.start, run.stop) for part in self._parts for run in part.runs)
            ends = [0, *(stop for _, stop in found)]
            if [start for start, _ in found] != ends[:-1] or ends[-1] != manifest.n_tokens:
                raise UserError(f"{RunPaths(folder).checkpoints}: the checkpoint does not hold every token once")
        except BaseException:
            self.close()
            raise
        self._runs = {
            run: (part, number) for part in self._parts for number, run in enumerate(part.runs)
        }  # fmt: skip

    def _open(self, path: Path, rank: int, known: Part) -> PartFile:
        part = PartFile(path)
        m = self.manifest
        expected = {"identity": m.identity, "layer": m.layer, "rank": rank}
        try:
            for name, value in expected.items():
                if part.owner[name] != value:
                    raise UserError(f"{path}: is of {name} {part.owner[name]}, not {value}")
            if path.stat().st_size != known.size or part.digest() != known.digest:
                raise UserError(f"{path}: is not the file that the checkpoint was made of")
            if part.runs and part.shape != m.shape:
                raise UserError(f"{path}: holds hidden states of shape {part.shape}, not {m.shape}")
        except BaseException:
            part.close()
            raise
        return part

    def close(self) -> None:
        """Close the files."""
        while self._parts:
            self._parts.pop().close()

    def check(self, rank: int, world: int) -> None:
        """Compare every ``world``-th file with its checksums, from ``rank`` on: among all ranks, all of them.

        Raises:
            UserError: one is damaged.
        """
        for part in self._parts[rank::world]:
            part.check()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The hidden states (stop - start, ...) of these positions, on the CPU."""
        rows = torch.empty((stop - start, *self.manifest.shape), dtype=self._dtype)
        for run, (part, number) in self._runs.items():
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                data = rows[first - start : last - start].view(-1).view(torch.uint8).numpy()
                part.read(number, first - run.start, data)
        return rows


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
        try:
            manifest = Manifest.read(path)
            if (manifest.identity, manifest.layer) != (identity, int(name["layer"])):
                raise UserError(f"{path}: is a checkpoint of another document or layer")
            found.append((path, manifest))
        except UserError as problem:
            found.append((path, problem))
    return found


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
