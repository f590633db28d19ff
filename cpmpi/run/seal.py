"""The seal of a file: a checksum of every byte that stays as it was laid out, kept in the file's HDF5 user block.

After a file of a run is laid out, only known places in it are written: the datasets that were allocated early, and a
few attributes. The seal lists these places and holds the checksum of all other bytes, so that damage to the structure
is found before HDF5 meets it, and the file may still be filled, and its writer killed, at any moment. What is written
into the places has checksums of its own.

The user block, which HDF5 skips, holds ``MAGIC``, the file's size, the xxh3_64, the size of the user block and the
number of places, then the start and stop of each, all uint64 (little-endian). The checksum leaves out the places and
itself.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from h5py import h5a, h5d

from cpmpi.errors import UserError
from cpmpi.run.publish import naming
from cpmpi.run.steady import steady_h5

MAGIC = b"cpmpi seal 1\n\0\0\0"
HEADER = struct.Struct("<16sQQQQ")
CHECKSUM = (24, 32)  # where the checksum itself stands
WRITE_MARKS = (20, 24)  # in HDF5's superblock: set while the file is open for writing, and left so by a kill
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
LEAST_BLOCK_BYTES = 4096
# Metadata of several documents in one read; little enough to waste where keys and values follow.
WINDOW_BYTES = 1 << 16

Place = tuple[int, int]


def user_block_bytes(most_places: int) -> int:
    """The size of a user block, a power of two, in which the seal of so many places fits."""
    return max(LEAST_BLOCK_BYTES, 1 << (HEADER.size + 16 * most_places - 1).bit_length())


def write_seal(path: Path, attributes: Collection[str]) -> None:
    """Seal a file that has just been laid out; what was written early or is called as in ``attributes`` may change."""
    with h5py.File(path, "r") as file:
        room = int(file.userblock_size)
        places = _dataset_places(file)
    if attributes:
        marks = (room + WRITE_MARKS[0], room + WRITE_MARKS[1])
        places = sorted([*places, marks, *_attribute_places(path, places, attributes)])
    assert HEADER.size + 16 * len(places) <= room, (path, len(places), room)
    size = path.stat().st_size
    with open(path, "r+b") as raw:
        raw.write(HEADER.pack(MAGIC, size, 0, room, len(places)) + np.array(places, "<u8").tobytes())
        raw.flush()
        checksum = _checksum(raw.fileno(), size, places)
        os.pwrite(raw.fileno(), struct.pack("<Q", checksum), CHECKSUM[0])


def check_seal(path: Path) -> bool:
    """Compare a file with its seal, without HDF5. False: it is an HDF5 file without one, as version 1 made them.

    Raises:
        UserError: a byte differs that should have stayed as it was laid out.
    """
    with open(path, "rb") as raw, naming(path):
        header = raw.read(HEADER.size)
        if header.startswith(HDF5_SIGNATURE):
            return False
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{path}: cannot be read as HDF5 (damaged, or not a file of a run)")
        _, size, checksum, room, count = HEADER.unpack(header)
        actual = os.fstat(raw.fileno()).st_size
        if actual != size:
            raise UserError(f"{path}: has {actual} bytes, but was laid out with {size}: truncated or replaced")
        listed = np.frombuffer(raw.read(min(16 * count, size)), "<u8")
        places = [tuple(place) for place in listed[: len(listed) // 2 * 2].reshape(-1, 2).tolist()]
        bounds = [HEADER.size, *(bound for place in places for bound in place), size]
        sound = len(places) == count and all(a <= b for a, b in pairwise(bounds))
        if not sound or _checksum(raw.fileno(), size, places) != checksum:
            raise UserError(f"{path}: damaged: its structure does not have the checksum that it was laid out with")
        marks = (room + WRITE_MARKS[0], room + WRITE_MARKS[1])
        if marks in places and os.pread(raw.fileno(), 4, marks[0]) not in (b"\0\0\0\0", b"\1\0\0\0"):
            raise UserError(f"{path}: damaged: HDF5's mark of an open file is neither set nor clear")
        return True


def places_of(path: Path) -> list[Place]:
    """The places of a sealed file in which it may be written."""
    with open(path, "rb") as raw:
        *_, count = HEADER.unpack(raw.read(HEADER.size))
        return [(int(a), int(b)) for a, b in np.frombuffer(raw.read(16 * count), "<u8").reshape(-1, 2)]


def _dataset_places(file: Any) -> list[Place]:
    """Where the datasets are that were allocated early, for being written later."""
    places: list[Place] = []

    def note(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.id.get_create_plist().get_alloc_time() == h5d.ALLOC_TIME_EARLY:
            offset = item.id.get_offset() if item.size else None
            if offset is not None:
                places.append((int(offset), int(offset) + item.size * item.id.get_type().get_size()))

    file.visititems(note)
    return sorted(places)


def _attribute_places(path: Path, datasets: Sequence[Place], names: Collection[str]) -> list[Place]:
    """Where the values of attributes are. HDF5 does not say: they are inverted, looked for, and put back."""
    gaps = list(_gaps(datasets, path.stat().st_size))
    before = _read(path, gaps)
    with steady_h5(path, "r+") as file:
        owners = [file]
        file.visititems(lambda _, item: owners.append(item) if isinstance(item, h5py.Group) else None)
        inverted = sum(_invert(owner, name) for owner in owners for name in names)
    changed = np.flatnonzero(before != _read(path, gaps))
    assert len(changed) == inverted, f"{path}: {len(changed)} bytes changed, {inverted} were inverted"
    starts, sizes = np.array([gap[0] for gap in gaps]), np.array([gap[1] - gap[0] for gap in gaps])
    firsts = np.cumsum(sizes) - sizes
    gap_of = np.searchsorted(firsts, changed, side="right") - 1
    offsets = starts[gap_of] + changed - firsts[gap_of]
    runs = np.split(np.arange(len(offsets)), np.flatnonzero(np.diff(offsets) != 1) + 1)
    with open(path, "r+b") as raw:
        for run in runs:
            raw.seek(int(offsets[run[0]]))
            raw.write(before[changed[run]].tobytes())
    return [(int(offsets[run[0]]), int(offsets[run[-1]]) + 1) for run in runs]


def _invert(owner: Any, name: str) -> int:
    """Invert every bit of an attribute's value; the number of its bytes, 0 where there is no such attribute."""
    if not h5a.exists(owner.id, name.encode()):
        return 0
    attribute = h5a.open(owner.id, name.encode())
    value = np.empty(attribute.shape, attribute.dtype)
    attribute.read(value)
    inverted = ~np.frombuffer(value.tobytes(), np.uint8)
    attribute.write(np.frombuffer(inverted.tobytes(), attribute.dtype).reshape(attribute.shape))
    return len(inverted)


def _gaps(places: Sequence[Place], size: int) -> Iterator[Place]:
    """What lies between the places, and before and after them."""
    bounds = [0, *(bound for place in places for bound in place), size]
    return ((a, b) for a, b in zip(bounds[::2], bounds[1::2]) if a < b)


def _read(path: Path, gaps: Sequence[Place]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with open(path, "rb") as raw:
        return np.frombuffer(b"".join(os.pread(raw.fileno(), b - a, a) for a, b in gaps), np.uint8)


def _checksum(descriptor: int, size: int, places: Sequence[Place]) -> int:
    """xxh3_64 of a file's bytes but for the checksum's own and those in the places."""
    checksum = xxhash.xxh3_64()
    window, first = memoryview(b""), 0
    for start, stop in _gaps([CHECKSUM, *places], size):
        while start < stop:
            if not first <= start < first + len(window):
                window, first = memoryview(os.pread(descriptor, WINDOW_BYTES, start)), start
                if not window:
                    return -1  # the file has just become shorter
            part = window[start - first : stop - first]
            checksum.update(part)
            start += len(part)
    return checksum.intdigest()
