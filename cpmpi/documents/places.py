"""Where the tokens of a text stand in it, in characters and in bytes of UTF-8.

Legend: T tokens, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.documents.spans import Spans

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class TextPlaces:
    """A document that was given as text, and its spans, where these are wanted.

    Attributes:
        n_characters, n_bytes: of all of it.
        characters: (T, 2) first character of each token and the one after its last, counted from 0; None where the
            tokenizer does not say. Tokens that share a character, as byte-level tokens may, both have all of it. A
            token without characters (a special one) stands after those before it.
        bytes: (T, 2) the same in bytes of UTF-8.
        spans: parts of the text.
        span_bytes: (S, 2) their first byte and the one after their last.
    """

    n_characters: int
    n_bytes: int
    characters: Places | None = None
    bytes: Places | None = None
    spans: Spans | None = None
    span_bytes: Places | None = None

    def after(self, n_tokens: int) -> tuple[int, int] | None:
        """How many characters and bytes there are after the first so many tokens; None where that is not known."""
        if n_tokens == 0:
            return self.n_characters, self.n_bytes
        if self.characters is None or self.bytes is None:
            return None
        ends = (int(each[:n_tokens, 1].max()) for each in (self.characters, self.bytes))
        character, byte = ends
        return self.n_characters - character, self.n_bytes - byte


def places_of(text: str, offsets: Sequence[Sequence[int]] | None, spans: Spans | None = None) -> TextPlaces:
    """The places of a text's tokens.

    Args:
        text: the document.
        offsets: start and stop character of each token, as a fast tokenizer gives them; (0, 0) of special tokens.
        spans: of the text.
    """
    n_characters, n_bytes = len(text), len(text.encode())
    if offsets is None:
        return TextPlaces(n_characters=n_characters, n_bytes=n_bytes, spans=spans)
    characters = np.array(offsets, np.int64).reshape(-1, 2)
    empty = characters[:, 1] <= characters[:, 0]
    characters[empty] = np.maximum.accumulate(characters[:, 1])[empty, None]
    byte = np.arange(n_characters + 1) if n_bytes == n_characters else _byte_of_character(text)
    return TextPlaces(
        n_characters=n_characters, n_bytes=n_bytes, characters=characters, bytes=byte[characters], spans=spans,
        span_bytes=byte[spans.characters] if spans is not None else None,
    )  # fmt: skip


def _byte_of_character(text: str) -> Places:
    """At which byte of UTF-8 each character begins, and where the text ends."""
    codes: npt.NDArray[Any] = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = np.ones(len(codes), np.uint8)
    for first in (0x80, 0x800, 0x10000):  # code points from which on one more byte is needed
        sizes += codes >= first
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
