"""What follows a stored document: continuations are scored against its keys and values, which are not made again.

Continuations of one context are *branches*: each is causal to itself, sees the context and the branch that it follows
(one question, several answers), and is blind to the others. Their queries attend to the stored keys across ranks, by
any schedule, and to the keys of their own line here; both are partials of the same softmax and merge exactly.

Legend: C tokens of a branch, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Execution, Keys, Queries, Rule
from cpmpi.attention.layout import Dealt, Holding, Piece
from cpmpi.engine.score import Engine
from cpmpi.kernels.partial import Partial
from cpmpi.model.attention_call import Call, rule_of
from cpmpi.model.finite import finite, finite_layers
from cpmpi.model.forward import Chunk, layer_major
from cpmpi.model.head import Head, decoder_of
from cpmpi.run.cache import StoredKeys

LineKeys = tuple[torch.Tensor, torch.Tensor, int]


class Branch(NamedTuple):
    """Tokens that follow the context, or another branch of it.

    Attributes:
        ids: token ids (C,).
        start: position of the first.
        parent: the place of the branch that it follows among those of its rank; None: it follows the context.
    """

    ids: npt.NDArray[np.int64]
    start: int
    parent: int | None = None

    @property
    def run(self) -> Piece:
        """Its positions."""
        return Piece(self.start, self.start + len(self.ids))


class Question(NamedTuple):
    """A stem that follows the context, and the answers that may follow it; the stem may be empty."""

    stem: npt.NDArray[np.int64]
    answers: tuple[npt.NDArray[np.int64], ...]


class Scored(NamedTuple):
    """An answer: which of which question, its tokens' log-probabilities (C,) float32, whether each token is the most
    probable one (C,), and the last token's hidden state after the final norm, float32."""

    question: int
    answer: int
    logprobs: npt.NDArray[np.float32]
    greedy: npt.NDArray[np.bool_]
    last_hidden: npt.NDArray[np.float32]


def keys_of(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (C, G, D) and values (C, G, E) that a chunk hands over."""
    return call.k_1GCD[0].transpose(0, 1), call.v_1GCE[0].transpose(0, 1)


def deal(questions: Sequence[Question], holders: int) -> list[list[tuple[int, int]]]:
    """Which holder computes which answers, as (question, answer): the longest first, to whoever has the least tokens.

    A stem is computed by every holder that has one of its answers. Answers without tokens are left out.
    """
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(holders)]
    load, stems = [0] * holders, [set[int]() for _ in range(holders)]
    answers = [(len(a), q, i) for q, question in enumerate(questions) for i, a in enumerate(question.answers) if len(a)]
    for size, q, i in sorted(answers, key=lambda entry: (-entry[0], entry[1:])):
        cost = [load[h] + size + (0 if q in stems[h] else len(questions[q].stem)) for h in range(holders)]
        holder = min(range(holders), key=lambda h: (cost[h], h))
        load[holder] = cost[holder]
        stems[holder].add(q)
        dealt[holder].append((q, i))
    return [sorted(each) for each in dealt]


def branches_of(
    questions: Sequence[Question], mine: Sequence[tuple[int, int]], start: int, chunk_tokens: int
) -> tuple[list[Branch], list[list[int]]]:
    """The branches of one holder from position ``start`` on, and for each of its answers the places of its own.

    Long stems and answers become several branches, each following the one before. The first places of an answer's list
    are those of its stem, if it has one.
    """
    branches: list[Branch] = []
    stems: dict[int, list[int]] = {}

    def grow(ids: npt.NDArray[np.int64], line: list[int]) -> list[int]:
        first = branches[line[-1]].run.stop if line else start
        n = -(-len(ids) // chunk_tokens)
        for a, b in pairwise(len(ids) * i // n for i in range(n + 1)):
            branches.append(Branch(ids[a:b], first + a, line[-1] if line else None))
            line = [*line, len(branches) - 1]
        return line

    for q, _ in mine:
        if q not in stems:
            stems[q] = grow(questions[q].stem, []) if len(questions[q].stem) else []
    return branches, [grow(questions[q].answers[i], stems[q]) for q, i in mine]


@dataclass(kw_only=True)
class Extension:
    """Scores what may follow a stored context; every rank has one, and calls it with the same questions.

    Args:
        engine: the model, its schedule and its transports.
        context: this rank's share of the stored keys and values.
        n_tokens: positions of the context.
        last_hidden: the hidden state after the final norm of the context's last token, from which the first token of a
            continuation is predicted; None where that token is the stem's first.
    """

    engine: Engine
    context: StoredKeys
    n_tokens: int
    last_hidden: torch.Tensor | None

    @torch.inference_mode()
    def score(self, questions: Sequence[Question]) -> list[Scored]:
        """The answers that this rank computed; of ranks that share the weights, the first has them. Collective."""
        engine = self.engine
        dealt = deal(questions, self._holders)
        lines = [branches_of(questions, each, self.n_tokens, engine.chunk_tokens) for each in dealt]
        branches, answers = lines[self._here]
        placed = Dealt(
            runs=tuple(tuple(b.run for b in each) for each, _ in lines), copies=engine.grid.copies
        )  # fmt: skip
        states = self._hidden(branches, placed)
        if engine.grid.tp_index(engine.rank):
            return []
        mine = zip(dealt[self._here], answers, strict=True)
        return [self._judge(questions, which, branches, line, states) for which, line in mine]

    @property
    def _holders(self) -> int:
        """Ranks, or groups of ranks that share the weights, that compute different tokens."""
        return self.context.layout.world // self.engine.grid.copies

    @property
    def _here(self) -> int:
        """Which of them this rank is."""
        return self.engine.position // self.engine.grid.copies

    def _judge(
        self, questions: Sequence[Question], which: tuple[int, int], branches: list[Branch], line: list[int],
        states: Sequence[torch.Tensor],
    ) -> Scored:  # fmt: skip
        """An answer's scores from the hidden states before each of its tokens."""
        q, i = which
        answer = questions[q].answers[i]
        hidden_TC = torch.cat([states[place] for place in line])
        if len(questions[q].stem):
            before_TC = hidden_TC[-len(answer) - 1 : -1]
        else:
            assert self.last_hidden is not None
            before_TC = torch.cat([self.last_hidden[None].to(hidden_TC), hidden_TC[:-1]])
        targets_T = torch.from_numpy(answer).to(hidden_TC.device)
        logprobs, greedy = Head(self.engine.weights.model).judge(before_TC, targets_T)
        return Scored(q, i, logprobs.numpy(), greedy.numpy(), hidden_TC[-1].float().cpu().numpy())

    def _hidden(self, branches: list[Branch], placed: Dealt) -> list[torch.Tensor]:
        """Hidden states (C, hidden) after the final norm of each of this rank's branches. Collective."""
        weights, device = self.engine.weights, self.engine.device
        chunks = [Chunk(torch.from_numpy(b.ids).to(device), b.start) for b in branches]
        if not chunks:  # walks along, and nobody takes its result
            chunks = [Chunk(torch.zeros(1, dtype=torch.int64, device=device), self.n_tokens)]
        longest = max(run.stop for runs in placed.runs for run in runs)
        self.engine.flight.pass_on()
        weights.enter(0)
        attend, decoder = partial(self.attend, branches, placed, longest), decoder_of(weights.model)
        with finite_layers(decoder) if self.engine.check_finite else nullcontext():
            states = layer_major(decoder, chunks, longest, attend)
        weights.close()
        if self.engine.check_finite:
            for branch, hidden_CD in zip(branches, states, strict=False):
                finite(hidden_CD, f"output of the final norm, tokens {branch.start} to {branch.run.stop - 1}")
        return states

    def attend(
        self, branches: list[Branch], placed: Dealt, longest: int, layer: int, calls: list[Call]
    ) -> Sequence[torch.Tensor]:
        """A layer's attention: each branch to its own line, then across ranks to the stored keys."""
        engine, program = self.engine, self.engine.schedule.program(self.engine.position)
        engine.flight.enter(layer, len(program))
        engine.weights.leave(layer)
        rule = rule_of(calls[0], longest)
        execution = Execution(
            rank=engine.position, program=program, transport=engine.transport, backend=engine.backends[layer],
            heads=engine.layers[layer].heads, rule=rule, query_layout=placed, key_layouts=self._key_layouts,
            device=engine.device, recorder=engine.recorder, flight=engine.flight,
        )  # fmt: skip
        if branches:
            execution.partials[engine.position] = self._own(branches, layer, calls, rule)
        runs = [(b.start, call.q_1HCD[0].transpose(0, 1)) for b, call in zip(branches, calls, strict=False)]
        out_THE = execution.run(Queries(tuple(runs)), self._keys(layer, calls))
        engine.weights.enter(layer + 1)
        if not branches:
            return [out_THE.new_zeros(1, *out_THE.shape[1:])]
        return torch.split(out_THE, [len(b.ids) for b in branches])

    @property
    def _key_layouts(self) -> tuple[Holding, ...]:
        """Which rank has which of the keys that all ranks' queries meet."""
        return (self.context.layout,)

    def _keys(self, layer: int, calls: list[Call]) -> Keys:
        """This rank's share of them."""
        return self.context.layer(layer)

    def _own(self, branches: list[Branch], layer: int, calls: list[Call], rule: Rule) -> Partial:
        """Attention of all branches, one after the other, to themselves and those that they follow."""
        heads, backend = self.engine.layers[layer].heads, self.engine.backends[layer]
        own = Partial(
            sum(len(b.ids) for b in branches), heads.query_heads, heads.value_dim, device=self.engine.device
        )  # fmt: skip
        row = 0
        for i, branch in enumerate(branches):
            q_CHD = calls[i].q_1HCD[0].transpose(0, 1)
            for k_SGD, v_SGE, k_start in self._line(branches, i, layer, calls):
                backend.attend_into(
                    own, row, q_CHD, k_SGD, v_SGE, q_start=branch.start, k_start=k_start, mask=rule.mask,
                    scale=rule.scale, softcap=rule.softcap,
                )  # fmt: skip
            row += len(branch.ids)
        return own

    def _line(self, branches: list[Branch], i: int, layer: int, calls: list[Call]) -> Iterator[LineKeys]:
        """Keys and values of a branch and of those that it follows, with the position of the first."""
        place: int | None = i
        while place is not None:
            yield *keys_of(calls[place]), branches[place].start
            place = branches[place].parent
