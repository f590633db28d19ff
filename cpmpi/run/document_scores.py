"""What was kept of a document's tokens besides their log-probabilities, and where they stand in its text.

Shapes: ``T`` tokens, ``K`` best tokens, ``M`` given tokens, ``S`` spans.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpmpi.errors import UserError
from cpmpi.run.extras import checksum_of, recorded_checksums
from cpmpi.run.hdf5 import RawArray
from cpmpi.run.kept import KEPT, PAIRS
from cpmpi.run.publish import saying
from cpmpi.run.results import GREEDY
from cpmpi.run.text_places import BYTES, CHARACTERS

if TYPE_CHECKING:
    from cpmpi.run.reader import Run
    from cpmpi.run.spec import DocumentSpec


class DocumentScores(ABC):
    """The part of a `cpmpi.run.document.Document` that docs/scores.md is about."""

    run: Run
    group: Any
    _path: Path

    def __init__(self) -> None:
        self._sound: set[str] = set()

    @property
    @abstractmethod
    def id(self) -> str: ...
    @property
    @abstractmethod
    def n_tokens(self) -> int: ...
    @property
    @abstractmethod
    def nll(self) -> float: ...
    @property
    @abstractmethod
    def continues(self) -> Mapping[str, Any]: ...
    @abstractmethod
    def _output(self, name: str) -> RawArray: ...
    @abstractmethod
    def _check_outputs(self) -> None: ...

    if TYPE_CHECKING:

        @cached_property
        def spec(self) -> DocumentSpec: ...

    @property
    def first_scored(self) -> int:
        """The first token that has a log-probability: 0 where something comes before it, else 1, or from where on
        tokens are scored, or the first that was appended to what was imported without log-probabilities."""
        return self.spec.first_scored(self.run.scoring)

    @property
    def greedy(self) -> npt.NDArray[np.bool_] | None:
        """(T,) whether each token is the most probable one; None where that is not kept (``--keep greedy``)."""
        if KEPT + GREEDY in self.group:
            return self.extra(KEPT + GREEDY).astype(np.bool_)
        return self._output(GREEDY).astype(np.bool_) if GREEDY in self.group else None

    @property
    def kept_names(self) -> tuple[str, ...]:
        """What ``kept`` can give: ``rank``, ``entropy``, ``greedy``, ``moments``, ``topk``, ``ids``."""
        names = [extra.name.removeprefix(KEPT) for extra in self.spec.extras if extra.name.startswith(KEPT)]
        paired = {part for parts in PAIRS.values() for part in parts}
        return tuple(n for n in names if n not in paired) + tuple(n for n, parts in PAIRS.items() if parts[0] in names)

    def kept(self, name: str) -> Any:
        """A score that was kept of every token, row i of token i; see docs/scores.md for what each is.

        Args:
            name: one of ``kept_names``.

        Returns:
            An array: ``rank`` (T,) int32, ``entropy`` (T,) float32, ``greedy`` (T,) bool, ``moments`` (T, 2) float32.
            Or two: of ``topk`` the ids (T, K) int32 and log-probabilities (T, K) float32, of ``ids`` the ids (M,) int32
            and log-probabilities (T, M) float32.

        Raises:
            UserError: it is not kept, or damaged, or the document is not complete.
        """
        if name not in self.kept_names:
            have = ", ".join(self.kept_names) or "nothing (see --keep)"
            raise UserError(f"{self._path}: document {self.id!r}: {name} is not kept; it has {have}")
        if name in PAIRS:
            return tuple(self.extra(KEPT + part) for part in PAIRS[name])
        return self.greedy if name == GREEDY else self.extra(KEPT + name)

    def extra(self, name: str) -> RawArray:
        """A dataset besides the outputs, such as ``kept/rank``, compared with its checksum.

        Raises:
            UserError: it is damaged, or the document is not complete.
            KeyError: there is none of this name.
        """
        self.check_extra(name)
        return np.asarray(self.group[name])

    def check_extra(self, name: str) -> None:
        """Compare a dataset besides the outputs with its checksum; once.

        Raises:
            UserError: as ``extra``.
        """
        self._check_outputs()
        if name not in self._sound:
            with saying(self._path, f"document {self.id!r} cannot be read"):
                found = checksum_of(self.group[name])
            if found != recorded_checksums(self.group)[name]:
                raise UserError(
                    f"{self._path}: document {self.id!r}: {name} does not have the checksum that was recorded"
                )
            self._sound.add(name)

    @property
    def n_characters(self) -> int | None:
        """Characters of its text; None where token ids were given, or tokens were appended."""
        return dict(self.spec.text).get("n_characters")

    @property
    def n_bytes(self) -> int | None:
        """Bytes of its text in UTF-8; None where token ids were given, or tokens were appended."""
        return dict(self.spec.text).get("n_bytes")

    @property
    def bits_per_byte(self) -> float:
        """nll / log(2) / bytes of the text that it is of: all after the last token that is not scored.

        NaN where token ids were given, or tokens were appended, or it is not known how much text those before have.
        """
        return self._bits_per("scored_bytes")

    @property
    def bits_per_character(self) -> float:
        """As ``bits_per_byte``, for characters."""
        return self._bits_per("scored_characters")

    def _bits_per(self, name: str) -> float:
        return bits_per(self.nll, dict(self.spec.text).get(name, -1))

    @property
    def token_characters(self) -> npt.NDArray[np.integer] | None:
        """(T, 2) first character of each token in the text and the one after its last; None where that is not known."""
        return self._places(CHARACTERS)

    @property
    def token_bytes(self) -> npt.NDArray[np.integer] | None:
        """(T, 2) the same in bytes of UTF-8."""
        return self._places(BYTES)

    def _places(self, name: str) -> npt.NDArray[np.integer] | None:
        return self.extra(name) if name in recorded_checksums(self.group) else None

    @property
    def spans(self) -> dict[str, RawArray] | None:
        """By name: ``characters`` (S, 2) and ``bytes`` (S, 2) of each span, ``n_tokens`` (S,) that are scored in it,
        ``logprob`` (S,), the sum of theirs, and ``id`` (S,) where a file gave some; None without ``--spans``."""
        names = [extra.name for extra in self.spec.extras if extra.name.startswith("spans/")]
        if not names:
            return None
        found = {name.removeprefix("spans/"): self.extra(name) for name in names}
        return {name: np.char.decode(a, "utf-8") if a.dtype.kind == "S" else a for name, a in found.items()}


def bits_per(nll: float, count: int) -> float:
    """``nll / log(2) / count``; NaN where the count is not known, or 0."""
    return nll / math.log(2) / count if count > 0 else math.nan
