"""What ``--keep`` asks for: read, checked against the model, and handed to the head and to the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpmpi.choices import KEPT_SCORES, split_keep
from cpmpi.errors import UserError, one_line
from cpmpi.model.token_scores import NOTHING, Wanted
from cpmpi.run.extras import Extra
from cpmpi.run.kept import kept_extras
from cpmpi.run.spec import PLAIN, Scoring
from cpmpi.text import counted, shown

if TYPE_CHECKING:
    from cpmpi.documents.read import InputDocument
    from cpmpi.engine.options import JobOptions
    from cpmpi.model.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is scored and kept of every document.

    Attributes:
        wanted: of the head.
        scoring: the same in one spelling, for the record, and what comes before the first token.
    """

    wanted: Wanted = NOTHING
    scoring: Scoring = PLAIN

    @property
    def first(self) -> int:
        """The first that is scored of the tokens that go through the model, a prefix token among them."""
        return self.scoring.first + self.scoring.prefix

    @property
    def known(self) -> dict[str, npt.NDArray[np.int32]]:
        """Datasets of every document that are known beforehand."""
        return {"kept/ids": np.array(self.wanted.ids, "<i4")} if self.wanted.ids else {}

    def extras(self, n_tokens: int) -> tuple[Extra, ...]:
        """The datasets of a document's kept scores."""
        return kept_extras(n_tokens, self.widths)

    @property
    def widths(self) -> dict[str, int]:
        """The columns of `cpmpi.run.kept`, each with how many numbers a row of it has."""
        wanted = self.wanted
        found = {
            "rank": wanted.rank, "greedy": wanted.greedy, "entropy": wanted.entropy, "moments": 2 * wanted.moments,
            "topk_ids": wanted.top_k, "topk_logprobs": wanted.top_k, "ids_logprobs": len(wanted.ids),
        }  # fmt: skip
        return {name: int(width) for name, width in found.items() if width}


LOGPROBS = Keeping()


def read_keeping(options: JobOptions, checkpoint: Checkpoint, documents: Sequence[InputDocument]) -> Keeping:
    """What is to be scored and kept of these documents, with this model.

    Raises:
        UserError: what `read_keep` refuses; or a document ends before the first token that is to be scored.
    """
    keeping = read_keep(options.keep, checkpoint.vocab_size)
    scoring = replace(keeping.scoring, scored_from=options.from_position)
    for document in documents:
        if len(document.token_ids) <= scoring.scored_from:
            raise UserError(
                f"--from {scoring.scored_from}: {shown(document.source)}: document '{shown(document.id)}' has "
                f"{counted(len(document.token_ids), 'token')}, 0 to {len(document.token_ids) - 1}: none would be scored"
            )
    return replace(keeping, scoring=scoring)


def read_keep(keep: Sequence[str], vocab_size: int) -> Keeping:
    """What is to be kept, of a model with this vocabulary.

    Raises:
        UserError: as `cpmpi.choices.split_keep`; or more tokens are wanted than there are, or ids that are not there,
            or a file cannot be read.
    """
    found = split_keep(keep)
    said = [name for name in KEPT_SCORES if name in found]
    wanted = Wanted(
        rank="rank" in found, greedy="greedy" in found, entropy="entropy" in found, moments="moments" in found
    )  # fmt: skip
    if "topk" in found:
        wanted = replace(wanted, top_k=int(found["topk"]))
        said.append(f"topk={wanted.top_k}")
        if wanted.top_k > vocab_size:
            raise UserError(f"--keep topk={wanted.top_k}: the vocabulary has {vocab_size} tokens")
    if "ids" in found:
        wanted = replace(wanted, ids=_read_ids(Path(found["ids"]), vocab_size))
        said.append(f"ids={hashlib.sha256(np.array(wanted.ids, '<i4').tobytes()).hexdigest()[:16]}")
    return Keeping(wanted=wanted, scoring=replace(PLAIN, keep=" ".join(sorted(said))))


def _read_ids(file: Path, vocab_size: int) -> tuple[int, ...]:
    """The token ids of a file: a 1-D .npy array of integers, or text with integers between blanks or commas."""
    where = f"--keep ids={shown(file)}"
    try:
        ids = _array(file, where) if file.suffix == ".npy" else _numbers(file, where)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    if not ids:
        raise UserError(f"{where}: no token ids there")
    for place, id in enumerate(ids):
        if not 0 <= id < vocab_size:
            raise UserError(
                f"{where}: token id {id} at place {place}: the vocabulary has {vocab_size} tokens, 0 to "
                f"{vocab_size - 1}"
            )
    if len(set(ids)) < len(ids):
        twice = next(id for place, id in enumerate(ids) if id in ids[:place])
        raise UserError(f"{where}: token id {twice} is there twice")
    return tuple(ids)


def _array(file: Path, where: str) -> list[int]:
    try:
        array: npt.NDArray[np.generic] = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{where}: not a .npy file of numbers: {one_line(error)}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{where}: must be a 1-D array of integers, not {array.dtype} of shape {array.shape}")
    return [int(id) for id in array.tolist()]


def _numbers(file: Path, where: str) -> list[int]:
    words = file.read_text(encoding="utf-8").replace(",", " ").split()
    for word in words:
        if not word.lstrip("-").isdecimal():
            raise UserError(f"{where}: '{shown(word, 40)}' is not a token id")
    return [int(word) for word in words]
