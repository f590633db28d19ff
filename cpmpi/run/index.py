"""``run.h5`` of a run in progress, on rank 0: filled a finished document at a time, so that a kill loses none."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.errors import UserError
from cpmpi.run.document_scores import bits_per
from cpmpi.run.extras import CHECKSUMS, checksum_of
from cpmpi.run.hdf5 import RawArray, changed_file, dataset_offset, open_file, pwrite_all, set_attribute
from cpmpi.run.index_layout import REASON_BYTES, lay_out_index
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import publish_text, saying, sync_path
from cpmpi.run.results import (
    DIGESTS,
    GREEDY,
    Results,
    outputs_digest,
    perplexity,
    predicted,
    result_digest,
    sum_nll,
)
from cpmpi.run.spec import DocumentSpec, RunSpec, token_digest
from cpmpi.run.text_places import spans_text

SUMMARY_COLUMNS = ("index", "id", "source", "n_tokens", "nll", "perplexity", "complete", "failed")
BITS = {"bits_per_byte": "scored_bytes", "bits_per_character": "scored_characters"}  # columns after the perplexity


class NotFiniteError(UserError):
    """What was computed for a document is not finite: nothing of it is kept as a result."""


def create_index(folder: Path, spec: RunSpec, finished: Mapping[str, Any] | None = None) -> RunIndex:
    """Lay out ``run.h5`` for all documents of a run, see ``lay_out_index``, and open it."""
    lay_out_index(folder, spec, finished or {})
    return RunIndex(folder, spec)


class RunIndex:
    """The ``run.h5`` of a run in progress, on rank 0."""

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        """Open the laid out ``run.h5`` in ``folder``.

        Args:
            folder: the run folder.
            spec: what the file was laid out from, but for the run id, which is taken from the file.
        """
        self._paths = RunPaths(folder)
        with open_file(self._paths.index) as file:
            self.spec = replace(spec, run_id=file.attrs["run_id"])
            groups = [file[document_name(i)].attrs for i in range(len(spec.documents))]
            self._finished = {i for i, attributes in enumerate(groups) if attributes["complete"]}
            reasons = {i: attributes["failed"].decode(errors="replace") for i, attributes in enumerate(groups)}
            self._failed = {i: reason for i, reason in reasons.items() if reason and i not in self._finished}

    @property
    def finished(self) -> frozenset[int]:
        """Indices of the documents that are complete and are never done again."""
        return frozenset(self._finished)

    @property
    def failed(self) -> Mapping[int, str]:
        """Indices of the documents that failed, in this job or an earlier one, and why."""
        return dict(self._failed)

    def write_manifest(self, sizes: Sequence[int]) -> None:
        """Record the size in bytes of every rank's shard as laid out; it never changes.

        Raises:
            UserError: documents are finished, and a shard has another size than the run recorded.
        """
        assert self.spec.kv is not None
        shard_set = self.spec.shard_set
        assert len(sizes) == shard_set.world_size
        group = f"/shards/{shard_set.number:06d}"
        if any(one.document_index in self._finished for one in self.spec.own()):
            with open_file(self._paths.index, check=False) as file:
                recorded = file[f"{group}/size"][:]
            for rank in np.flatnonzero(recorded != sizes).tolist():
                raise UserError(
                    f"{self._paths.shard(rank, shard_set.number)}: has {sizes[rank]} bytes, but the run recorded "
                    f"{recorded[rank]}: truncated or replaced; put it back, or start again with --overwrite"
                )
        self._write_datasets(group, {"size": np.array(sizes, "<i8")})

    def write_outputs(
        self,
        document_index: int,
        *,
        token_ids: npt.ArrayLike,
        logprobs: npt.ArrayLike,
        last_hidden: npt.ArrayLike,
        greedy: npt.ArrayLike | None = None,
        extras: Mapping[str, RawArray] | None = None,
        digests: Sequence[int] = (),
    ) -> None:
        """Write the outputs of a document, make them durable, then mark it complete.

        Args:
            document_index: place of the document in the run.
            token_ids: (T,) integers.
            logprobs: (T,) natural logarithms; NaN before the first that is scored.
            last_hidden: (hidden,) of the last token, after the final norm.
            greedy: (T,) whether each token is the most probable one, of a continuation.
            extras: those of the document's other datasets that are not there yet, see ``write_rows``.
            digests: of every rank's shard (``ShardWriter.finish``), in rank order; empty without KV.

        Raises:
            NotFiniteError: a log-probability or hidden value is not finite; see ``mark_failed``.
            UserError: the token ids are not those of the spec, or the file cannot be written.
        """
        assert document_index not in self._finished, document_index
        document = self.spec.documents[document_index]
        outputs: dict[str, RawArray] = {
            "token_ids": np.asarray(token_ids, "<i4"),
            "logprobs": np.asarray(logprobs, "<f4"),
            "last_hidden": np.asarray(last_hidden, "<f4"),
        }
        if document.continues:
            outputs[GREEDY] = np.asarray(greedy, np.uint8)
        if self.spec.kv is not None:
            outputs[DIGESTS] = np.array(digests, "<u8")
        results = checked_results(document, outputs, document.first_scored(self.spec.scoring))
        if document.extras:
            self._write_datasets(document_name(document_index), dict(extras or {}))
            outputs[CHECKSUMS] = self._checksums(document_index)
        self._write_datasets(document_name(document_index), outputs)
        self._write_results(document_index, results, complete=True)
        self._finished.add(document_index)
        self._failed.pop(document_index, None)

    def write_rows(self, document_index: int, name: str, positions: npt.NDArray[np.int64], rows: RawArray) -> None:
        """Write some tokens' rows of a dataset besides the outputs; ``write_outputs`` makes all of them durable.

        Args:
            document_index: place of the document in the run.
            name: of the dataset.
            positions: ascending, of the tokens.
            rows: of the dataset's type, one for each position.

        Raises:
            UserError: the file cannot be written.
        """
        (extra,) = (extra for extra in self.spec.documents[document_index].extras if extra.name == name)
        assert (rows.dtype, rows.shape) == (np.dtype(extra.dtype), (len(positions), *extra.shape[1:])), (extra, rows)
        if not len(positions):
            return
        assert 0 <= positions[0] <= positions[-1] < extra.shape[0], (positions[0], positions[-1], extra)
        with open_file(self._paths.index, locking=False, check=False) as file:
            offset = dataset_offset(file[f"{document_name(document_index)}/{name}"])
        bounds = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
        rows, row_bytes = np.ascontiguousarray(rows), rows.nbytes // len(rows)
        with _written(self._paths.index) as descriptor:
            for a, b in pairwise(bounds):
                pwrite_all(descriptor, rows[a:b], offset + int(positions[a]) * row_bytes)

    def mark_failed(self, document_index: int, reason: str) -> None:
        """Record, durably, why a document has no result; it stays incomplete. ``write_outputs`` takes the mark away.

        Args:
            document_index: place of the document in the run.
            reason: one line, of which at most ``REASON_BYTES`` bytes are kept.
        """
        assert document_index not in self._finished, document_index
        assert reason
        failed = " ".join(reason.split()).encode()[:REASON_BYTES].decode(errors="ignore").rstrip()
        results = Results(arrays={}, nll=np.nan, perplexity=np.nan, failed=failed.encode())
        self._write_results(document_index, results, complete=False)
        self._failed[document_index] = failed

    def finish(self) -> None:
        """Write ``summary.csv`` and mark the run complete, last. Every document is finished, or has failed."""
        assert len(self._finished) + len(self._failed) == len(self.spec.documents)
        self._check_ours()
        with open_file(self._paths.index, locking=False, check=False) as file:
            publish_text(self._paths.summary, summary_text(file))
            if self.spec.scoring.spans:
                publish_text(self._paths.spans, spans_text(file))
        sync_path(self._paths.index)
        with changed_file(self._paths.index) as file:
            set_attribute(file, "complete", True)
        sync_path(self._paths.index)

    def _write_results(self, document_index: int, results: Results, *, complete: bool) -> None:
        self._check_ours()
        write_results(self._paths.index, document_name(document_index), results, complete=complete)

    def _write_datasets(self, group: str, arrays: dict[str, RawArray]) -> None:
        self._check_ours()
        write_datasets(self._paths.index, group, arrays)

    def _checksums(self, document_index: int) -> RawArray:
        """Those of a document's datasets besides the outputs, as they are in the file."""
        names = [extra.name for extra in self.spec.documents[document_index].extras]
        with open_file(self._paths.index, locking=False, check=False) as file:
            group = file[document_name(document_index)]
            return np.array([checksum_of(group[name]) for name in names], "<u8")

    def _check_ours(self) -> None:
        """Refuse to write into a file that another job has laid out since."""
        with open_file(self._paths.index, locking=False, check=False) as file:
            if file.attrs["run_id"] != self.spec.run_id:
                raise UserError(f"{self._paths.index}: another job has started this run anew; nothing more is written")


def write_results(index: Path, name: str, results: Results, *, complete: bool) -> None:
    """Write the attributes of a document, with the checksums that cover its datasets, then ``complete``.

    Args:
        index: the file.
        name: of the document's group.
        results: with the arrays that are in the datasets already, if any.
        complete: whether the document is.
    """
    outputs = outputs_digest(results.arrays) if results.arrays else 0
    with changed_file(index) as file:
        group = file[name]
        set_attribute(group, "nll", results.nll)
        set_attribute(group, "perplexity", results.perplexity)
        set_attribute(group, "failed", results.failed)
        set_attribute(group, "outputs_xxh3", outputs)
        set_attribute(group, "result_xxh3", result_digest(results, outputs))
        file.flush()
        sync_path(index)
        if complete:
            set_attribute(group, "complete", True)
    sync_path(index)


@contextmanager
def _written(path: Path) -> Iterator[int]:
    """A descriptor to write a file with; what goes wrong with it is an error that names the file."""
    with saying(path, "cannot be written"):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def write_datasets(index: Path, group: str, arrays: Mapping[str, RawArray]) -> None:
    """Write whole datasets at their offsets, past HDF5, and make them durable."""
    with open_file(index, locking=False, check=False) as file:
        places = {name: file[f"{group}/{name}"] for name in arrays}
        for name, array in arrays.items():
            assert places[name].shape == array.shape, (name, places[name].shape, array.shape)
        offsets = {name: dataset_offset(place) for name, place in places.items()}
    with _written(index) as descriptor:
        for name, array in arrays.items():
            pwrite_all(descriptor, np.ascontiguousarray(array), offsets[name])
        os.fsync(descriptor)


def checked_results(document: DocumentSpec, outputs: dict[str, RawArray], first: int) -> Results:
    """The results of a document, whose outputs are what they must be.

    Args:
        document: which.
        outputs: its datasets.
        first: the first token that is scored.

    Raises:
        NotFiniteError: a log-probability or hidden value is not finite.
        UserError: the token ids are not those of the spec.
    """
    logprobs, who = outputs["logprobs"], f"document {document.id!r} ({document.source})"
    bad = np.flatnonzero(~np.isfinite(logprobs[first:])) + first
    if len(bad):
        raise NotFiniteError(f"{who}: {len(bad)} log-probabilities are not finite, the first at token {bad[0]}")
    assert np.isnan(logprobs[:first]).all(), f"tokens are scored from {first} on"
    if not np.isfinite(outputs["last_hidden"]).all():
        raise NotFiniteError(f"{who}: the last hidden state is not finite")
    digest = token_digest(outputs["token_ids"])
    if document.token_ids_sha256 not in ("", digest):
        raise UserError(f"{who}: its token ids have SHA-256 {digest}, expected {document.token_ids_sha256}")
    nll = sum_nll(logprobs, scored=document.scored)
    return Results(arrays=outputs, nll=nll, perplexity=perplexity(nll, len(predicted(logprobs))))


def summary_text(file: Any) -> str:
    """``summary.csv`` of an open ``run.h5``."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    bits = BITS if "keep" in file.attrs else {}  # runs that were made before have no such columns
    table.writerow((*SUMMARY_COLUMNS[:-2], *bits, *SUMMARY_COLUMNS[-2:]))
    for index in range(len(file["documents"])):
        attributes = file[document_name(index)].attrs
        *plain, _, _ = (attributes.get(column, b"") for column in SUMMARY_COLUMNS[1:])
        failed = attributes.get("failed", b"").decode(errors="replace")
        values = [bits_per(attributes["nll"], attributes.get(name, -1)) for name in bits.values()]
        table.writerow((index, *plain, *values, "yes" if attributes["complete"] else "no", failed))
    return text.getvalue()
