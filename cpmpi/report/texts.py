"""The text of a run's tokens: by the tokenizer that it was made with, where that is to be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpmpi.documents.token_texts import token_texts
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.errors import UserError
from cpmpi.model.fingerprint import tokenizer_sha256
from cpmpi.run.reader import Run
from cpmpi.text import shown


class Texts:
    """Token ids to text; ids in angle brackets where there is no tokenizer, and ``problem`` says why."""

    def __init__(self, run: Run, model: Path | None = None) -> None:
        """Look for the tokenizer where ``model`` says or, without it, where the run says that it was.

        Raises:
            UserError: ``model`` is given and has another tokenizer, or none.
        """
        self._tokenizer, self.problem = _find(run, model or run.recorded_checkpoint)
        if model is not None and self._tokenizer is None:
            raise UserError(f"--model {self.problem}")
        self._alone: dict[int, str] = {}

    def running(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, in order."""
        if self._tokenizer is None:
            return [f"<{id}> " for id in ids]
        return list(token_texts(self._tokenizer, ids))

    def alone(self, token: int) -> str:
        """The text of one token by itself."""
        if token not in self._alone:
            known = self._tokenizer is not None and token >= 0
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False) if known else f"<{token}>"
            self._alone[token] = str(text)
        return self._alone[token]


def _find(run: Run, folder: Path) -> tuple[Any, str]:
    """The tokenizer in a folder, or why it is not the one that is wanted."""
    made = str(run.attributes["tokenizer_sha256"])
    if not made:
        return None, "the run was made without a tokenizer"
    if not folder.is_dir():
        return None, f"{shown(folder)}: no checkpoint there any more"
    if tokenizer_sha256(folder) != made:
        return None, f"{shown(folder)}: has another tokenizer than the run was made with"
    try:
        return load_tokenizer(folder), ""
    except UserError as error:
        return None, str(error)
