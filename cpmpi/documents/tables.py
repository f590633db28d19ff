"""Documents in tables: .parquet, .arrow, and the folders in which Hugging Face ``datasets`` saves a data set.

Read by pyarrow alone: ``datasets`` itself is not needed, nothing is downloaded and no code of a data set is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpmpi.documents.input_files import DATASET_FILE, InputFile
from cpmpi.documents.records import Columns, Found, check_text, check_token_ids, checked_id, quoted
from cpmpi.errors import UserError, one_line
from cpmpi.text import counted, shown

BATCH_ROWS = 64  # that are decoded at a time: documents are long
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
MASK = "attention_mask"  # where it is 0, a tokenizer has filled up with padding


def read_table(file: InputFile, columns: Columns, vocab_size: int) -> Iterator[Found | UserError]:
    """A document for each row, or what is wrong with it; rows count from 0 and name documents without an id.

    Raises:
        UserError: pyarrow is not installed, or the table is damaged or has not the columns.
        OSError: it cannot be read.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{file.shown}: tables need pyarrow: pip install 'cpmpi[data]'") from error
    row = 0
    try:
        for batch in _batches(file, columns):
            id_column, content = columns.of(batch.schema.names, f"{file.shown}: the table")
            for i in range(batch.num_rows):
                try:
                    yield _row(batch, i, id_column, content, file, row, vocab_size)
                except UserError as problem:
                    yield problem
                row += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.shown}: a damaged table: {one_line(error)}") from error
    if not row:
        raise UserError(f"{file.shown}: no documents: the table has no rows")


def _row(batch: Any, i: int, id_column: str | None, content: str, file: InputFile, row: int, vocab_size: int) -> Found:
    """Row ``i`` of a batch, which is row ``row`` of the table."""
    source = f"{file.source}: row {row}"
    where = shown(source)
    id = f"{file.name}:{row}"
    if id_column is not None:
        id = checked_id(batch[id_column][i].as_py(), f"{where}: {quoted(id_column)}")
    document = f"{where}: document '{shown(id)}'"
    cell = batch[content][i]
    if not cell.is_valid:
        raise UserError(f"{document} has no {quoted(content)}: it is null")
    if not hasattr(cell, "values"):
        text = _text(cell, document)
        check_text(text, f"{where}: {quoted(content)} of document '{shown(id)}'")
        return Found(id, source, text)
    ids = cell.values
    if ids.null_count:
        raise UserError(f"{document} has {counted(ids.null_count, 'null')} among its {quoted(content)}")
    if MASK in batch.schema.names and 0 in (mask := batch[MASK][i].as_py() or []):
        raise UserError(f"{document} has padding: {quoted(MASK)} is 0 at index {mask.index(0)}; save it without")
    array = ids.to_numpy(zero_copy_only=False)
    check_token_ids(array, vocab_size, document)
    return Found(id, source, array.astype(np.int32))


def _text(cell: Any, where: str) -> str:
    try:
        return str(cell.as_py())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start}") from error


def _batches(file: InputFile, columns: Columns) -> Iterator[Any]:
    """The table in parts of some rows, with the columns that count and no others."""
    import pyarrow

    if file.path.is_dir():
        for path in _files_of_dataset(file.path):
            yield from _arrow_batches(path, columns, InputFile(path, file.name))
    elif file.path.suffix.lower() == ".arrow":
        yield from _arrow_batches(file.path, columns, file)
    else:
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(file.path) as table:
                wanted = _checked(table.schema_arrow, columns, file)
                yield from table.iter_batches(BATCH_ROWS, columns=wanted)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file.shown}: not a whole .parquet file: {one_line(error)}") from error


def _arrow_batches(path: Path, columns: Columns, file: InputFile) -> Iterator[Any]:
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as source:
        start = source.read(6)
        source.seek(max(0, source.size() - len(STREAM_END)))
        whole = start == b"ARROW1" or source.read() == STREAM_END
        source.seek(0)
        if not whole:  # a reader of streams takes the end of the file for the end of the table
            raise UserError(f"{file.shown}: cut short: it has no end of an arrow stream ({source.size():,} bytes)")
        with ipc.open_file(source) if start == b"ARROW1" else ipc.open_stream(source) as table:
            wanted = _checked(table.schema, columns, file)
            parts = (table.get_batch(i) for i in range(table.num_record_batches)) if start == b"ARROW1" else table
            for batch in parts:
                yield batch.select(wanted)


def _files_of_dataset(folder: Path) -> list[Path]:
    """The files with the rows of a saved data set, in order."""
    try:
        state = json.loads((folder / DATASET_FILE).read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(folder)}: {DATASET_FILE} is not that of a saved data set") from error
    if state.get("_indices_data_files"):
        raise UserError(f"{shown(folder)}: the data set is a choice of rows; save it after flatten_indices()")
    paths = [folder / Path(name).name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{shown(path)}: no such file, which {DATASET_FILE} names")
    return paths


def _checked(schema: Any, columns: Columns, file: InputFile) -> list[str]:
    """The columns to read.

    Raises:
        UserError: one is missing, or holds neither text nor token ids.
    """
    from pyarrow import types

    id_column, content = columns.of(schema.names, f"{file.shown}: the table")

    def is_text(type: Any) -> bool:
        plain = type.value_type if types.is_dictionary(type) else type
        return bool(types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain))

    type = schema.field(content).type
    lists = types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type)
    if not (is_text(type) or (lists and types.is_integer(type.value_type))):
        raise UserError(f"{file.shown}: {quoted(content)} must hold text or lists of integers (token ids), not {type}")
    if id_column is not None and not (is_text(id_type := schema.field(id_column).type) or types.is_integer(id_type)):
        raise UserError(f"{file.shown}: {quoted(id_column)} must hold integers or text, not {id_type}")
    mask = [MASK] if lists and MASK in schema.names else []
    return [*([] if id_column is None else [id_column]), content, *mask]
