"""What a rank tells all others of its checkpoints at each meeting: numbers of 64 bits, with a sign."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cpmpi.run.manifest import Part


class Told(NamedTuple):
    """What a rank tells all others at each meeting; digests as int64 of the same bits."""

    stop: int = 0
    """The signal by which this rank was told to stop."""
    broken: int = 0
    """Whether this rank's keys and values cannot be written."""
    due: int = 0
    written: int = 0
    """Number of the last checkpoint whose file is whole here."""
    failed: int = 0
    """Number of the last checkpoint that could not be written here."""
    write_us: int = 0
    size: int = 0
    digest: int = 0
    kv_digest: int = 0

    @classmethod
    def of(cls, part: Part, kv_digest: int, *, written: int, failed: int, write_us: int) -> Told:
        """A file is whole here."""
        return cls(
            written=written, failed=failed, write_us=write_us, size=part.size, digest=_signed(part.digest),
            kv_digest=_signed(kv_digest),
        )  # fmt: skip

    def part(self, name: Path) -> Part:
        """What the manifest says of this rank's file."""
        return Part(name=name.as_posix(), size=self.size, digest=_unsigned(self.digest))

    @property
    def shard_digest(self) -> int:
        """xxh3_64 of the checksums, in this rank's shard, of the KV so far; 0 without KV."""
        return _unsigned(self.kv_digest)


def _signed(digest: int) -> int:
    return digest - (1 << 64) if digest >= 1 << 63 else digest


def _unsigned(digest: int) -> int:
    return digest % (1 << 64)
