"""What ``--keep`` asks for: read, checked against the model, and handed to the head and to the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpmpi.choices import AUTO, KEPT_SCORES, OFF, split_keep
from cpmpi.documents.spans import SpanRule, read_spans
from cpmpi.documents.tokenization import load_tokenizer, tokenizer_files
from cpmpi.errors import UserError, one_line
from cpmpi.model.token_scores import NOTHING, Wanted
from cpmpi.run.extras import Extra
from cpmpi.run.kept import KEPT, kept_extras
from cpmpi.run.spec import PLAIN, Scoring
from cpmpi.run.text_places import text_arrays, text_extras
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
        spans: parts of the texts that are summed over.
    """

    wanted: Wanted = NOTHING
    scoring: Scoring = PLAIN
    spans: SpanRule | None = None

    @property
    def first(self) -> int:
        """The first that is scored of the tokens that go through the model, a prefix token among them."""
        return self.scoring.first + self.scoring.prefix

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's kept scores: 4 a number, and as much again where the parts are put together."""
        return 8 * sum(self.widths.values())

    def preceded(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The tokens that go through the model: those of a document, and what comes before them."""
        before = [self.scoring.prefix_token_id] * self.scoring.prefix
        return np.concatenate([np.array(before, token_ids.dtype), token_ids])

    def extras(self, document: InputDocument) -> tuple[Extra, ...]:
        """The datasets of a document besides its outputs."""
        return (*kept_extras(len(document.token_ids), self.widths), *text_extras(document.places))

    def known(self, document: InputDocument, logprobs_T: npt.NDArray[np.float32]) -> Mapping[str, npt.NDArray[Any]]:
        """What those of them hold that no rank has computed."""
        ids = {f"{KEPT}ids": np.array(self.wanted.ids, "<i4")} if self.wanted.ids else {}
        return {**ids, **text_arrays(document.places, logprobs_T)}

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


def read_keeping(options: JobOptions, checkpoint: Checkpoint) -> Keeping:
    """What is to be scored and kept of documents, with this model.

    Raises:
        UserError: it cannot be: see `read_keep`, `read_prefix`, `check_windows` and
            `cpmpi.documents.spans.read_spans`.
    """
    keeping = read_keep(options.keep, checkpoint.vocab_size)
    rule = read_spans(options.spans) if options.spans else None
    scoring = replace(
        keeping.scoring, scored_from=options.from_position, prefix_token=options.prefix_token or PLAIN.prefix_token,
        prefix_token_id=read_prefix(options, checkpoint), spans=rule.recorded if rule is not None else "",
    )  # fmt: skip
    check_windows(options, checkpoint.max_positions)
    scoring = window_scoring(options.context, options.stride, scoring)
    return replace(keeping, scoring=scoring, spans=rule)


def check_documents(keeping: Keeping, documents: Sequence[InputDocument]) -> str:
    """Refuse documents that end before the first token that is to be scored; what the user should know of the others.

    Raises:
        UserError: one does.
    """
    scoring = keeping.scoring
    for document in documents:
        if len(document.token_ids) <= scoring.scored_from:
            raise UserError(
                f"--from {scoring.scored_from}: {shown(document.source)}: document '{shown(document.id)}' has "
                f"{counted(len(document.token_ids), 'token')}, 0 to {len(document.token_ids) - 1}: none would be scored"
            )
    twice = sum(int(document.token_ids[0]) == scoring.prefix_token_id for document in documents)
    if not twice:
        return ""
    return f"note: {counted(twice, 'document')} begin with the prefix token of their own: they have it twice"


def window_scoring(context: int | None, stride: int | None, scoring: Scoring = PLAIN) -> Scoring:
    """The scoring in windows of ``--context`` and ``--stride``, where they are asked for."""
    return replace(scoring, context=context, stride=stride or max(1, context // 2)) if context else scoring


def check_windows(options: JobOptions, max_positions: int | None) -> None:
    """Refuse windows that cannot be.

    Raises:
        UserError: that, or other options speak against them.
    """
    context, stride = options.context, options.stride
    if context is None:
        if stride is not None:
            raise UserError(f"--stride {stride}: of the windows of --context, which is not given")
        return
    if options.keep_kv:
        raise UserError(f"--context {context}: only with `cpmpi score`: keys and values are those of whole documents")
    if stride is not None and stride > context:
        raise UserError(f"--stride {stride}: more than --context {context}: tokens between windows would be left out")
    if max_positions is not None and context > max_positions and not options.allow_longer:
        raise UserError(
            f"--context {context}: {shown(options.model)} was made for {max_positions} positions "
            "(max_position_embeddings); --allow-longer runs it all the same"
        )
    if options.checkpoint not in (AUTO, OFF):
        raise UserError(
            f"--checkpoint {options.checkpoint}: a document in windows (--context) has none: it begins again after a "
            "stop; choose auto or off"
        )


def read_prefix(options: JobOptions, checkpoint: Checkpoint) -> int:
    """The token before a document's first one, which is none of its own; -1: none.

    Raises:
        UserError: the checkpoint names no such token, the vocabulary has not the id, or other options speak against it.
    """
    rule = options.prefix_token
    if rule == "none" and options.special_tokens:
        raise UserError("--prefix-token none and --special-tokens: choose one of them")
    if rule is None or rule == "none":
        return PLAIN.prefix_token_id
    id = _bos(checkpoint) if rule == "bos" else int(rule)
    if id is None:
        raise UserError(
            f"--prefix-token bos: {checkpoint.folder} names no token that begins a text (bos_token_id); give an id"
        )
    if not 0 <= id < checkpoint.vocab_size:
        last = checkpoint.vocab_size - 1
        raise UserError(f"--prefix-token {id}: the vocabulary has {checkpoint.vocab_size} tokens, 0 to {last}")
    if options.keep_kv:
        raise UserError(
            f"--prefix-token {rule}: only with `cpmpi score`: stored keys and values are those of a document's own "
            "tokens; make it the first of the document's token ids instead"
        )
    return id


def special_tokens(options: JobOptions) -> bool | None:
    """Whether a tokenizer adds its special tokens; not of itself where what comes before a text is said already."""
    if options.special_tokens is None and options.prefix_token is not None:
        return False
    return options.special_tokens


def _bos(checkpoint: Checkpoint) -> int | None:
    """The token that begins a text, as the tokenizer has it, and without one, or without a word of it, the config."""
    own = load_tokenizer(checkpoint.folder).bos_token_id if tokenizer_files(checkpoint.folder) else None
    id: int | None = own if own is not None else checkpoint.text_config_value("bos_token_id")
    return id


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
