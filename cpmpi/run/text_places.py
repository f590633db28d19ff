"""Where a document's tokens stand in its text, and the sums over its spans: datasets of ``run.h5``, and ``spans.csv``.

Legend: T tokens, S spans.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.documents.places import TextPlaces
from cpmpi.run.extras import Extra
from cpmpi.run.hdf5 import RawArray
from cpmpi.run.paths import document_name

TEXT_GROUP = "text"
CHARACTERS, BYTES = f"{TEXT_GROUP}/characters", f"{TEXT_GROUP}/bytes"
SPAN_SUMS = ("spans/n_tokens", "spans/logprob")
SPAN_COLUMNS = (
    "index", "document", "span", "id", "first_character", "stop_character", "first_byte", "stop_byte", "n_tokens",
    "logprob", "perplexity",
)  # fmt: skip


def text_facts(places: TextPlaces | None, first: int) -> tuple[tuple[str, int], ...]:
    """The attributes of a document that say how much text there is (`cpmpi.run.spec.TEXT`).

    Args:
        places: of its tokens; None where it was given as token ids.
        first: the first token that is scored; the text after those before it is what the nll is of.
    """
    if places is None:
        return ()
    characters, n_bytes = places.after(first) or (-1, -1)
    return (
        ("n_characters", places.n_characters), ("n_bytes", places.n_bytes),
        ("scored_characters", characters), ("scored_bytes", n_bytes),
    )  # fmt: skip


def text_extras(places: TextPlaces | None) -> tuple[Extra, ...]:
    """The datasets of a document's places and spans, as far as they are known."""
    if places is None or places.characters is None:
        return ()
    dtype = "<i4" if places.n_bytes < 1 << 31 else "<i8"

    def bounds(name: str, rows: int, axis: str, units: str, of: str) -> Extra:
        definition = f"first {units} and the one after the last of {of}, in the document's text, counted from 0"
        return Extra(
            name=name, shape=(rows, 2), labels=(axis, "bound"), dtype=dtype, units=units, definition=definition
        )  # fmt: skip

    n_tokens, byte = len(places.characters), "byte of UTF-8"
    token = "token i; equal where it has no character"
    made = [
        bounds(CHARACTERS, n_tokens, "token", "character", token), bounds(BYTES, n_tokens, "token", byte, token)
    ]  # fmt: skip
    if places.spans is not None:
        count = len(places.spans.characters)
        made += [
            bounds("spans/characters", count, "span", "character", "span j"),
            bounds("spans/bytes", count, "span", byte, "span j"),
            _span_extra("n_tokens", count, "<i8", "token", "scored tokens whose first character lies in span j"),
            _span_extra("logprob", count, "<f8", "nat", "sum of the log-probabilities of these tokens"),
        ]
        if places.spans.ids:
            longest = max(1, *(len(id.encode()) for id in places.spans.ids))
            made.append(_span_extra("id", count, f"|S{longest}", "UTF-8", "name of span j"))
    return tuple(made)


def _span_extra(name: str, count: int, dtype: str, units: str, definition: str) -> Extra:
    return Extra(
        name=f"spans/{name}", shape=(count,), labels=("span",), dtype=dtype, units=units, definition=definition
    )  # fmt: skip


def text_arrays(places: TextPlaces | None, logprobs_T: npt.NDArray[np.float32]) -> Mapping[str, RawArray]:
    """What the datasets of ``text_extras`` hold, once the log-probabilities are known."""
    extras = {extra.name: extra for extra in text_extras(places)}
    if places is None or not extras:
        return {}
    assert places.characters is not None
    found: dict[str, Any] = {CHARACTERS: places.characters, BYTES: places.bytes}
    if places.spans is not None:
        sums = span_sums(logprobs_T, places.characters[:, 0], places.spans.characters)
        found |= {"spans/characters": places.spans.characters, "spans/bytes": places.span_bytes}
        found |= dict(zip(SPAN_SUMS, sums, strict=True))
        if places.spans.ids:
            found["spans/id"] = [id.encode() for id in places.spans.ids]
    return {name: np.asarray(array, extras[name].dtype) for name, array in found.items()}


def span_sums(
    logprobs_T: npt.NDArray[np.float32], starts_T: npt.NDArray[np.integer], spans_S2: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """How many scored tokens each span has, (S,), and the sum of their log-probabilities, (S,) in float64.

    A token counts in the spans in which its first character lies; spans may overlap.

    Args:
        logprobs_T: NaN where a token is not scored.
        starts_T: the first character of each token.
        spans_S2: first character and the one after the last of each span.
    """
    order = np.argsort(starts_T, kind="stable")
    starts, logprobs = starts_T[order], logprobs_T[order].astype(np.float64)
    known = ~np.isnan(logprobs)
    counts = np.concatenate([[0], np.cumsum(known)])
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, logprobs, 0.0))])
    first, stop = (np.searchsorted(starts, spans_S2[:, side]) for side in (0, 1))
    return counts[stop] - counts[first], sums[stop] - sums[first]


def spans_text(file: Any) -> str:
    """``spans.csv`` of an open ``run.h5``: a line per span of each finished document."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow(SPAN_COLUMNS)
    for index in range(len(file["documents"])):
        group = file[document_name(index)]
        if "spans" not in group or not group.attrs["complete"]:
            continue
        spans = group["spans"]
        ids = [id.decode() for id in spans["id"][:]] if "id" in spans else [""] * len(spans["logprob"])
        numbers = zip(
            spans["characters"][:].tolist(), spans["bytes"][:].tolist(), spans["n_tokens"][:].tolist(),
            spans["logprob"][:].tolist(), strict=True,
        )  # fmt: skip
        for span, (characters, bounds, n_tokens, logprob) in enumerate(numbers):
            perplexity = float(np.exp(np.float64(-logprob) / n_tokens)) if n_tokens else float("nan")
            row = (index, group.attrs["id"], span, ids[span], *characters, *bounds, n_tokens, logprob, perplexity)
            table.writerow(row)
    return text.getvalue()
