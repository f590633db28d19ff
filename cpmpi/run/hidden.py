"""The hidden states of a checkpoint: a file per rank that wrote some, with its rows one run of positions after another.

A file holds ``hidden`` (T, ...), ``runs`` (P, 2) int64, start and stop position of each run, and ``checksum`` (P,)
uint64, xxh3_64 of the bytes of each run. Rows are found by position, so that any number of ranks can read them.

Legend: T tokens of a rank, P runs of positions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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
from cpmpi.run.manifest import FORMAT, FORMAT_VERSION, Manifest, Part
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, naming

CHUNK_BYTES = 4 << 20


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
