"""Runs of texts with made-up surprisals, for the tests of reports: the project's own writer, the demo's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpmpi.attention.layout import Layout
from cpmpi.documents.tokenization import load_tokenizer, tokenize_in_place
from cpmpi.model.fingerprint import tokenizer_sha256
from cpmpi.run.folder import start_index
from cpmpi.run.kept import KEPT, kept_extras
from cpmpi.run.spec import DocumentSpec, Scoring, token_digest
from cpmpi.run.text_places import text_arrays, text_extras, text_facts

from .conftest import ROOT
from .runs import HIDDEN, make_spec

CHECKPOINT = ROOT / "examples" / "demo" / "checkpoint"
KEEP = {"rank": 1, "entropy": 1, "topk_ids": 2, "topk_logprobs": 2}
VOCABULARY = 4000


def made_up(ids_T: np.ndarray, seed: int) -> dict[str, Any]:
    """Log-probabilities that fall with the position, and what is kept besides; the same every time."""
    random, n = np.random.default_rng(seed), len(ids_T)
    bits = (
        random.exponential(2.0 + 3.0 / np.log2(np.arange(n) + 4), n)
        * np.repeat(random.uniform(0.5, 1.6, n // 50 + 1), 50)[:n]
    )
    logprobs = (-bits * np.log(2)).astype(np.float32)
    logprobs[0] = np.nan
    best = np.stack([random.integers(0, VOCABULARY, n), ids_T], 1).astype(np.int32)
    kept = {
        "rank": np.maximum(1, 2 ** (bits * 0.7)).astype(np.int32), "entropy": np.abs(logprobs * 0.8),
        "topk_ids": best, "topk_logprobs": np.stack([logprobs * 0.5, logprobs], 1),
    }  # fmt: skip
    kept["rank"][0], kept["entropy"][0] = -1, np.nan
    return {"logprobs": logprobs, "kept": kept}


def make_text_run(folder: Path, texts: Mapping[str, str], *, finished: int | None = None, **changes: Any) -> None:
    """A run of these documents (id to text), the first ``finished`` of them done. ``changes`` are of the `RunSpec`."""
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenized = [tokenize_in_place(tokenizer, text) for text in texts.values()]
    documents = tuple(
        DocumentSpec(
            id=name, source=name, n_tokens=len(ids), layout=Layout(n_tokens=len(ids), world=2, segments=2),
            token_ids_sha256=token_digest(ids), text=text_facts(places, 1),
            extras=(*kept_extras(len(ids), KEEP), *text_extras(places)),
        )
        for name, (ids, places) in zip(texts, tokenized, strict=True)
    )  # fmt: skip
    fields = {
        "documents": documents, "kv": None, "world_size": 2, "model_path": str(CHECKPOINT),
        "tokenizer_sha256": tokenizer_sha256(CHECKPOINT), "scoring": Scoring(keep="entropy rank topk=2"),
    }  # fmt: skip
    index = start_index(folder, make_spec(**{**fields, **changes}))
    for i, (ids, places) in enumerate(tokenized[:finished]):
        found = made_up(ids, i)
        extras = {KEPT + name: values for name, values in found["kept"].items()}
        index.write_outputs(
            i, token_ids=ids, logprobs=found["logprobs"], last_hidden=np.zeros(HIDDEN, np.float32),
            extras={**extras, **text_arrays(places, found["logprobs"])},
        )  # fmt: skip
    if finished is None:
        index.finish()
