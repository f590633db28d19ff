"""A run as one HTML page: what is asked for is checked, then it is written document by document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmpi.errors import UserError
from cpmpi.report.facts import Facts, is_scored, state_of
from cpmpi.report.images import draw_images, image_names, require_pictures
from cpmpi.report.machine import machine_facts, topology_of
from cpmpi.report.pack import packed
from cpmpi.report.page import page_parts
from cpmpi.report.spent import spent, timeline
from cpmpi.report.texts import Texts
from cpmpi.report.tokens import MOST_ALTERNATIVES, token_block
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, published, saying
from cpmpi.run.reader import Document, Run, open_run
from cpmpi.text import counted, shown
from cpmpi.timeline.files import load_trace
from cpmpi.timeline.intervals import Interval

MOST_TOKENS = 5_000_000
MOST_ALTERNATIVE_NUMBERS = 5_000_000
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a user asks of a report.

    Attributes:
        run: run folder.
        output: the page; None: ``report/report.html`` in the run folder.
        images: folder for each plot as PNG and SVG; None: no pictures.
        documents: places of the documents in the run; None: all.
        model: checkpoint folder, whose tokenizer gives the tokens' text; None: where the run says that it was.
        trace: file that a job's ``--trace`` wrote; None: no timeline.
        tokens: of how many tokens text and numbers are in the page; of documents beyond, only results and curves.
        overwrite: whether what is there is replaced.
    """

    run: Path
    output: Path | None = None
    images: Path | None = None
    documents: Sequence[int] | None = None
    model: Path | None = None
    trace: Path | None = None
    tokens: int = MOST_TOKENS
    overwrite: bool = False


def report(options: ReportOptions, say: Say) -> tuple[Path, list[Path]]:
    """Write the page, and pictures where they are wanted; the page's path, and theirs.

    Args:
        options: what is asked.
        say: takes lines that the user should read.

    Raises:
        UserError: something the user can mend; before anything is written where it can be known then.
    """
    with open_run(options.run) as run:
        places = range(len(run.documents)) if options.documents is None else options.documents
        documents = [run.documents[i] for i in places]
        scored = [document for document in documents if is_scored(document)]
        if not scored:
            raise UserError(f"{run.paths.folder}: {_why_nothing(documents)}")
        output = options.output or run.paths.report / "report.html"
        _check_output(output, options)
        trace = load_trace(options.trace) if options.trace else []
        texts = Texts(run, options.model)
        if texts.problem:
            say(f"note: {texts.problem}; tokens are shown as ids (--model DIR)")
        if options.images is not None:
            require_pictures()
            _check_images(options, scored)
        _write(output, run, documents, texts, options, trace)
        made = draw_images(options.images, run, scored, trace) if options.images is not None else []
    return output, made


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, **options: Any) -> Path:
    """Write a run as one HTML page, as ``cpmpi report`` does; its path.

    Args:
        run: run folder.
        output: the page; None: ``report/report.html`` in the run folder.
        options: other fields of `ReportOptions`.

    Raises:
        UserError: as `report`.
    """
    where = Path(output) if output is not None else None
    return report(ReportOptions(run=Path(run), output=where, **options), lambda line: None)[0]


def _write(
    output: Path, run: Run, documents: Sequence[Document], texts: Texts, options: ReportOptions,
    trace: Sequence[Interval],
) -> None:  # fmt: skip
    make_folder(output.parent)
    title = f"{shown(run.paths.folder.resolve().name, 80)}: cpmpi report"
    blocks = _blocks(run, documents, texts, options.tokens, trace)
    with (
        saying(output, "cannot be written"),
        published(output) as temporary,
        open(temporary, "w", encoding="utf-8") as f,
    ):
        f.writelines(page_parts(title, blocks))


def _blocks(
    run: Run, documents: Sequence[Document], texts: Texts, most_tokens: int, trace: Sequence[Interval]
) -> Iterator[tuple[str, str]]:
    """Name and content of each block: the tokens of documents, then what is said of all."""
    facts, left, size = Facts(run, documents, texts), most_tokens, 0
    within = sum(document.n_tokens for document in documents if is_scored(document))
    alternatives = min(MOST_ALTERNATIVES, MOST_ALTERNATIVE_NUMBERS // max(1, min(within, most_tokens)))
    for place, document in enumerate(documents):
        fits = is_scored(document) and document.n_tokens <= left
        if fits:
            left -= document.n_tokens
            block = token_block(document, texts, alternatives)
            size += len(block)
            yield f"{place}", block
        facts.add(document, tokens=fits)
    sections = facts.sections()
    sections["machine"] = machine_facts(topology_of(run))
    sections["spent"] = spent(run, documents)
    if trace:
        for name, value in timeline(trace).items():
            sections[f"trace_{name}"] = value
    sections["page"] = {"bytes": size + len(packed(sections)), "most_tokens": most_tokens}
    yield "all", packed(sections)


def _why_nothing(documents: Sequence[Document]) -> str:
    """Why there is nothing to show of documents, by the first of them."""
    if not documents:
        return "there are no documents"
    first = documents[0]
    why = state_of(first) or "has one token: there is no surprisal to show"
    name = f"document '{shown(first.id, 60)}' {why}"
    return name if len(documents) == 1 else f"none of its {len(documents)} documents has scores; {name}"


def _check_output(output: Path, options: ReportOptions) -> None:
    """Refuse a page that could not be written, or would replace something.

    Raises:
        UserError: it has another ending, is there already, is a folder, or its folder is missing.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: a page's name ends in .html")
    with saying(output, "cannot be looked into"):
        if output.is_dir():
            raise UserError(f"--output {output}: is a folder; name a file")
        if not output.parent.is_dir() and output.parent != RunPaths.of(options.run).report:
            raise UserError(f"--output {output}: no folder {output.parent}")
        if output.exists() and not options.overwrite:
            raise UserError(f"{output}: exists already; choose another --output, or --overwrite")


def _check_images(options: ReportOptions, documents: Sequence[Document]) -> None:
    """Refuse pictures that would replace others.

    Raises:
        UserError: some are there.
    """
    assert options.images is not None
    if options.images.exists() and not options.images.is_dir():
        raise UserError(f"--images {options.images}: is no folder")
    there = [name for name in image_names(documents) if (options.images / name).exists()]
    if there and not options.overwrite:
        more = f" and {counted(len(there) - 1, 'more file')}" if len(there) > 1 else ""
        raise UserError(f"--images {options.images}: has {there[0]}{more} already; choose another, or --overwrite")
