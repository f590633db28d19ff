"""``cpmpi inspect``: what is in a run folder, at a glance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cpmpi.errors import UserError
from cpmpi.jobs.hang import hang_facts, hang_text, last_hang
from cpmpi.run.hdf5 import STORED_FLOATS
from cpmpi.run.reader import Document, Run, open_run
from cpmpi.run.scores import SCORES, Row, read_scores
from cpmpi.run.spec import PLAIN, Scoring
from cpmpi.text import counted, escaped, human_bytes, shown, table

HEADINGS = ("", "id", "tokens", "nll", "perplexity", "bits/byte", "complete")
NAME_WIDTH = 50


@click.command("inspect")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--documents", "limit", type=click.IntRange(min=0), default=20, show_default=True,
              help="Print at most this many documents (JSON has all).")  # fmt: skip
@click.option("--hang", is_flag=True, help="Print instead which rank a job hung at, and what each did last.")
def command(run: Path, as_json: bool, limit: int, hang: bool) -> None:
    """Print what RUN holds: the model, the documents and their results, the KV, the shards, and how far it is."""
    if hang:
        found = last_hang(run)
        click.echo(json.dumps(hang_facts(found), indent=2) if as_json else hang_text(found))
        return
    with open_run(run) as opened:
        facts = facts_of(opened)
    click.echo(json.dumps(facts, indent=2) if as_json else as_text(facts, limit))


def facts_of(run: Run) -> dict[str, Any]:
    """A run as plain data for JSON; numbers that are not known yet are None."""
    attributes = run.attributes
    model = json.loads(attributes["model"])
    documents = [_document_facts(document) for document in run.documents]
    return {
        "run": str(run.paths.folder),
        "complete": run.complete,
        "documents_complete": sum(document["complete"] for document in documents),
        "documents_failed": sum(document["failed"] is not None for document in documents),
        "documents_set_aside": len(run.set_aside),
        "model": {key: model[key] for key in ("model_type", "architectures", "_name_or_path") if key in model},
        "model_sha256": attributes["model_sha256"],
        "dtype": attributes["dtype"],
        "world_size": run.world_size,
        "command": attributes["command"],
        "cpmpi_version": attributes["cpmpi_version"],
        "format_version": run.version,
        "kv": _kv_facts(run),
        "scoring": asdict(run.scoring),
        "shards": [
            _shard_facts(run, number, rank)
            for number, one in run.shard_sets.items()
            if set(one.sizes) != {-1} or run.shard_path(0, number).exists()  # jobs that share have sets of their own
            for rank in range(one.world_size)
        ],
        "unfinished": _unfinished_facts(run),
        "documents": documents,
        "scores": _score_facts(run),
    }


def _score_facts(run: Run) -> dict[str, Any] | None:
    """Of a run of continuations that is complete: all rows of scores.csv, and which answer of each question is best."""
    if not run.complete or not any(document.continues for document in run.documents):
        return None
    rows = read_scores(run.paths.scores)
    sums = {document.id: -document.nll for document in run.documents}
    for row in rows:
        if not math.isclose(sums.get(row.id, math.nan), row.logprob, abs_tol=1e-9):
            raise UserError(f"{run.paths.scores}: the score of {row.id!r} is not what run.h5 says")
    plain = [{name: _plain(value) for name, value in row._asdict().items()} for row in rows]
    return {"continuations": plain, "questions": questions_of(rows)}


def _plain(value: Any) -> Any:
    return _number(value) if isinstance(value, float) else value


def questions_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each question, by each score: the number of the best answer, and by how much it is better than the next.

    Both are None where no answer has the score, the latter also where one alone has it.
    """
    answers: dict[str, list[Row]] = {}
    for row in rows:
        if row.question:
            answers.setdefault(row.question, []).append(row)
    found = []
    for name, given in answers.items():
        facts: dict[str, Any] = {"id": name, "answers": len(given)}
        for best, score in SCORES.items():
            ranked = sorted((-getattr(row, score), row.answer) for row in given if not math.isnan(getattr(row, score)))
            facts[best] = ranked[0][1] if ranked else None
            facts[f"{best.replace('best', 'margin')}"] = ranked[1][0] - ranked[0][0] if len(ranked) > 1 else None
        found.append(facts)
    return found


def scores_text(scores: dict[str, Any], limit: int) -> list[str]:
    """The questions and what is scored, as tables."""
    lines: list[str] = []
    if scores["questions"]:
        header = ("question", "answers", "best", "margin", "by token", "by byte", "by mutual information")
        rows = [
            (
                shown(q["id"], NAME_WIDTH), str(q["answers"]), str(q["best"]), _digits(q["margin"]),
                *("-" if q[by] is None else str(q[by]) for by in list(SCORES)[1:]),
            )
            for q in scores["questions"][:limit]
        ]  # fmt: skip
        lines += ["", *table(header, rows, left=1).split("\n")]
    header = ("continuation", "tokens", "log-probability", "a token", "a byte", "unconditional", "greedy")
    rows = [
        (
            shown(c["id"], NAME_WIDTH), f"{c['n_tokens']:,}", _digits(c["logprob"]), _digits(c["per_token"]),
            _digits(c["per_byte"]), _digits(c["unconditional"]), "yes" if c["greedy"] else "no",
        )
        for c in scores["continuations"][:limit]
    ]  # fmt: skip
    return [*lines, "", *table(header, rows, left=1).split("\n")]


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _document_facts(document: Document) -> dict[str, Any]:
    return {
        "index": document.index,
        "id": document.id,
        "source": document.source,
        "n_tokens": document.n_tokens,
        "nll": _number(document.nll),
        "perplexity": _number(document.perplexity),
        "bits_per_byte": _number(document.bits_per_byte),
        "bits_per_character": _number(document.bits_per_character),
        "complete": document.complete,
        "failed": document.failed or None,
        "world_size": document.world_size,
        "appended": [
            {"id": part.id, "start": part.layout.start, "n_tokens": part.layout.n_tokens} for part in document.appended
        ],
    }


def _kv_facts(run: Run) -> dict[str, Any] | None:
    if run.kv_dtype is None:
        return None
    groups = run.documents[0].kv_groups
    token_bytes = sum(len(one.layers) * one.shape.numbers for one in groups) * STORED_FLOATS[run.kv_dtype].itemsize
    return {
        "dtype": run.kv_dtype,
        "layers": sum(len(one.layers) for one in groups),
        "shapes": [{"layers": len(one.layers), **one.shape._asdict()} for one in groups],
        "bytes_per_token": token_bytes,
        "bytes": token_bytes * sum(document.n_tokens for document in run.documents),
    }


def _shard_facts(run: Run, shard_set: int, rank: int) -> dict[str, Any]:
    try:
        run.shard(rank, shard_set)
    except UserError as problem:
        return {"set": shard_set, "rank": rank, "bytes": None, "problem": str(problem)}
    return {"set": shard_set, "rank": rank, "bytes": run.shard_size(rank, shard_set), "problem": None}


def _unfinished_facts(run: Run) -> dict[str, Any] | None:
    """The first unfinished document and how many of its layers every rank has written; None when there is none."""
    document = next((document for document in run.documents if not document.complete and not document.failed), None)
    if document is None:
        return None
    layers_done = None
    if run.kv_dtype is not None:
        try:
            placed = document.places[0]
            shards = [run.shard(rank, placed.shard_set) for rank in range(document.world_size)]
            layers_done = min(int(shard.layers_done(placed.number).sum()) for shard in shards)
        except UserError:
            layers_done = 0
    return {"id": document.id, "layers_done": layers_done}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def as_text(facts: dict[str, Any], limit: int) -> str:
    """The facts of ``facts_of``, for a terminal."""
    model, kv, unfinished, documents = facts["model"], facts["kv"], facts["unfinished"], facts["documents"]
    name = (model.get("_name_or_path") or "").removesuffix("/config.json") or ", ".join(
        model.get("architectures") or [model.get("model_type", "?")]
    )
    lines = [
        f"run       {facts['run']}",
        f"model     {name}, computed in {facts['dtype']} (config and weights: sha256 {facts['model_sha256'][:12]})",
        f"made by   {counted(facts['world_size'], 'rank')}, cpmpi {facts['cpmpi_version']}: {facts['command']}",
    ]
    if kv is None:
        lines.append("kv        none")
    else:
        shapes = [
            f"{s['layers']} layers x T tokens x {s['heads']} heads x {s['key_dim']} + {s['value_dim']}"
            for s in kv["shapes"]
        ]
        lines.append(f"kv        {kv['dtype']}, {' and '.join(shapes)}: {human_bytes(kv['bytes'])}")
    lines += _scoring_lines(facts["scoring"])
    good = [shard["bytes"] for shard in facts["shards"] if shard["problem"] is None]
    if good:
        each = " to ".join(dict.fromkeys(human_bytes(size) for size in (min(good), max(good))))
        lines.append(f"shards    {counted(len(good), 'file')} of {each}, {human_bytes(sum(good))} together")
    lines += [f"problem   {shard['problem']}" for shard in facts["shards"] if shard["problem"] is not None]
    done, total = facts["documents_complete"], len(documents)
    state = "complete" if facts["complete"] else "not complete"
    failed, aside = facts["documents_failed"], facts["documents_set_aside"]
    more = f", {failed} failed" * bool(failed) + f"; {aside} of an earlier list set aside" * bool(aside)
    lines.append(f"state     {state}: {done} of {counted(total, 'document')}{more}")
    if unfinished is not None and unfinished["layers_done"] is not None and kv is not None:
        lines.append(
            f"          next '{shown(unfinished['id'])}': {unfinished['layers_done']} of {kv['layers']} layers written"
        )
    lines += ["", *_table(documents[:limit])]
    lines += [f"failed    {d['id']}: {d['failed']}" for d in documents if d["failed"]]
    if facts["scores"] is not None:
        lines += scores_text(facts["scores"], limit)
    if total > limit:
        lines.append(f"... and {total - limit} more (--documents {total}, or summary.csv)")
    return "\n".join(map(escaped, lines))


def _scoring_lines(scoring: dict[str, Any]) -> list[str]:
    """What is scored and kept, where it is more than the log-probabilities of all tokens."""
    said = []
    if scoring["keep"]:
        said.append(f"kept: {scoring['keep']}")
    if scoring["scored_from"]:
        said.append(f"from token {scoring['scored_from']:,} on")
    if scoring["prefix_token_id"] >= 0:
        said.append(f"prefix token {scoring['prefix_token_id']} ({scoring['prefix_token']})")
    elif scoring["prefix_token"] != PLAIN.prefix_token:
        said.append(f"prefix token: {scoring['prefix_token']}")
    if scoring["context"]:
        said.append(Scoring(**scoring).windows)
    if scoring["spans"]:
        said.append(f"spans: {scoring['spans']}")
    return [f"scores    {'; '.join(said)}"] if said else []


def _table(documents: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [HEADINGS]
    for document in documents:
        numbers = (document["nll"], document["perplexity"], document["bits_per_byte"])
        nll, perplexity, bits = ("-" if value is None else f"{value:.6g}" for value in numbers)
        complete = "yes" if document["complete"] else "failed" if document["failed"] else "no"
        name = shown(document["id"], NAME_WIDTH)
        rows.append((str(document["index"]), name, str(document["n_tokens"]), nll, perplexity, bits, complete))
    if all(document["bits_per_byte"] is None for document in documents):  # of token ids nobody knows the bytes
        rows = [(*row[:5], *row[6:]) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (1, len(rows[0]) - 1)
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
