"""What each token adds to the text that a tokenizer makes of a document.

A token's own text depends on those before it: bytes of one character may be in several tokens, and some tokenizers
leave a space out at the beginning. So a few tokens are decoded together, without and with the next one, and what the
next one adds is its text. While that ends in half a character, it is held back, for the token that completes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

MOST_HELD = 16  # tokens: bytes that are no character would be held back for ever
HALF = "\ufffd"  # what stands for bytes that are no character, or not yet


def token_texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The characters that each token adds, in order; together they are the document's text.

    Args:
        tokenizer: as `cpmpi.documents.tokenization.load_tokenizer` gives it.
        ids: token ids (T,).
    """

    @lru_cache(1 << 16)
    def decode(*few: int) -> str:
        return str(tokenizer.decode(list(few), clean_up_tokenization_spaces=False))

    before: list[int] = []  # the last ones whose text is given
    held: list[int] = []  # those after them
    last = len(ids) - 1
    for i, token in enumerate(map(int, ids)):
        held.append(token)
        known, text = decode(*before), decode(*before, *held)
        if i < last and len(held) < MOST_HELD and (text.endswith(HALF) or len(text) <= len(known)):
            yield ""
            continue
        yield text[len(known) :]
        before, held = held, []
