"""The tokens of documents as one table in a Parquet or CSV file, a row for each token."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cpmpi.errors import UserError
from cpmpi.run.document import Document
from cpmpi.run.export.columns import Texts, batches
from cpmpi.run.publish import published, saying


def write_parquet(documents: Sequence[Document], path: Path, texts: Texts | None) -> None:
    """Write the tokens of the documents to ``path``, which is replaced. Numbers keep their types; strings have 64-bit
    offsets, and several numbers for each token are lists of fixed size.

    Raises:
        UserError: pyarrow is not installed, a document cannot be read, or the file cannot be written.
    """
    arrow, parquet = require_pyarrow()
    with saying(path, "cannot be written"), published(path) as temporary:
        schema = None
        with _closing(parquet, temporary) as writers:
            for document in documents:
                for table in batches(document, texts):
                    arrays = {name: _arrow_array(arrow, values) for name, values in table.items()}
                    batch = arrow.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
                    if schema is None:
                        schema = batch.schema
                        writers.append(parquet.ParquetWriter(temporary, schema))
                    _check_same(document, schema.names, batch.schema.names)
                    writers[0].write_batch(batch)


def write_csv(documents: Sequence[Document], path: Path, texts: Texts | None) -> None:
    """Write the tokens of the documents to ``path``, which is replaced. Floats are written with the digits that give
    them back, several numbers for each token in columns ``NAME_0``, ``NAME_1`` and so on.

    Raises:
        UserError: a document cannot be read, or the file cannot be written.
    """
    names: list[str] | None = None
    with (
        saying(path, "cannot be written"),
        published(path) as temporary,
        open(temporary, "x", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        for document in documents:
            for table in batches(document, texts):
                columns = dict(_flat(table))
                if names is None:
                    names = list(columns)
                    writer.writerow(names)
                _check_same(document, names, list(columns))
                writer.writerows(zip(*columns.values(), strict=True))


def require_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("--to parquet needs pyarrow: pip install cpmpi[data]") from error


@contextmanager
def _closing(parquet: Any, path: Path) -> Iterator[list[Any]]:
    """A list for a writer, which is closed at the end."""
    writers: list[Any] = []
    try:
        yield writers
    finally:
        for writer in writers:
            writer.close()


def _arrow_array(arrow: Any, values: Any) -> Any:
    if isinstance(values, list):
        return arrow.array(values, type=arrow.large_string())
    if values.ndim == 1:
        return arrow.array(values)
    return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])


def _flat(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns of one value a row, as CSV writes them: NumPy's own text of a float32 gives it back."""
    for name, values in table.items():
        if isinstance(values, list):
            yield name, values
        elif values.ndim == 1:
            yield name, values.astype(np.str_) if values.dtype.kind == "f" else values.tolist()
        else:
            yield from _flat({f"{name}_{i}": values[:, i] for i in range(values.shape[1])})


def _check_same(document: Document, names: Sequence[str], found: Sequence[str]) -> None:
    if list(names) != list(found):
        raise UserError(
            f"{document.run.paths.index}: document {document.id!r} has {', '.join(found)}, but the first one "
            f"{', '.join(names)}: export them apart (--document)"
        )
