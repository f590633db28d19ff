"""HDF5 on a disk that may fill: it never sees a write fail, since it cannot be closed then and ends the interpreter."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

# Newer formats carry checksums and open flags, with which a file does not open again after `kill -9`.
LIBVER = ("earliest", "v110")


class SteadyFile:
    """A file whose first error in writing is kept for later; what is written after it goes nowhere."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or remember why not."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self.error is None:
                done += self._raw.write(view[done:]) or 0
        except OSError as problem:
            self.error = problem
        self._raw.seek(len(view) - done, io.SEEK_CUR)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, or remember why not."""
        try:
            return self._raw.truncate(size)
        except OSError as problem:
            self.error = self.error or problem
            return size or 0

    def read(self, size: int = -1) -> bytes:
        """Read; an error of this is HDF5's to raise."""
        return self._raw.read(size) or b""

    def readinto(self, data: Any) -> int:
        """Read into a buffer."""
        return self._raw.readinto(data) or 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Where it is."""
        return self._raw.tell()

    def flush(self) -> None:
        """Nothing waits."""


@contextmanager
def steady_h5(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    """Yield an h5py file that is made (``w``) or changed (``r+``).

    Raises:
        OSError: something could not be written, whatever came of it in the block.
    """
    with open(path, "w+b" if mode == "w" else "r+b", buffering=0) as raw:
        steady = SteadyFile(raw)
        try:
            with h5py.File(steady, mode, libver=LIBVER, **options) as file:
                yield file
        finally:
            if steady.error is not None:
                raise steady.error
