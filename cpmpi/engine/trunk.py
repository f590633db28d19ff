"""A long text after a stored context, dealt over the ranks as a prefill's tokens are; short answers may follow it.

Its keys and values lie beside the stored ones, a share on each rank, and its queries meet both by one schedule. So the
text may be as long as a document, and what it leaves can be stored as more of the document.

Legend: C tokens of a chunk, T tokens of the text, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Keys
from cpmpi.attention.layout import Dealt, Holding, Layout, Piece
from cpmpi.engine.extend import Before, Branch, Extension, LineKeys, Question, Scored, branches_of, deal
from cpmpi.engine.score import KeepKeys, rows_of
from cpmpi.model.attention_call import Call
from cpmpi.model.forward import chunked
from cpmpi.model.head import Head

LEAST_TOKENS = 512  # of a text that is dealt over the ranks: below, a rank computes it sooner than messages travel
MOST_TRIED = 64


class Joint(NamedTuple):
    """What all ranks compute together: of a question the stem, then some answers, or one answer with its stem."""

    question: int
    answers: tuple[int, ...]
    whole: bool
    """Whether the answer is a part of the text that is dealt."""


class Grown(NamedTuple):
    """What a text is after its context: log-probabilities (T,) float32, whether each token is the most probable one
    (T,), and the last token's hidden state after the final norm, float32. Where only the end is asked for, what comes
    before is NaN and False."""

    logprobs: npt.NDArray[np.float32]
    greedy: npt.NDArray[np.bool_]
    last_hidden: npt.NDArray[np.float32]


def plan(questions: Sequence[Question], holders: int, least: int = LEAST_TOKENS) -> tuple[list[Joint], list[Question]]:
    """Which texts are dealt over the ranks, and the questions with the other answers, in their places.

    The longest ones are, as many as it takes for the fullest holder to have the fewest tokens.
    """
    sized = candidates(questions, least)

    def fullest(n: int) -> float:
        joints = [joint for _, joint in sized[:n]]
        return sum(size for size, _ in sized[:n]) / holders + load(without(questions, joints), holders)

    best = min(range(min(len(sized), MOST_TRIED) + 1), key=lambda n: (fullest(n), n))
    joints = [joint for _, joint in sized[:best]]
    return joints, without(questions, joints)


def candidates(questions: Sequence[Question], least: int) -> list[tuple[int, Joint]]:
    """What has ``least`` tokens and could be dealt over the ranks, with its tokens; the longest first."""
    sized = []
    for q, question in enumerate(questions):
        stem, sizes = len(question.stem), [len(answer) for answer in question.answers]
        there = [i for i, size in enumerate(sizes) if size]
        alone = [i for i in there if sizes[i] >= least or (stem + sizes[i] >= least and len(there) == 1)]
        sized += [(stem + sizes[i], Joint(q, (i,), True)) for i in alone]
        others = tuple(i for i in there if i not in alone)
        if others and stem >= least:
            sized.append((stem + sum(sizes[i] for i in others), Joint(q, others, False)))
    return sorted(sized, key=lambda entry: (-entry[0], entry[1]))


def without(questions: Sequence[Question], joints: Sequence[Joint]) -> list[Question]:
    """The questions with the answers that are left, the others without tokens."""
    taken = {(joint.question, i) for joint in joints for i in joint.answers}
    return [
        one._replace(answers=tuple(a[:0] if (q, i) in taken else a for i, a in enumerate(one.answers)))
        for q, one in enumerate(questions)
    ]


def judge(make: Callable[[npt.NDArray[np.int64]], Trunk], question: Question, joint: Joint) -> list[Scored]:
    """The scores of a question's answers that are computed together; each from one rank. Collective.

    Args:
        make: a trunk of token ids.
        question: whose answers they are.
        joint: which.
    """
    answers = [question.answers[i] for i in joint.answers]
    if not joint.whole:
        _, found = make(question.stem).grow(answers, scored=0)
        return [s._replace(question=joint.question, answer=joint.answers[s.answer]) for s in found]
    n, trunk = len(answers[0]), make(np.concatenate([question.stem, answers[0]]))
    grown, _ = trunk.grow(scored=n)
    which = joint.question, joint.answers[0]
    found = [Scored(*which, grown.logprobs[-n:], grown.greedy[-n:], grown.last_hidden)]
    return found if not trunk.engine.rank else []


def load(questions: Sequence[Question], holders: int) -> int:
    """Tokens of the holder that has most, where each answer is computed by one."""
    return max(
        sum(len(questions[q].answers[i]) for q, i in mine) + sum(len(questions[q].stem) for q in {q for q, _ in mine})
        for mine in deal(questions, holders)
    )


@dataclass(kw_only=True)
class Trunk(Extension):
    """A long text on its way through the layers; every rank has one of the same text.

    Args:
        ids: token ids (T,) of the text.
        segments: that it is cut into.
        gather: what every rank gives, in the order of ranks, to all (an ``allgather``).
    """

    ids: npt.NDArray[np.int64]
    segments: int
    gather: Callable[[Any], list[Any]]
    _parts: list[Piece] = field(default_factory=list)
    _keep: KeepKeys | None = None

    @property
    def layout(self) -> Layout:
        """Which position of a head group keeps the keys of which tokens of the text."""
        return Layout(
            n_tokens=len(self.ids), world=self.context.layout.world, segments=self.segments, start=self.n_tokens
        )

    @torch.inference_mode()
    def grow(
        self, answers: Sequence[npt.NDArray[np.int64]] = (), *, scored: int | None = None,
        keep: KeepKeys | None = None, name: str = "",
    ) -> tuple[Grown, list[Scored]]:  # fmt: skip
        """Take the text through the model, dealt over the ranks, and with it answers that follow it. Collective.

        Args:
            answers: token ids of each, computed by one rank each.
            scored: how many of its last tokens get a log-probability; None: all.
            keep: takes each layer's number and this rank's keys (T, G, D) and values (T, G, E) of the text.
            name: of the text, for progress.

        Returns:
            What the text is, on all ranks, and the answers that this rank computed.
        """
        engine, ids, self._keep = self.engine, self.ids, keep
        stop, computed = self.n_tokens + len(ids), engine.grid.computed(self.layout)
        after = Question(ids[:0], tuple(answers))
        dealt = deal([after], self._holders)
        shares = [branches_of([after], mine, (Before(stop),), engine.chunk_tokens) for mine in dealt]
        pieces = [computed.pieces(holder * engine.grid.copies) for holder in range(self._holders)]
        placed = Dealt(
            runs=tuple((*own, *(b.run for b in branches)) for own, (branches, _) in zip(pieces, shares, strict=True)),
            copies=engine.grid.copies,
        )  # fmt: skip
        self._parts = chunked(pieces[self._here], engine.chunk_tokens)
        first = len(self._parts)
        own = [Branch(ids[p.start - self.n_tokens : p.stop - self.n_tokens], p.start) for p in self._parts]
        branches, lines = shares[self._here]
        own += [b._replace(parent=None if b.parent is None else b.parent + first) for b in branches]
        engine.progress.start(name, len(ids), len(engine.layers))
        states = self._hidden(own, placed, max(run.stop for runs in placed.runs for run in runs))
        everyone = self.gather(self._judge_parts(states, len(ids) if scored is None else scored))
        grown = assemble(everyone, self.n_tokens, len(ids))
        if engine.grid.tp_index(engine.rank):
            return grown, []
        last = torch.from_numpy(grown.last_hidden)
        found = [
            self._judge_after(last, which, answers[which[1]], [states[first + place] for place in line])
            for which, line in zip(dealt[self._here], lines, strict=True)
        ]
        return grown, found

    def _judge_parts(self, states: Sequence[torch.Tensor], scored: int) -> list[tuple[int, Any, Any, Any]]:
        """Of this rank's tokens: first position, log-probabilities and greedy flags of each run; the last hidden state.

        The hidden state at position i predicts token i + 1. Ranks that share the weights take a share of each run.
        """
        head, tp = Head(self.engine.weights.model), self.engine.grid.tp
        index, stop = self.engine.grid.tp_index(self.engine.rank), self.n_tokens + len(self.ids)
        ids_T = torch.from_numpy(self.ids).to(self.engine.device)
        found: list[tuple[int, Any, Any, Any]] = []

        def note(first: int, before_CD: torch.Tensor) -> None:
            at = first - self.n_tokens
            logprobs, greedy = head.judge(before_CD, ids_T[at : at + len(before_CD)])
            found.append((first, logprobs.numpy(), greedy.numpy(), None))

        for part, state_CD in zip(self._parts, states, strict=False):
            if part.start == self.n_tokens and scored == len(self.ids) and self.last_hidden is not None and not index:
                note(part.start, self.last_hidden[None].to(state_CD))
            first, last = max(part.start + 1, stop - scored), min(part.stop + 1, stop)
            a, b = (first + max(0, last - first) * i // tp for i in (index, index + 1))
            if a < b:
                note(a, state_CD[a - 1 - part.start : b - 1 - part.start])
            if part.stop == stop and not index:
                found.append((stop, (), (), state_CD[-1].float().cpu().numpy()))
        return found

    def _judge_after(
        self, last: torch.Tensor, which: tuple[int, int], answer: npt.NDArray[np.int64], states: list[torch.Tensor]
    ) -> Scored:  # fmt: skip
        """The scores of an answer that follows the text."""
        hidden_TC = torch.cat(states)
        before_TC = torch.cat([last[None].to(hidden_TC), hidden_TC[:-1]])
        targets_T = torch.from_numpy(answer).to(hidden_TC.device)
        logprobs, greedy = Head(self.engine.weights.model).judge(before_TC, targets_T)
        return Scored(*which, logprobs.numpy(), greedy.numpy(), hidden_TC[-1].float().cpu().numpy())

    def attend(
        self, branches: list[Branch], placed: Dealt, longest: int, layer: int, calls: list[Call]
    ) -> torch.Tensor:
        """As for continuations, with progress."""
        outputs = super().attend(branches, placed, longest, layer, calls)
        self.engine.progress.update(layer + 1)
        return outputs

    @property
    def _key_layouts(self) -> tuple[Holding, ...]:
        return self.context.layout, self.layout

    def _keys(self, layer: int, calls: list[Call]) -> Keys:
        """This rank's share of the stored keys, then of the text's; these are kept where that is asked for."""
        position, heads = self.engine.position, self.engine.layers[layer].heads
        stored, pieces = self.context.layer(layer), self.layout.pieces(position)
        keys = Keys.empty((*stored.pieces, *pieces), heads, self.engine.device)
        n = len(stored.k_SGD)
        keys.k_SGD[:n], keys.v_SGE[:n] = stored.k_SGD, stored.v_SGE
        if kept := rows_of(pieces, self._parts):
            torch.cat([calls[i].k_1GCD[0].transpose(0, 1)[rows] for i, rows in kept], out=keys.k_SGD[n:])
            torch.cat([calls[i].v_1GCE[0].transpose(0, 1)[rows] for i, rows in kept], out=keys.v_SGE[n:])
        if self._keep is not None:
            self._keep(layer, keys.k_SGD[n:], keys.v_SGE[n:])
        return keys

    def _line(self, branches: list[Branch], i: int, layer: int, calls: list[Call]) -> Any:
        """The text's own keys are among those that travel; answers have theirs here."""
        lines: list[LineKeys] = [] if i < len(self._parts) else list(super()._line(branches, i, layer, calls))
        return iter(lines)


def assemble(everyone: Sequence[Sequence[tuple[int, Any, Any, Any]]], start: int, n_tokens: int) -> Grown:
    """A text's scores from what all ranks found."""
    logprobs, greedy = np.full(n_tokens, np.nan, np.float32), np.zeros(n_tokens, np.bool_)
    last_hidden = None
    for first, values, flags, hidden in (run for each in everyone for run in each):
        at = slice(first - start, first - start + len(values))
        logprobs[at], greedy[at] = values, flags
        last_hidden = hidden if hidden is not None else last_hidden
    assert last_hidden is not None
    return Grown(logprobs, greedy, last_hidden)
