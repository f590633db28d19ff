"""``cpmpi tokens``: a passage of a document with the scores of its tokens."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cpmpi.errors import UserError, some
from cpmpi.run.reader import Document, Run, open_run
from cpmpi.text import escaped, shown, width

# From how many bits of surprisal on a token has which background, of a terminal's 256 colours; the text on it is black.
COLOURS = ((1.0, 230), (2.0, 223), (4.0, 216), (8.0, 209), (12.0, 203))
BLACK = 16
TOKEN_WIDTH = 30
Cell = tuple[str, float]


@click.command("tokens")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("document")
@click.option("--around", type=int, metavar="POSITION", help="The token in the middle.  [default: the most surprising]")
@click.option("--context", type=click.IntRange(min=0), default=12, show_default=True, help="Tokens on either side.")
@click.option("--model", type=click.Path(path_type=Path), help="Checkpoint with the tokenizer.  [default: the run's]")
def command(run: Path, document: str, around: int | None, context: int, model: Path | None) -> None:
    """Print a passage of DOCUMENT (an id, or a number as inspect shows it) of RUN, and a line of scores for each token.

    Surprising tokens are coloured: the more bits, the redder. In a file or a pipe, and with NO_COLOR set, they are not.
    """
    with open_run(run) as opened:
        for line in passage(opened, find(opened, document), around, context, model):
            click.echo(line, color=False if os.environ.get("NO_COLOR") else None)


def find(run: Run, name: str) -> Document:
    """The document of this id or, where none has it, of this number.

    Raises:
        UserError: there is none, or it is not complete.
    """
    number = int(name) if name.isdecimal() else -1
    found = next((document for document in run.documents if document.id == name), None)
    if found is None and not 0 <= number < len(run.documents):
        ids = some([f"'{shown(document.id, 40)}'" for document in run.documents])
        raise UserError(f"{run.paths.folder}: no document '{shown(name)}'; it has {ids}")
    return found if found is not None else run.documents[number]


def passage(run: Run, document: Document, around: int | None, context: int, model: Path | None) -> list[str]:
    """The lines to print.

    Raises:
        UserError: the document is not complete or has no such position, or a tokenizer that is named is another one.
    """
    logprobs_T = document.logprobs
    bits_T = -logprobs_T.astype(np.float64) / math.log(2)
    if around is None:
        around = int(np.nanargmax(bits_T)) if not np.isnan(bits_T).all() else 0
    if not 0 <= around < document.n_tokens:
        raise UserError(
            f"--around {around}: document '{shown(document.id)}' has {document.n_tokens} tokens, 0 to "
            f"{document.n_tokens - 1}"
        )
    rows = range(max(0, around - context), min(document.n_tokens, around + context + 1))
    words = texts(run, document.token_ids[rows.start : rows.stop], model)
    running = "".join(coloured(escaped_but_lines(word), bits_T[i]) for i, word in zip(rows, words, strict=True))
    name = shown(document.id, 70)
    head = f"{name}: tokens {rows.start:,} to {rows.stop - 1:,} of {document.n_tokens:,}"
    return [head, "", running, "", *table(document, rows, words, bits_T, around)]


def table(
    document: Document, rows: range, words: Sequence[str], bits_T: npt.NDArray[np.float64], around: int
) -> list[str]:  # fmt: skip
    """A line for each token: position, text, surprisal, and what is kept of it."""
    kept: dict[str, Callable[[int], str]] = {"bits": lambda i: number(bits_T[i])}
    names = document.kept_names
    if "rank" in names:
        rank_T = document.kept("rank")
        kept["rank"] = lambda i: f"{rank_T[i]:,}" if rank_T[i] > 0 else "-"
    if "entropy" in names:
        entropy_T = document.kept("entropy").astype(np.float64) / math.log(2)
        kept["entropy"] = lambda i: number(entropy_T[i])
    if "topk" in names:
        ids_TK = document.kept("topk")[0]
        best = dict(zip(rows, texts(document.run, ids_TK[rows.start : rows.stop, 0], None, quiet=True), strict=True))
        kept["most probable"] = lambda i: quoted(best[i]) if ids_TK[i, 0] >= 0 else "-"
    if (characters := document.token_characters) is not None:
        kept["character"] = lambda i: f"{characters[i, 0]:,}"
    header = ["", "token", "", *kept]
    cells = [
        [">" if i == around else "", f"{i:,}", quoted(word), *(of(i) for of in kept.values())]
        for i, word in zip(rows, words, strict=True)
    ]
    widths = [max(map(width, column)) for column in zip(header, *cells, strict=True)]
    lines = ["  ".join(name.rjust(w) for name, w in zip(header, widths, strict=True)).rstrip()]
    for i, row in zip(rows, cells, strict=True):
        padded = [" " * (w - width(text)) for text, w in zip(row, widths, strict=True)]
        shaped = [gap + text for text, gap in zip(row, padded, strict=True)]
        shaped[2] = coloured(row[2], bits_T[i]) + padded[2]
        lines.append("  ".join(shaped).rstrip())
    return lines


def texts(run: Run, ids: npt.NDArray[np.integer], model: Path | None, *, quiet: bool = False) -> list[str]:
    """The text of each token, by the tokenizer that made them; their ids where that is not to be had.

    Raises:
        UserError: ``model`` is given, and has another tokenizer.
    """
    folder = model or Path(str(json.loads(run.attributes["model"]).get("_name_or_path", "")))
    tokenizer, problem = _tokenizer(run, folder.parent if folder.name == "config.json" else folder)
    if tokenizer is None:
        if model is not None:
            raise UserError(problem)
        if not quiet:
            click.echo(f"note: {problem}; tokens are shown as ids (--model DIR)", err=True)
        return [f"<{id}>" for id in ids.tolist()]
    return [tokenizer.decode([max(0, id)], clean_up_tokenization_spaces=False) for id in ids.tolist()]


def _tokenizer(run: Run, folder: Path) -> tuple[Any, str]:
    """The tokenizer in a folder, or why it is not the one that is wanted."""
    from cpmpi.documents.tokenization import load_tokenizer
    from cpmpi.model.fingerprint import tokenizer_sha256

    if not folder.is_dir():
        return None, f"no checkpoint at {shown(folder) or 'an unknown place'} any more"
    if tokenizer_sha256(folder) != run.attributes["tokenizer_sha256"]:
        return None, f"{shown(folder)} has another tokenizer than the run was made with"
    try:
        return load_tokenizer(folder), ""
    except UserError as error:
        return None, str(error)


def coloured(text: str, bits: float) -> str:
    """The text on the background of its surprisal."""
    background = next((colour for least, colour in reversed(COLOURS) if bits >= least), None)
    return text if background is None else click.style(text, fg=BLACK, bg=background)


def escaped_but_lines(text: str) -> str:
    """The text fit for a terminal, with its line ends and tabs as they are."""
    return "".join(c if c in "\n\t" else escaped(c) for c in text)


def quoted(text: str) -> str:
    """A token's text in one cell: blanks at its ends are seen."""
    return f"'{shown(text, TOKEN_WIDTH)}'"


def number(value: float) -> str:
    """A score, or a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.2f}"
