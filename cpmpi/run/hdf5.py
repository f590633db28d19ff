"""HDF5 files that survive a kill: laid out first, published at once, filled with plain writes at known offsets.

Datasets are contiguous and allocated early, so that their bytes have a fixed place in the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5p, h5s, h5t

from cpmpi.errors import UserError
from cpmpi.run.publish import naming, published, saying
from cpmpi.run.seal import check_seal, user_block_bytes, write_seal
from cpmpi.run.steady import LIBVER, steady_h5

ALIGNMENT_BYTES = 4096
RawArray = npt.NDArray[Any]


@dataclass(frozen=True)
class StoredFloat:
    """A floating-point type in HDF5, and the NumPy type that carries its bits."""

    name: str
    raw: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.raw.itemsize

    def h5type(self) -> Any:
        """The HDF5 type. HDF5 tools read and convert all of them as ordinary numbers."""
        if self.name != "bfloat16":
            return h5t.py_create(self.raw)
        bfloat16 = h5t.IEEE_F64LE.copy()
        bfloat16.set_fields(15, 7, 8, 0, 7)
        bfloat16.set_offset(0)
        bfloat16.set_precision(16)
        bfloat16.set_size(2)
        bfloat16.set_ebias(127)
        return bfloat16

    def widen(self, raw: RawArray) -> RawArray:
        """Numbers for NumPy from their bits: bfloat16 becomes float32, exactly; other types are NumPy's own."""
        if self.name != "bfloat16":
            return raw
        return (raw.astype(np.uint32) << 16).view(np.float32)


STORED_FLOATS = {
    "float32": StoredFloat("float32", np.dtype("<f4")),
    "bfloat16": StoredFloat("bfloat16", np.dtype("<u2")),
    "float16": StoredFloat("float16", np.dtype("<f2")),
}


def tensor_of(raw: RawArray, dtype: str) -> Any:
    """The tensor whose bits are in an array, in one of `STORED_FLOATS`."""
    import torch

    bits = torch.from_numpy(raw.view(np.int16) if dtype == "bfloat16" else raw)
    return bits.view(torch.bfloat16) if dtype == "bfloat16" else bits


@contextmanager
def created_file(path: Path, *, most_places: int, attributes: Collection[str] = ()) -> Iterator[Any]:
    """Yield a new h5py file for laying out; it appears at ``path``, sealed and durable, when the block ends well.

    Args:
        path: the file.
        most_places: how many datasets and attributes at most are written later.
        attributes: names of the attributes that are written later, on any object.

    Raises:
        UserError: it cannot be written: no space, no permission, or larger than the file system allows.
    """
    with saying(path, "cannot be laid out"), published(path) as temporary:
        with steady_h5(
            temporary, "w", userblock_size=user_block_bytes(most_places),
            alignment_threshold=ALIGNMENT_BYTES, alignment_interval=ALIGNMENT_BYTES,
        ) as file:  # fmt: skip
            yield file
        write_seal(temporary, attributes)


def open_file(path: Path, *, locking: bool | str = "best-effort", check: bool = True) -> Any:
    """Open an HDF5 file of a run for reading.

    Args:
        path: the file.
        locking: False where nobody else's lock may stand in the way.
        check: compare the file with its seal first.

    Raises:
        UserError: there is no such file, it is damaged, or it is not an HDF5 file that can be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with saying(path, "cannot be read as HDF5"):
        if check:
            check_seal(path)
        return h5py.File(path, "r", libver=LIBVER, locking=locking)


@contextmanager
def changed_file(path: Path) -> Iterator[Any]:
    """Yield an existing h5py file for changing attributes in place.

    No lock is taken: with one, somebody who looks at the file while a job runs would make the job fail.

    Raises:
        UserError: it cannot be written.
    """
    with saying(path, "cannot be written"), steady_h5(path, "r+") as file:
        yield file


def create_contiguous(
    group: Any, name: str, shape: Sequence[int], h5type: Any, *, fill: Any = None, labels: Sequence[str] = ()
) -> Any:
    """Create a contiguous dataset whose bytes have their place in the file from the start, to be written later.

    With ``fill`` every element is written now; without, nothing is written and the file stays sparse there.
    """
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plist.set_obj_track_times(False)  # the same file again where it has to be laid out anew
    plist.set_fill_time(h5d.FILL_TIME_NEVER if fill is None else h5d.FILL_TIME_ALLOC)
    if fill is not None:
        plist.set_fill_value(np.asarray(fill))
    dataset = h5py.Dataset(h5d.create(group.id, name.encode(), h5type, h5s.create_simple(tuple(shape)), plist))
    label_dimensions(dataset, labels)
    return dataset


@dataclass(frozen=True, kw_only=True)
class VirtualBlock:
    """Where a source dataset's tokens and heads lie in a virtual dataset, and where its tokens lie in itself."""

    start: int
    count: int
    head: int
    heads: int
    file: str
    source: str
    source_rows: int
    source_start: int


def create_virtual(
    group: Any,
    name: str,
    shape: Sequence[int],
    h5type: Any,
    blocks: Sequence[VirtualBlock],
    labels: Sequence[str],
) -> Any:
    """Create a virtual dataset out of blocks of axes 1 (tokens) and 2 (heads) of datasets in other files.

    A source dataset has all layers, some tokens, and the heads of its block.

    File names are relative to the folder of this file. What no readable source covers reads as NaN.
    """
    layers, _, _, dim = shape
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_fill_value(np.asarray(np.nan, np.float32))
    space = h5s.create_simple(tuple(shape))
    for block in blocks:
        extent = (layers, block.count, block.heads, dim)
        source = h5s.create_simple((layers, block.source_rows, block.heads, dim))
        source.select_hyperslab((0, block.source_start, 0, 0), extent)
        space.select_hyperslab((0, block.start, block.head, 0), extent)
        plist.set_virtual(space, block.file.encode(), block.source.encode(), source)
    space.select_all()
    dataset = h5py.Dataset(h5d.create(group.id, name.encode(), h5type, space, plist))
    label_dimensions(dataset, labels)
    return dataset


def label_dimensions(dataset: Any, labels: Sequence[str]) -> None:
    """Name the axes of a dataset."""
    for axis, label in enumerate(labels):
        dataset.dims[axis].label = label


def dataset_offset(dataset: Any) -> int:
    """Where the bytes of a contiguous dataset start in its file; 0 for a dataset without elements."""
    if dataset.size == 0:
        return 0
    offset = dataset.id.get_offset()
    if offset is None:
        raise UserError(f"{dataset.file.filename}: damaged: {dataset.name} has no place in the file")
    return int(offset)


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Overwrite an attribute in place: nothing in the file moves. (``attrs[name] =`` would delete and create.)"""
    attribute = h5a.open(owner.id, name.encode())
    attribute.write(np.asarray(value, dtype=attribute.dtype))


def pwrite_all(descriptor: int, data: RawArray, offset: int) -> None:
    """Write all bytes of a contiguous array at ``offset``, however often the system writes only a part."""
    view = _bytes_of(data)
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def pread_all(descriptor: int, data: RawArray, offset: int, path: Path) -> None:
    """Fill a contiguous array with the bytes of ``path``, open as ``descriptor``, at ``offset``.

    Raises:
        UserError: the file ends before.
    """
    view = _bytes_of(data)
    while view.nbytes:
        with naming(path):
            read = os.preadv(descriptor, [view], offset)
        if read == 0:
            raise UserError(f"{path}: truncated: {view.nbytes} bytes are missing at offset {offset}")
        view, offset = view[read:], offset + read


def _bytes_of(data: RawArray) -> memoryview:
    assert data.flags.c_contiguous
    return data.reshape(-1).view(np.uint8).data
