"""What ``run.h5`` holds of a document besides its outputs: datasets that say themselves what they are.

They are in three groups: ``kept`` (scores, a row a token), ``text`` (where tokens stand in the document's text) and
``spans`` (sums over parts of the text). Each has the attributes ``units`` and ``definition``. The xxh3_64 of each is in
the dataset ``checksums``, which is one of the outputs, so that reading a log-probability reads no more than before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import xxhash
from h5py import h5t

from cpmpi.run.hdf5 import RawArray, create_contiguous

GROUPS = ("kept", "spans", "text")
CHECKSUMS = "checksums"
READ_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A dataset of a document.

    Attributes:
        name: its path in the document's group, such as ``kept/rank``.
        shape, labels: of the dataset, and what its axes are.
        dtype: NumPy's name of the stored type, little-endian.
        units, definition: its attributes.
    """

    name: str
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    dtype: str
    units: str
    definition: str

    @property
    def fill(self) -> Any:
        """What it holds until it is written, and where there is nothing to say: NaN, -1, or 0 (no); None: nothing."""
        kind = np.dtype(self.dtype).kind  # text: HDF5 converts no fill value to UTF-8; what is not written is empty
        return None if kind == "S" else np.array({"f": np.nan, "i": -1, "u": 0}[kind], self.dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def lay_out_extras(group: Any, extras: tuple[Extra, ...]) -> None:
    """Create the datasets in the group of a document, and the one with their checksums."""
    if not extras:
        return
    for extra in extras:
        dtype = np.dtype(extra.dtype)
        h5type = h5t.py_create(h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype, logical=True)
        inner, _, name = extra.name.rpartition("/")
        dataset = create_contiguous(
            group.require_group(inner), name, extra.shape, h5type, fill=extra.fill, labels=extra.labels
        )  # fmt: skip
        dataset.attrs["units"] = extra.units
        dataset.attrs["definition"] = extra.definition
    checksums = create_contiguous(
        group, CHECKSUMS, (len(extras),), h5t.STD_U64LE, fill=np.uint64(0), labels=("dataset",)
    )  # fmt: skip
    checksums.attrs["of"] = [extra.name for extra in extras]


def extras_in(group: Any) -> tuple[Extra, ...]:
    """The extras in the group of a document, in the order of their checksums."""
    if CHECKSUMS not in group:
        return ()
    return tuple(_extra(group[name], str(name)) for name in group[CHECKSUMS].attrs["of"])


def _extra(dataset: Any, name: str) -> Extra:
    return Extra(
        name=name, shape=tuple(map(int, dataset.shape)), labels=tuple(str(dim.label) for dim in dataset.dims),
        dtype=str(np.dtype(dataset.dtype).str), units=str(dataset.attrs["units"]),
        definition=str(dataset.attrs["definition"]),
    )  # fmt: skip


def parts_of(dataset: Any) -> Iterator[tuple[int, RawArray]]:
    """A dataset in parts of some rows, each with the number of its first row."""
    row_bytes = max(1, dataset.nbytes // max(1, len(dataset)))
    step = max(1, READ_BYTES // row_bytes)
    for first in range(0, len(dataset), step):
        yield first, np.asarray(dataset[first : first + step])


def checksum_of(dataset: Any) -> int:
    """xxh3_64 of the bytes of a dataset as they are stored."""
    checksum = xxhash.xxh3_64()
    for _, part in parts_of(dataset):
        checksum.update(np.ascontiguousarray(part).tobytes())
    return checksum.intdigest()


def recorded_checksums(group: Any) -> Mapping[str, int]:
    """The checksum of each extra in the group of a document, as it was recorded."""
    if CHECKSUMS not in group:
        return {}
    return dict(zip(map(str, group[CHECKSUMS].attrs["of"]), map(int, group[CHECKSUMS][:]), strict=True))


def copy_extras(source: Any, group: Any) -> None:
    """Take over what an equal document has."""
    for extra in extras_in(source):
        for first, part in parts_of(source[extra.name]):
            group[extra.name][first : first + len(part)] = part
