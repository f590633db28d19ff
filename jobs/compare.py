"""``cpmpi compare``: two runs of the same documents, by two models or in two settings, token by token."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpmpi.errors import told_to_the_user
from cpmpi.jobs.options import FOLDER
from cpmpi.jobs.tokens import texts
from cpmpi.text import counted, escaped, shown, table

if TYPE_CHECKING:
    from cpmpi.run.comparison import Comparison, Named
    from cpmpi.run.reader import Run

MOST_DOCUMENTS, ENDS = 40, 10  # listed one by one, and else of each end
NAME_WIDTH = 40
BEFORE, AFTER = 10, 4  # tokens round one
BEFORE_WIDTH, TOKEN_WIDTH, AFTER_WIDTH, PASSAGE_WIDTH = 36, 24, 16, 100  # characters
NUMBERS = ("tokens", "A", "B", "difference", "95% interval")
COLUMNS = (
    "what", "document", "id", "start", "stop", "n_tokens", "nll_a", "nll_b", "difference", "low", "high",
    "kl_ab", "kl_ba", "js_low", "js_high", "text",
)  # fmt: skip


@click.command("compare")
@click.argument("run_a", type=FOLDER)
@click.argument("run_b", type=FOLDER)
@click.option("--csv", "csv_file", type=FOLDER, metavar="FILE", help="Write all numbers as a table.")
@click.option("--plot", "plot_file", type=FOLDER, metavar="FILE", help="Draw them: FILE.png, FILE.svg or FILE.pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--matching", is_flag=True, help="Compare the documents that are the same, though others are not.")
@click.option("--most", type=click.IntRange(min=0), default=10, show_default=True,
              help="So many of the most different tokens, passages and spans.")  # fmt: skip
@click.option("--passage", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens of a passage.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstrap's draws.")
@click.option("--model", type=FOLDER, help="Checkpoint with the tokenizer.  [default: that of RUN_A]")
def command(
    run_a: Path, run_b: Path, csv_file: Path | None, plot_file: Path | None, as_json: bool, matching: bool, most: int,
    passage: int, seed: int, model: Path | None,
) -> None:  # fmt: skip
    """Say where, and by how much, RUN_B is less surprised than RUN_A, by the same documents (docs/compare.md).

    Differences are B - A of the mean negative log-likelihood, in nats a token: below 0, B is less surprised.
    """
    from cpmpi.run.comparison import compare
    from cpmpi.run.reader import open_run
    from cpmpi.timeline.files import check_files

    for folder in (run_a, run_b):
        check_files(plot=plot_file, csv=csv_file, run_folder=folder)
    with open_run(run_a) as a, open_run(run_b) as b:
        found = compare(a, b, matching=matching, most=most, passage=passage, seed=seed)
        rows = [*rows_of(found, texts_of(a, found, model))]
        facts = facts_of(found, rows, [a, b])
        click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines_of(found, facts, most)))
    if csv_file is not None:
        with told_to_the_user("--csv: ", kinds=(OSError,)):
            csv_file.write_text(csv_of(rows), encoding="utf-8")
    if plot_file is not None:
        from cpmpi.run.comparison_plot import draw_comparison

        with told_to_the_user("--plot: ", kinds=(OSError,)):
            draw_comparison(found, plot_file, (str(run_a), str(run_b)))


def texts_of(run: Run, found: Comparison, model: Path | None) -> list[str]:
    """The most different tokens with what stands round them, then the passages; the tokenizer is loaded once."""
    import numpy as np

    places: list[tuple[int, int, int]] = []
    ids: list[int] = []
    for i, one in enumerate((*found.tokens, *found.passages)):
        document, (before, after) = run.documents[one.document], (BEFORE, AFTER) if i < len(found.tokens) else (0, 0)
        first, last = max(0, one.start - before), min(document.n_tokens, one.stop + after)
        places.append((one.start - first, one.stop - first, last - first))
        ids += document.token_ids[first:last].tolist()
    words, told = texts(run, np.array(ids, np.int32), model) if ids else [], []
    for i, (start, stop, size) in enumerate(places):
        these, words = words[:size], words[size:]
        parts = ["".join(part) for part in (these[:start], these[start:stop], these[stop:])]
        told.append(quoted(*parts) if i < len(found.tokens) else parts[1])
    return told


def quoted(before: str, token: str, after: str) -> str:
    """A token between brackets in what stands round it, in one line."""
    before, after = escaped(before), escaped(after)
    return f"{before[-BEFORE_WIDTH:]}[{shown(token, TOKEN_WIDTH)}]{after[:AFTER_WIDTH]}"


def rows_of(found: Comparison, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All that was found, a row each, under ``COLUMNS``.

    Args:
        found: the comparison.
        words: the text of its tokens, then of its passages.
    """
    yield _row("corpus", found.corpus)
    for what, chosen in (("document", found.documents), ("position", found.positions), ("span", found.spans)):
        yield from (_row(what, one) for one in chosen)
    named = [*(("token", one) for one in found.tokens), *(("passage", one) for one in found.passages)]
    yield from (_row(what, one, text) for (what, one), text in zip(named, words, strict=True))


def _row(what: str, one: Named, text: str = "") -> dict[str, Any]:
    change, apart = one.change, one.divergence
    kl = (None,) * 4 if apart is None else (apart.kl_ab, apart.kl_ba, apart.js_low, apart.js_high)
    numbers = (change.n_tokens, change.nll_a, change.nll_b, change.difference, *change.interval)
    cells = (what, one.document, one.id, one.start, one.stop, *numbers, *kl, text)
    plain = [None if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells]
    return dict(zip(COLUMNS, plain, strict=True))


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows([{name: "" if cell is None else cell for name, cell in row.items()} for row in rows])
    return text.getvalue()


def facts_of(found: Comparison, rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> dict[str, Any]:
    """A comparison as plain data for JSON; numbers that are not known are None."""
    from cpmpi.run.paired import LEVEL, RESAMPLES

    unit = "blocks" if found.block else "documents"
    grouped: dict[str, Any] = {what: [] for what in ("document", "position", "token", "passage", "span")}
    for row in rows:
        if row["what"] in grouped:
            grouped[row["what"]].append({name: cell for name, cell in row.items() if name != "what"})
    known = found.corpus.divergence
    return {
        "a": about(runs[0]), "b": about(runs[1]),
        "bootstrap": {"over": unit, "block_tokens": found.block or None, "resamples": RESAMPLES, "seed": found.seed,
                      "level": LEVEL},
        "corpus": {name: cell for name, cell in rows[0].items() if name not in ("what", "document", "id", "text")},
        "topk_probability": None if known is None else [known.known_a, known.known_b],
        **{f"{what}s": entries for what, entries in grouped.items()},
    }  # fmt: skip


def about(run: Run) -> dict[str, Any]:
    """What a run is, as far as two differ."""
    model, scoring = json.loads(run.attributes["model"]), run.scoring
    name = run.model_path or str(model.get("_name_or_path", "")) or str(model.get("model_type", "?"))
    return {
        "run": str(run.paths.folder), "model": name, "model_sha256": str(run.attributes["model_sha256"]),
        "dtype": str(run.attributes["dtype"]), "windows": scoring.windows or None,
        "prefix_token_id": scoring.prefix_token_id if scoring.prefix else None,
        "from": scoring.scored_from,
    }  # fmt: skip


def lines_of(found: Comparison, facts: dict[str, Any], most: int) -> Iterator[str]:
    """A comparison for a terminal."""
    for which in "ab":
        run = facts[which]
        yield f"{which.upper()}  {shown(run['run'])}: {shown(run['model'])}, {run['dtype']}, " + (
            run["windows"] or "whole documents"
        )
    boot, corpus = facts["bootstrap"], found.corpus.change
    over = f"blocks of {counted(boot['block_tokens'], 'token')}" if found.block else "documents"
    yield (
        f"{counted(len(found.documents), 'document')}, {counted(corpus.n_tokens, 'token')} scored in both; difference: "
        "mean nll of B - A in nats a token, below 0: B is less surprised"
    )
    yield f"{boot['level']:.0%} intervals: paired bootstrap over {over}, {boot['resamples']:,} draws, seed {found.seed}"
    yield from ("", *_documents(found), "", *_positions(found), "", *verdict(found))
    if (apart := found.corpus.divergence) is not None:
        yield (
            f"KL(A || B) at least {apart.kl_ab:.4f}, KL(B || A) at least {apart.kl_ba:.4f}, Jensen-Shannon "
            f"{apart.js_low:.4f} to {apart.js_high:.4f} nats a token; both kept tokens with {apart.known_a:.1%} (A) "
            f"and {apart.known_b:.1%} (B) of the probability"
        )
    for what, entries in (("tokens", facts["tokens"]), ("passages", facts["passages"])):
        if entries:
            yield from ("", f"most different {what}:", *_listed(entries, len(found.documents) > 1))
    if found.spans and most:
        yield from ("", f"most different of {counted(len(found.spans), 'span')}:", *_spans(found.spans[:most]))


def verdict(found: Comparison) -> Iterator[str]:
    """Up to which positions which of the two is less surprised, as far as the intervals tell."""
    change = found.corpus.change
    yield (
        f"perplexity {math.exp(change.nll_a):.4f} in A, {math.exp(change.nll_b):.4f} in B: "
        + {-1: "B is less surprised", 0: "the interval does not tell them apart", 1: "A is less surprised"}[change.sign]
    )
    for which, sign in (("B", -1), ("A", 1)):
        ranges: list[list[int]] = []
        for one in found.positions:
            if one.change.sign == sign:
                if ranges and ranges[-1][1] == one.start:
                    ranges[-1][1] = one.stop
                else:
                    ranges.append([one.start, one.stop])
        if ranges:
            last = max(one.stop for one in found.documents)
            listed = ", ".join(f"{start:,} to {min(stop, last) - 1:,}" for start, stop in ranges)
            yield f"{which} is less surprised at positions {listed}"


def _numbers(one: Named) -> list[str]:
    change, (low, high) = one.change, one.change.interval
    interval = "-" if math.isnan(low) else f"{low:+.4f} {high:+.4f}"
    return [f"{change.n_tokens:,}", f"{change.nll_a:.4f}", f"{change.nll_b:.4f}", f"{change.difference:+.4f}", interval]


def _documents(found: Comparison) -> list[str]:
    chosen, more = found.documents, []
    if len(chosen) > MOST_DOCUMENTS:
        ordered = sorted(chosen, key=lambda one: one.change.difference)
        chosen = [*ordered[:ENDS], *ordered[-ENDS:]]
        more = [f"{len(found.documents) - 2 * ENDS:,} documents between these are not shown (--csv has all)"]
    rows = [[shown(one.document, NAME_WIDTH), *_numbers(one)] for one in chosen]
    if len(found.documents) > 1:
        rows.append(["all", *_numbers(found.corpus)])
    return [*table(("document", *NUMBERS), rows, left=1).split("\n"), *more]


def _positions(found: Comparison) -> list[str]:
    last = max(one.stop for one in found.documents)
    rows = []
    for one in found.positions:
        stop = min(one.stop, last) - 1
        rows.append([f"{one.start:,}" if stop == one.start else f"{one.start:,} to {stop:,}", *_numbers(one)])
    return table(("position", *NUMBERS), rows, left=1).split("\n")


def _listed(entries: Sequence[dict[str, Any]], several: bool) -> list[str]:
    rows = []
    for one in entries:
        name = [shown(one["document"], NAME_WIDTH)] if several else []
        numbers = [f"{one[key]:.4f}" for key in ("nll_a", "nll_b")]
        words = shown(one["text"], PASSAGE_WIDTH)
        rows.append([*name, f"{one['start']:,}", *numbers, f"{one['difference']:+.4f}", words])
    header = [*["document"] * several, "position", "A", "B", "difference"]
    head, rule, *lines = table(header, [row[:-1] for row in rows], left=int(several)).split("\n")
    return [f"{head}  text", f"{rule}  ----", *(f"{line}  {row[-1]}" for line, row in zip(lines, rows, strict=True))]


def _spans(spans: Sequence[Named]) -> list[str]:
    rows = []
    for one in spans:
        place = f"characters {one.start:,} to {one.stop:,}"
        rows.append([shown(one.document, NAME_WIDTH), shown(one.id, NAME_WIDTH) or place, *_numbers(one)[:4]])
    return table(("document", "span", *NUMBERS[:4]), rows, left=2).split("\n")
