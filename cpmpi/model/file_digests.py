"""XXH3 sums of whole files, block by block, remembered from one job to the next.

A sum of 128 bits for every ``BLOCK_BYTES`` of a file: they can be taken in any order, by any number of threads and
ranks, and are the same. XXH3 finds every accident, as fast as memory is read; it does not withstand a forger.

What was found is kept in the user's cache beside the file's size, inode and times of change, and taken from there as
long as those are the same. A cache that cannot be read or written is none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from cpmpi.comm.ranks import Ranks
from cpmpi.errors import UserError, one_line
from cpmpi.user_cache import cache_folder, keep, kept

T = TypeVar("T")

BLOCK_BYTES = 64 << 20
READ_BYTES = 256 << 10  # at a time: stays in the cache of a core
THREADS = 4  # of a rank: several reads under way fill a parallel file system
Block = tuple[Path, int]  # a file, and where the block begins in it
SETTLED_S = 2.0  # a file that changed this recently may change again without another time of change
DIGEST_BYTES = 16


class State(NamedTuple):
    """What tells that a file is as it was."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path) -> State:
        """The file's state now."""
        found = file.stat()
        return cls(found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def digests_of(files: Sequence[Path], ranks: Ranks | None = None) -> list[bytes]:
    """The sums of each file's blocks, one after the other.

    Args:
        files: all of them, on every rank.
        ranks: that read a share each; collective. None: this process reads all.

    Raises:
        UserError: a file cannot be read, or changes meanwhile (named).
    """
    on_root = call if ranks is None else ranks.on_root
    states, found = on_root(_look_up, files)
    new = [(file, state) for file, state, digests in zip(files, states, found, strict=True) if digests is None]
    sums = _read_all([(file, start) for file, state in new for start in _starts(state)], ranks)
    read = {file: b"".join(sums[file, start] for start in _starts(state)) for file, state in new}
    on_root(_remember, [(file, state, read[file]) for file, state in new])
    return [read[file] if digests is None else digests for file, digests in zip(files, found, strict=True)]


def _starts(state: State) -> range:
    """Where the blocks of a file begin."""
    return range(0, state.size, BLOCK_BYTES)


def _read_all(blocks: Sequence[Block], ranks: Ranks | None) -> dict[Block, bytes]:
    """The sum of each block, read by all ranks."""
    if ranks is None:
        return dict(zip(blocks, _read(blocks), strict=True))
    shares = ranks.comm.allgather(ranks.together(_read, blocks[ranks.rank :: ranks.size]))
    return {block: shares[i % ranks.size][i // ranks.size] for i, block in enumerate(blocks)}


def call(work: Callable[..., T], *args: Any) -> T:
    """What `Ranks.on_root` is where there are no other ranks."""
    return work(*args)


def _look_up(files: Sequence[Path]) -> tuple[list[State], list[bytes | None]]:
    """The files' states, and what is remembered of them."""
    states = [State.of(file) for file in files]
    return states, [_recall(file, state) for file, state in zip(files, states, strict=True)]


def _read(blocks: Sequence[Block]) -> list[bytes]:
    with ThreadPoolExecutor(THREADS, "cpmpi-digests") as threads:
        return list(threads.map(_block_digest, blocks))


def _block_digest(block: Block) -> bytes:
    """The sum of a block of a file that begins at an offset."""
    file, start = block
    digest, buffer = xxhash.xxh3_128(), bytearray(READ_BYTES)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            left = BLOCK_BYTES
            while left and (n := stream.readinto(memoryview(buffer)[: min(left, READ_BYTES)])):
                digest.update(memoryview(buffer)[:n])
                left -= n
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error
    return digest.digest()


def _remember(new: Sequence[tuple[Path, State, bytes]]) -> None:
    """Keep the sums of files that were just read."""
    for file, state, digests in new:
        if State.of(file) != state:
            raise UserError(f"{file}: changed while it was read; is it still being written?")
        entry = _entry(file)
        if entry is None or time.time() - max(state.mtime_ns, state.ctime_ns) / 1e9 < SETTLED_S:
            continue
        facts = {"path": str(file.resolve()), **state._asdict(), "block_bytes": BLOCK_BYTES, "xxh3_128": digests.hex()}
        keep(entry, facts)  # where that fails it is read again next time


def _recall(file: Path, state: State) -> bytes | None:
    """What is remembered of a file that is as it was."""
    entry = _entry(file)
    facts: Any = kept(entry) if entry is not None else None
    try:
        asked = {"path": str(file.resolve()), **state._asdict(), "block_bytes": BLOCK_BYTES}
        digests = bytes.fromhex(facts.pop("xxh3_128"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return digests if facts == asked and len(digests) == len(_starts(state)) * DIGEST_BYTES else None


def _entry(file: Path) -> Path | None:
    """Where the sums of a file are remembered; None where there is no place for it."""
    cache = cache_folder()
    name = f"{xxhash.xxh3_128_hexdigest(os.fsencode(file.resolve()))}.json"
    return None if cache is None else cache / "digests" / name
