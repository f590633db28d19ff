"""Take documents of a run to other tools: what is asked for is checked, then written in streams. One process."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cpmpi.choices import EXPORTS, one_of
from cpmpi.documents.token_texts import token_texts
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.engine.contexts import find_document
from cpmpi.errors import UserError
from cpmpi.model.fingerprint import tokenizer_sha256
from cpmpi.run.document import Document
from cpmpi.run.export.columns import Texts
from cpmpi.run.export.tables import require_pyarrow, write_csv, write_parquet
from cpmpi.run.export.tensors import tensor_bytes, write_tensors
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import TEMPORARY_SUFFIX, saying, sync_path
from cpmpi.run.reader import Run, open_run
from cpmpi.text import human_bytes

SUFFIX = ".safetensors"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a user asks of an export.

    Attributes:
        run: run folder.
        to: one of `cpmpi.choices.EXPORTS`.
        output: the file; for keys and values of several documents, a folder.
        documents: ids; none: all.
        model: checkpoint folder, whose tokenizer gives the tokens' text; None: where the run says that it was.
        overwrite: whether what is there is replaced.

    Raises:
        UserError: there is no such format.
    """

    run: Path
    to: str
    output: Path
    documents: Sequence[str] = ()
    model: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        one_of("--to", self.to, EXPORTS)


def export(options: ExportOptions, say: Say) -> list[Path]:
    """Write documents of a run for another tool; the files.

    Args:
        options: what is asked.
        say: takes lines that the user should read.

    Raises:
        UserError: something the user can mend; before anything is written where it can be known then.
    """
    with open_run(options.run) as run:
        documents = chosen(run, options.documents)
        _check_output(options)
        if options.to in ("parquet", "csv"):
            return _export_table(options, run, documents, say)
        return _export_tensors(options, run, documents)


def chosen(run: Run, ids: Sequence[str]) -> list[Document]:
    """The documents that are asked for; all of them must be finished.

    Raises:
        UserError: there is no such document (the closest are named), or one is not finished, or failed.
    """
    found = [find_document(run, name, "--document") for name in dict.fromkeys(ids)] or list(run.documents)
    for document in found:
        if not document.complete:
            why = f"failed: {document.failed}" if document.failed else "is not finished"
            done = sum(each.complete for each in run.documents)
            raise UserError(
                f"{run.paths.folder}: document {document.id!r} {why}; {done} of {len(run.documents)} documents are "
                "finished: choose among them with --document"
            )
    return found


def _check_output(options: ExportOptions) -> None:
    output, run = options.output, RunPaths.of(options.run).folder
    with saying(output, "cannot be looked into"):
        if output.resolve() == run.resolve() or run.resolve() in output.resolve().parents:
            raise UserError(f"--output {output}: is in the run folder {run}; choose another place")
        if not output.parent.is_dir():
            raise UserError(f"--output {output}: no folder {output.parent}")
        if output.is_symlink() and not output.exists():
            raise UserError(f"--output {output}: is a link to {os.readlink(output)}, which does not exist")
        if output.exists() and not options.overwrite:
            raise UserError(f"--output {output}: exists already; choose another one, or --overwrite")


def _export_table(options: ExportOptions, run: Run, documents: list[Document], say: Say) -> list[Path]:
    if options.to == "parquet":
        require_pyarrow()
    if options.output.is_dir():
        raise UserError(f"--output {options.output}: is a folder; a table is one file")
    texts = _texts(options, run, say)
    (write_parquet if options.to == "parquet" else write_csv)(documents, options.output, texts)
    return [options.output]


def _texts(options: ExportOptions, run: Run, say: Say) -> Texts | None:
    """What gives the tokens' text: the tokenizer that the run was made with, where it is found."""
    made = str(run.attributes["tokenizer_sha256"])
    folder = options.model or run.recorded_checkpoint
    if options.model is None and (not made or not folder.is_dir() or tokenizer_sha256(folder) != made):
        where = "the run was made without a tokenizer" if not made else f"the run's tokenizer is not at {folder}"
        say(f"no column `text`: {where} (--model says where one is)")
        return None
    if not folder.is_dir():
        raise UserError(f"--model {folder}: no such checkpoint folder")
    found = tokenizer_sha256(folder)
    if found != made:
        raise UserError(
            f"--model {folder}: its tokenizer has the digest {found[:12] or 'of none'}, but {options.run} was made "
            f"with {f'another one ({made[:12]})' if made else 'none'}"
        )
    return partial(token_texts, load_tokenizer(folder))


def _export_tensors(options: ExportOptions, run: Run, documents: list[Document]) -> list[Path]:
    if options.to == "transformers":
        check_transformers_cache(run)
    sizes = [tensor_bytes(document, options.to) for document in documents]
    free = shutil.disk_usage(options.output.parent).free
    if sum(sizes) > free:
        raise UserError(
            f"--output {options.output}: needs {human_bytes(sum(sizes))} ({sum(sizes)} bytes), but its file system has "
            f"{human_bytes(free)} ({free} bytes) free"
        )
    if options.output.suffix == SUFFIX:
        if len(documents) > 1:
            raise UserError(
                f"--output {options.output}: is one file, but there are {len(documents)} documents: choose one with "
                f"--document, or a folder (a name without {SUFFIX})"
            )
        if options.output.is_dir():
            raise UserError(f"--output {options.output}: is a folder; choose another name, or one without {SUFFIX}")
        write_tensors(documents[0], options.output, options.to)
        return [options.output]
    with _new_folder(options.output) as folder:
        for document in documents:
            write_tensors(document, folder / f"{document.index:06d}{SUFFIX}", options.to)
    return [options.output / f"{document.index:06d}{SUFFIX}" for document in documents]


def check_transformers_cache(run: Run) -> None:
    """Refuse models whose caches in transformers hold something else than the run does.

    Raises:
        UserError: the model of the run is one.
    """
    import torch

    from cpmpi.model.cached_keys import check_cached
    from cpmpi.model.checkpoint import Blueprint

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(str(run.attributes["model"]))
        skeleton = Blueprint(Path(folder)).skeleton(torch.float32)
    try:
        check_cached(skeleton)
    except UserError as problem:
        raise UserError(f"--to transformers: {problem}; --to safetensors has them") from problem


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, which takes its place, whole, when the block ends well.

    What is at ``path`` is deleted then, if it is such a folder.

    Raises:
        UserError: there is something else at ``path``, or nothing can be written.
    """
    if path.exists():
        others = [path] if not path.is_dir() else [p for p in path.iterdir() if not _is_ours(p)]
        if others:
            raise UserError(f"--output {path}: holds {others[0].name}, which no export wrote; choose another place")
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with saying(path, "cannot be written"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            sync_path(temporary)
            if path.exists():
                for old in path.iterdir():
                    old.unlink()
            os.replace(temporary, path)  # takes the place of an empty folder
            sync_path(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _is_ours(path: Path) -> bool:
    return path.suffix == SUFFIX and path.stem.isdecimal() and len(path.stem) >= 6 and path.is_file()
