"""The tokens of a document, as a block of a page: their text, and their numbers.

Legend: T tokens, K most probable tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.report.curves import bits_of
from cpmpi.report.pack import halves, packed, smallest
from cpmpi.report.texts import Texts
from cpmpi.run.reader import Document

MOST_ALTERNATIVES = 5  # of the K most probable tokens, how many are in a page


def token_block(document: Document, texts: Texts, alternatives: int) -> str:
    """What `page/document.js` reads.

    Args:
        document: a scored one.
        texts: of its tokens.
        alternatives: how many of the most probable tokens at each position, where they are kept.

    Raises:
        UserError: something of it is damaged.
    """
    ids_T = document.token_ids
    words = texts.running(ids_T.tolist())
    sections: dict[str, Any] = {
        "text": "".join(words),
        "lengths": smallest(np.array([_utf16_units(word) for word in words], np.int64)),
        "bits": halves(bits_of(document.logprobs)),
        "ids": smallest(ids_T),
    }
    if (characters_T2 := document.token_characters) is not None:  # as steps, which deflate well
        sections["characters"] = np.diff(characters_T2[:, 0], prepend=0).astype(np.int32)
    kept = document.kept_names
    if "rank" in kept:
        sections["rank"] = smallest(np.maximum(document.kept("rank"), 0))  # 0: none
    if "entropy" in kept:
        sections["entropy"] = halves(document.kept("entropy") / np.log(2))
    if "topk" in kept and alternatives:
        ids_TK, logprobs_TK = document.kept("topk")
        sections |= _alternatives(ids_TK, logprobs_TK, texts, alternatives)
    return packed(sections)


def _alternatives(
    ids_TK: npt.NDArray[np.int32], logprobs_TK: npt.NDArray[np.float32], texts: Texts, most: int
) -> dict[str, Any]:
    """The most probable tokens: each row's numbers in a list of the tokens that occur, and their probabilities."""
    ids_TK, logprobs_TK = ids_TK[:, :most], logprobs_TK[:, :most]
    known, places = np.unique(ids_TK, return_inverse=True)
    return {
        "best": smallest(places.reshape(ids_TK.shape)),
        "best_bits": halves(bits_of(logprobs_TK)),
        "best_texts": [texts.alone(int(id)) for id in known],
    }


def _utf16_units(text: str) -> int:
    """The length of a text as a browser counts it."""
    return len(text) if text.isascii() else len(text) + sum(c > "\uffff" for c in text)
