"""Writes a rank's KV from a thread, with plain writes at the offsets of its shard, while the rank computes on.

The bytes of a layer are written first, then their checksums, then the layer's marker, so that a marked layer is whole
after a kill. ``sync`` makes all of it last through a crash of the node too.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from cpmpi.errors import UserError
from cpmpi.run.hdf5 import RawArray, pwrite_all
from cpmpi.run.shard import ShardFile
from cpmpi.run.spec import RunSpec
from cpmpi.text import counted, human_bytes
from cpmpi.timeline.intervals import Recorder

# What fits a core's own cache, so that bytes are read from memory once to be summed and written.
CHUNK_BYTES = 1 << 20
# torch copies fewer elements than this in the calling thread; more would wake the threads that compute the model.
SERIAL_ELEMENTS = 32767
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
SLOW_S, SLOW_AGAIN_S = 10.0, 600.0  # a wait for the disk that is told of, and when the next one is

Array = torch.Tensor | npt.NDArray[np.float32] | npt.NDArray[np.float16]


@dataclass(kw_only=True)
class WriterStats:
    """What a writer has done so far."""

    bytes: int = 0
    """Bytes of KV written."""
    busy_s: float = 0.0
    """Seconds in which the thread converted, summed and wrote."""
    blocked_s: float = 0.0
    """Seconds in which callers waited for the thread."""


class _Layer(NamedTuple):
    document: int
    layer: int
    key_TGD: torch.Tensor
    value_TGE: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.key_TGD.nbytes + self.value_TGE.nbytes


class ShardWriter:
    """Fills the shard of one rank. Use as a context manager, or call ``close``.

    An error in the thread, or of a sync, is raised by the next call, too; after it the writer takes nothing more.
    """

    def __init__(
        self,
        path: Path,
        spec: RunSpec,
        rank: int,
        *,
        queue_bytes: int = 1 << 30,
        recorder: Recorder | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the shard at ``path`` that ``prepare_shard`` laid out.

        Args:
            path: the shard file.
            spec: of the run, with what ``run.h5`` says of the shards.
            rank: whose shard it is.
            queue_bytes: tensors that may wait to be written before ``put`` blocks; one layer may always wait.
            recorder: notes when layers are written, where a timeline is wanted.
            tell: is told, while it lasts, that the caller waits for a slow disk.

        Raises:
            UserError: the file is missing or belongs to another run or rank.
        """
        assert spec.kv is not None
        self.stats, self._recorder = WriterStats(), recorder
        self._path, self._kv, self._queue_bytes = path, spec.kv, queue_bytes
        self._dtype: torch.dtype = getattr(torch, spec.kv.dtype)
        self._shard = ShardFile(path, spec.shard_set.id, rank)
        self._descriptor = os.open(path, os.O_WRONLY)
        self._buffer = torch.empty(0, dtype=self._dtype)
        self._tell, self._told_s = tell, -SLOW_AGAIN_S
        self._queue: deque[_Layer] = deque()
        self._waiting = self._taken = 0
        self._waiting_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"shard-writer-{rank}", daemon=True)
        self._thread.start()

    def put(self, document_index: int, layer: int, key_TGD: Array, value_TGE: Array) -> None:
        """Hand over one layer of a document; returns at once unless more than ``queue_bytes`` would wait.

        Args:
            document_index: place of the document in the run.
            layer: its number.
            key_TGD: this rank's keys after rotary embedding, all pieces one after another in position order, on the
                CPU, of any float type and strides. It must not change until it is written.
            value_TGE: the values, likewise.

        Raises:
            ValueError: shapes differ from those in the file, or a tensor is not on the CPU.
            UserError: an earlier layer could not be written.
        """
        place = self._shard.document(document_index)
        if not 0 <= layer < len(place.layers):
            raise ValueError(f"{self._path}: layer {layer} of {len(place.layers)}")
        item = _Layer(document_index, layer, _as_tensor(key_TGD), _as_tensor(value_TGE))
        shape = place.layers[layer].shape
        expected = tuple((place.n_tokens, shape.heads, dim) for dim in (shape.key_dim, shape.value_dim))
        found = (tuple(item.key_TGD.shape), tuple(item.value_TGE.shape))
        if found != expected:
            raise ValueError(f"{self._path}: key and value {found} of document {document_index}, expected {expected}")
        devices = {item.key_TGD.device.type, item.value_TGE.device.type}
        if devices != {"cpu"}:
            raise ValueError(f"{self._path}: key and value are on {', '.join(sorted(devices))}, expected cpu")
        with self._changed:
            self._wait(self._queue_bytes - item.nbytes)
            self._queue.append(item)
            self._waiting += 1
            self._taken += 1
            self._waiting_bytes += item.nbytes
            self._changed.notify_all()

    def digest(self, document_index: int, layers: int) -> int:
        """xxh3_64 of the checksums of a document's first ``layers`` layers in this shard, once they are written."""
        return self._shard.digest(document_index, layers)

    def layers_done(self, document_index: int) -> npt.NDArray[np.bool_]:
        """Which layers (L,) of a document were written in full, also by an earlier job that was killed."""
        return self._shard.layers_done(document_index)

    @property
    def taken(self) -> int:
        """How many layers were handed over so far."""
        return self._taken

    def sync(self, first: int | None = None) -> None:
        """Return when everything handed over so far, or the ``first`` layers of it, are on disk (fsync).

        May be called by another thread than the one that hands over.

        Raises:
            UserError: something could not be written; a network file system may say so only now.
        """
        with self._changed:
            self._wait(-1, first)
        began = time.perf_counter()
        try:
            os.fsync(self._descriptor)
        except OSError as problem:
            with self._changed:  # kept: the kernel says so once, and the next fsync would say that all is well
                self._error = self._error or self._explain(problem)
                self._changed.notify_all()
            raise self._error from problem
        if first is None:
            self.stats.blocked_s += time.perf_counter() - began

    def finish(self, document_index: int) -> int:
        """Make a document durable and return its digest for ``run.h5``.

        Raises:
            ValueError: a layer was never handed over.
            UserError: a layer could not be written.
        """
        self.sync()
        missing = np.flatnonzero(~self._shard.layers_done(document_index))
        if len(missing):
            raise ValueError(f"{self._path}: document {document_index} lacks layers {missing.tolist()}")
        return self._shard.digest(document_index)

    def close(self) -> None:
        """Write what still waits, stop the thread and close the file.

        Raises:
            UserError: something could not be written and no call has said so yet.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._shard.close()
            self._descriptor = -1
            self._raise_error()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with self._changed:
                self._queue.clear()
                self._error = None
        self.close()

    def _wait(self, limit: int, first: int | None = None) -> None:
        """Wait until no layer waits, or no more than ``limit`` bytes do, or the ``first`` layers are written. The lock
        is held.

        Layers are counted too, since those of a rank without tokens have no bytes.
        """
        began = time.perf_counter()
        assert not self._closing, "the writer is closed"

        def ready() -> bool:
            written = first is not None and self._taken - self._waiting >= first
            return bool(self._error) or not self._waiting or self._waiting_bytes <= limit or written

        if not self._changed.wait_for(ready, SLOW_S if first is None else None):
            self._tell_slow()
            self._changed.wait_for(ready)
        if first is None:
            self.stats.blocked_s += time.perf_counter() - began
        self._raise_error()

    def _tell_slow(self) -> None:
        if time.monotonic() - self._told_s >= SLOW_AGAIN_S:
            self._told_s = time.monotonic()
            waiting = f"{counted(self._waiting, 'layer')} ({human_bytes(self._waiting_bytes)})"
            self._tell(f"slow disk: computing waits until keys and values of {waiting} are written to {self._path}")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        """The thread: take layers off the queue until the writer closes or a write fails."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                item = self._queue.popleft()
            began = time.perf_counter()
            error: BaseException | None = None
            try:
                try:
                    self._write(item)
                except OSError as problem:
                    raise self._explain(problem) from problem
            except BaseException as problem:
                error = problem
            ended = time.perf_counter()
            if self._recorder is not None:
                self._recorder.note("io", 0, began, ended, n_bytes=item.nbytes, layer=item.layer)
            with self._changed:
                self.stats.busy_s += ended - began
                self._waiting -= 1
                self._waiting_bytes -= item.nbytes
                self._error = self._error or error
                self._changed.notify_all()
            del item  # its tensors are free now, not when the next layer comes
            if error is not None:
                return

    def _write(self, item: _Layer) -> None:
        place = self._shard.document(item.document)
        marker = place.layer_done_offset + item.layer
        pwrite_all(self._descriptor, np.zeros(1, np.uint8), marker)
        checksums = np.zeros((len(place.blocks), 2), np.dtype("<u8"))
        layer = place.layers[item.layer]
        for part, (tensor, offset) in enumerate(
            ((item.key_TGD, layer.key_offset), (item.value_TGE, layer.value_offset))
        ):
            row_bytes = tensor.shape[1] * tensor.shape[2] * self._dtype.itemsize
            for number, block in enumerate(place.blocks):
                rows = tensor[block.row : block.row + block.stop - block.start]
                checksums[number, part] = self._write_rows(rows, offset + block.row * row_bytes, row_bytes)
        pwrite_all(self._descriptor, checksums, place.checksum_offset + item.layer * checksums.nbytes)
        pwrite_all(self._descriptor, np.ones(1, np.uint8), marker)

    def _write_rows(self, rows_TGD: torch.Tensor, offset: int, row_bytes: int) -> int:
        """Write the rows of a block at ``offset``, a chunk at a time, and return their xxh3_64."""
        checksum = xxhash.xxh3_64()
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, len(rows_TGD), step):
            data = self._stored_bytes(rows_TGD[start : start + step])
            checksum.update(data.data)
            pwrite_all(self._descriptor, data, offset + start * row_bytes)
            self.stats.bytes += data.nbytes
        return checksum.intdigest()

    def _stored_bytes(self, rows_TGD: torch.Tensor) -> RawArray:
        """The bytes to store: those of the tensor itself if they are, else converted into the buffer."""
        if rows_TGD.dtype != self._dtype or not rows_TGD.is_contiguous():
            if self._buffer.numel() < rows_TGD.numel():
                self._buffer = torch.empty(rows_TGD.numel(), dtype=self._dtype)
            stored = self._buffer[: rows_TGD.numel()].view(rows_TGD.shape)
            serial = torch.get_num_threads() == 1
            step = len(rows_TGD) if serial else max(1, SERIAL_ELEMENTS // rows_TGD[0].numel())
            for start in range(0, len(rows_TGD), step):
                stored[start : start + step].copy_(rows_TGD[start : start + step])
            if self._dtype == torch.float16 and not bool(stored.isfinite().all()):
                raise UserError(
                    f"{self._path}: keys or values exceed the range of float16 (65504) or are not finite; "
                    "choose --kv-dtype bfloat16 or float32"
                )
            rows_TGD = stored
        data: RawArray = rows_TGD.reshape(-1).view(torch.uint8).numpy()
        return data

    def _explain(self, problem: OSError) -> UserError:
        if problem.errno not in NO_SPACE:
            return UserError(f"{self._path}: cannot be written ({problem.strerror}); start the same command again")
        status, system = os.fstat(self._descriptor), os.fstatvfs(self._descriptor)
        needed = max(0, status.st_size - status.st_blocks * 512)
        free = system.f_bavail * system.f_frsize
        return UserError(
            f"{self._path}: no space left ({problem.strerror}): {human_bytes(needed)} ({needed} bytes) of it are still "
            f"to be written, {human_bytes(free)} ({free} bytes) are free; make room and start the same command again"
        )


def _as_tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()
