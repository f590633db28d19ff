"""What a page says of a run besides the tokens: its documents, curves, passages, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cpmpi.report.curves import Bits, ByPosition, bits_of, curve, linear_edges, log_edges, passages
from cpmpi.report.pack import halves, plain
from cpmpi.report.texts import Texts
from cpmpi.run.reader import Document, Run
from cpmpi.text import counted, human_bytes
from cpmpi.version import __version__

SPARK = 48  # windows of the small curve in a document's row
CURVE = 160  # of the curve of a document whose tokens are not in the page
TOP = 20  # passages over all documents
BEFORE, AFTER = 12, 6  # tokens shown round a passage
MARGINS = "before", "text", "after"


class Facts:
    """Gathers what is said of all documents, one document in memory at a time."""

    def __init__(self, run: Run, documents: Sequence[Document], texts: Texts) -> None:
        self.run, self.documents, self.texts = run, documents, texts
        longest = max(document.n_tokens for document in documents)
        self.by_position = ByPosition(log_edges(longest)), ByPosition(linear_edges(longest))
        self.rows: list[dict[str, Any]] = []
        self.sparks: list[Any] = []
        self.curves: list[Any] = []
        self._top: list[dict[str, Any]] = []
        self._nll, self._scored = 0.0, 0

    def add(self, document: Document, *, tokens: bool) -> None:
        """Count a document in; ``tokens`` says whether its tokens are in the page, which then makes its own curves."""
        row: dict[str, Any] = {
            "number": document.index, "id": document.id, "source": document.source, "tokens": document.n_tokens,
            "state": state_of(document), "has": tokens, "passages": [],
        }  # fmt: skip
        spark, large = np.full(SPARK, np.nan), np.empty((3, 0))
        if is_scored(document):
            first = document.first_scored
            bits_T = bits_of(document.logprobs)
            row |= _numbers(document, len(bits_T) - first)
            small = curve(bits_T[first:], SPARK)[0]
            spark[: len(small)] = small
            large = large if tokens else curve(bits_T[first:], CURVE)
            row["passages"] = [[p.start, p.stop, plain(p.bits, 4)] for p in passages(bits_T, first)]
            for each in self.by_position:
                each.add(bits_T)
            self._keep_top(document, bits_T, len(self.rows), row["passages"])
            self._nll, self._scored = self._nll + document.nll, self._scored + row["scored"]
        self.rows.append(row)
        self.sparks.append(spark)
        self.curves.append(large)

    def _keep_top(self, document: Document, bits_T: Bits, place: int, found: Sequence[Sequence[Any]]) -> None:
        """Keep the document's passages that are among the most surprising of all so far, with their text."""
        ids = document.token_ids
        for start, stop, bits in found:
            if len(self._top) == TOP and bits <= self._top[-1]["bits"]:
                return
            begin = max(0, start - BEFORE)
            words = self.texts.running(ids[begin : stop + AFTER].tolist())
            cuts = (words[: start - begin], words[start - begin : stop - begin], words[stop - begin :])
            text = {name: "".join(part) for name, part in zip(MARGINS, cuts, strict=True)}
            self._top.append({"document": place, "start": start, "stop": stop, "bits": bits, **text})
            self._top = sorted(self._top, key=lambda passage: -passage["bits"])[:TOP]

    def sections(self) -> dict[str, Any]:
        """As sections of a page's first block; what else it says is added to ``page`` by the caller."""
        curves = [np.pad(c, ((0, 0), (0, CURVE - c.shape[1])), constant_values=np.nan) for c in self.curves]
        has_curve = [i for i, row in enumerate(self.rows) if self.curves[i].shape[1]]
        found: dict[str, Any] = {
            "documents": _columns(self.rows), "passages": self._top, "run": self._run_facts(), "with_curve": has_curve,
            "sparks": halves(np.array(self.sparks).reshape(-1, SPARK)),
            "curves": halves(np.array([curves[i] for i in has_curve]).reshape(-1, 3, CURVE)),
        }  # fmt: skip
        for name, each in zip(("log", "linear"), self.by_position, strict=True):
            if each.means:
                found |= {f"{name}_{what}": array for what, array in each.facts().items()}
        return found

    def _run_facts(self) -> dict[str, Any]:
        run, rows = self.run, self.rows
        bits = [row["nll"] / math.log(2) for row in rows if row.get("bits_per_byte") is not None]
        n_bytes = [row["text_bytes"] for row in rows if row.get("bits_per_byte") is not None]
        return {
            "name": run.paths.folder.resolve().name, "folder": str(run.paths.folder), "all": len(run.documents),
            "tokens": sum(row["tokens"] for row in rows), "scored": self._scored, "nll": plain(self._nll),
            "perplexity": plain(math.exp(self._nll / self._scored)) if self._scored else None,
            "bits_per_byte": plain(sum(bits) / sum(n_bytes)) if n_bytes else None, "world": run.world_size,
            "command": str(run.attributes["command"]), "settings": settings(run), "no_text": self.texts.problem,
        }  # fmt: skip


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _numbers(document: Document, scored: int) -> dict[str, Any]:
    return {
        "scored": scored, "first": document.first_scored, "nll": plain(document.nll),
        "perplexity": plain(document.perplexity), "bits": plain(document.nll / math.log(2) / scored),
        "bits_per_byte": plain(document.bits_per_byte), "text_bytes": dict(document.spec.text).get("scored_bytes"),
    }  # fmt: skip


def state_of(document: Document) -> str:
    """Empty for a document with results; else why it has none."""
    if document.failed:
        return f"failed: {document.failed}"
    if not document.complete:
        return "is not finished"
    return "" if document.scored else "was imported without log-probabilities"


def is_scored(document: Document) -> bool:
    """Whether it has a surprisal to show."""
    return not state_of(document) and document.n_tokens > document.first_scored


def settings(run: Run) -> list[tuple[str, str]]:
    """Name and value of what the run was made with."""
    attributes = run.attributes
    model = json.loads(str(attributes["model"]))
    scoring = asdict(run.scoring)
    words = [
        ("checkpoint", run.model_path or str(model.get("_name_or_path", ""))),
        ("model", ", ".join([str(model.get("model_type", "")), *map(str, model.get("architectures") or [])])),
        ("config and weights", f"sha256 {attributes['model_sha256']}"),
        ("tokenizer", f"sha256 {attributes['tokenizer_sha256']}" if attributes["tokenizer_sha256"] else "none"),
        ("computed in", str(attributes["dtype"])),
        ("keys and values", _kv_words(run)),
        ("ranks", f"{run.world_size:,}"),
        *((name.replace("_", " "), str(value)) for name, value in scoring.items() if value not in ("", -1)),
        ("made by", f"cpmpi {attributes['cpmpi_version']}, run format {run.version}"),
        ("this page", f"cpmpi {__version__}"),
    ]
    return [(name, value) for name, value in words if value]


def _kv_words(run: Run) -> str:
    if run.kv_dtype is None:
        return "not kept"
    size = sum(size for one in run.shard_sets.values() for size in one.sizes if size > 0)
    files = sum(one.world_size for one in run.shard_sets.values())
    return f"{run.kv_dtype}, {counted(files, 'shard')}, {human_bytes(size)}"
