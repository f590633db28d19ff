"""Text to token ids, with the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.documents.places import TextPlaces, places_of
from cpmpi.documents.spans import Spans
from cpmpi.errors import UserError

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """The files of the folder that decide how text becomes tokens, sorted by name."""
    return [file for name in TOKENIZER_FILES if (file := checkpoint / name).is_file()]


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint folder's tokenizer, from its files alone: nothing is downloaded, no code of the folder is run.

    Raises:
        UserError: the folder has no tokenizer, or one that transformers cannot load.
    """
    if not tokenizer_files(checkpoint):
        raise UserError(
            f"{checkpoint}: no tokenizer there (tokenizer.json, tokenizer.model or vocab.json), which text needs; "
            "token_ids in .jsonl and .npy files need none"
        )
    # transformers takes seconds to import, and token ids need none of it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any type: it depends on the tokenizer's class and on what is broken
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{checkpoint}: the tokenizer does not load: {type(error).__name__}: {reason}") from error


def tokenize(tokenizer: Any, text: str, special_tokens: bool | None = None) -> npt.NDArray[np.int32]:
    """The whole text's token ids, in one call: text cut at any place may have other tokens.

    Arguments:
        tokenizer: as ``load_tokenizer`` gives it.
        special_tokens: whether the tokenizer adds its special tokens, such as one for the beginning of the text; None
            leaves that to the tokenizer.
    """
    return _encode(tokenizer, text, special_tokens)[0]


def tokenize_in_place(
    tokenizer: Any, text: str, special_tokens: bool | None = None, spans: Spans | None = None
) -> tuple[npt.NDArray[np.int32], TextPlaces]:
    """As ``tokenize``, and where tokens, and some spans, stand in the text, as far as the tokenizer says."""
    token_ids, offsets = _encode(tokenizer, text, special_tokens, return_offsets_mapping=bool(tokenizer.is_fast))
    return token_ids, places_of(text, offsets, spans)


def _encode(tokenizer: Any, text: str, special_tokens: bool | None, **more: Any) -> tuple[npt.NDArray[np.int32], Any]:
    """The token ids, and start and stop character of each, where these are asked for."""
    options = more if special_tokens is None else {"add_special_tokens": special_tokens, **more}
    # verbose: no warning that the text is longer than the model's usual window.
    encoded = tokenizer(text, truncation=False, padding=False, verbose=False, **options)
    return np.array(encoded["input_ids"], dtype=np.int32), encoded.get("offset_mapping")
