"""What follows a stored document: continuations are scored against its keys and values, which are not made again.

Continuations of one context are *branches*: each is causal to itself, sees the context and the branch that it follows
(one question, several answers), and is blind to the others. Their queries attend to the stored keys across ranks, by
any schedule, and to the keys of their own line here; both are partials of the same softmax and merge exactly.

Legend: C tokens of a branch, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Execution, Keys, Queries, Rule
from cpmpi.attention.layout import Dealt, Holding, Layout, Piece
from cpmpi.engine.score import Engine
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.partial import Partial
from cpmpi.model.attention_call import Call, rule_of
from cpmpi.model.finite import finite, finite_layers
from cpmpi.model.forward import Chunk, layer_major
from cpmpi.model.head import Head, decoder_of

LineKeys = tuple[torch.Tensor, torch.Tensor, int]


class ContextKeys(Protocol):
    """This rank's share of the keys and values of what comes before, such as `cpmpi.run.cache.StoredKeys`."""

    layout: Layout
    layouts: tuple[Layout, ...]

    def layer(self, layer: int) -> Keys:
        """Those of a layer."""


class Before(NamedTuple):
    """A context, as what comes before something else.

    Attributes:
        n_tokens: its positions.
        last_hidden: the hidden state after the final norm of its last token, from which the first token of a
            continuation is predicted; None where that token is the stem's first.
        base: where its positions begin among those of all contexts of a pass, by which attention tells them apart.
    """

    n_tokens: int
    last_hidden: torch.Tensor | None = None
    base: int = 0


class Branch(NamedTuple):
    """Tokens that follow a context, or another branch of it.

    Attributes:
        ids: token ids (C,).
        start: position of the first.
        parent: the place of the branch that it follows among those of its rank; None: it follows the context.
        base: of the context.
    """

    ids: npt.NDArray[np.int64]
    start: int
    parent: int | None = None
    base: int = 0

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + len(self.ids)

    @property
    def run(self) -> Piece:
        """Its positions among those of all contexts."""
        return Piece(self.base + self.start, self.base + self.stop)


APART = 1 << 32
"""Positions from the base of one context to that of the next: more than any text has."""


def apart(mask: Mask, bases: Sequence[int]) -> Mask:
    """The mask for contexts whose positions begin at ``bases``: each as by itself, and blind to the others."""
    if len(bases) == 1:
        return mask
    return replace(mask, documents=tuple(base + start for base in bases for start in (0, *mask.documents))[1:])


class Pack(NamedTuple):
    """Branches that go through the model as one chunk, one after the other: rows of larger matrix products."""

    branches: tuple[Branch, ...]

    @property
    def size(self) -> int:
        """Its tokens."""
        return sum(len(b.ids) for b in self.branches)

    def chunk(self, device: torch.device) -> Chunk:
        """As the model takes it."""
        ids_C = torch.from_numpy(np.concatenate([b.ids for b in self.branches])).to(device)
        positions_C = None
        if len(self.branches) > 1:
            positions_C = torch.cat([torch.arange(b.start, b.stop, device=device) for b in self.branches])
        return Chunk(ids_C, self.branches[0].start, positions_C)

    def split(self, rows_C: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
        """The part of each branch."""
        return torch.split(rows_C, [len(b.ids) for b in self.branches], dim)

    def calls(self, call: Call) -> list[Call]:
        """What each branch hands over in a layer."""
        parts = (self.split(tensor, 2) for tensor in (call.q_1HCD, call.k_1GCD, call.v_1GCE))
        return [call._replace(q_1HCD=q, k_1GCD=k, v_1GCE=v) for q, k, v in zip(*parts, strict=True)]


def packed(branches: Sequence[Branch], most: int) -> list[Pack]:
    """Branches next to one another in packs of at most ``most`` tokens, or of one branch."""
    packs: list[list[Branch]] = []
    tokens = 0
    for branch in branches:
        if not packs or tokens + len(branch.ids) > most:
            packs.append([])
            tokens = 0
        packs[-1].append(branch)
        tokens += len(branch.ids)
    return [Pack(tuple(pack)) for pack in packs]


class Question(NamedTuple):
    """A stem that follows a context, and the answers that may follow it; the stem may be empty.

    ``context`` is the context's place among those of the pass.
    """

    stem: npt.NDArray[np.int64]
    answers: tuple[npt.NDArray[np.int64], ...]
    context: int = 0


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
    questions: Sequence[Question], mine: Sequence[tuple[int, int]], contexts: Sequence[Before], chunk_tokens: int
) -> tuple[list[Branch], list[list[int]]]:
    """The branches of one holder after some contexts, and for each of its answers the places of its own.

    Long stems and answers become several branches, each following the one before. The first places of an answer's list
    are those of its stem, if it has one.
    """
    branches: list[Branch] = []
    stems: dict[int, list[int]] = {}

    def grow(q: int, ids: npt.NDArray[np.int64], line: list[int]) -> list[int]:
        context = contexts[questions[q].context]
        first = branches[line[-1]].stop if line else context.n_tokens
        n = -(-len(ids) // chunk_tokens)
        for a, b in pairwise(len(ids) * i // max(n, 1) for i in range(n + 1)):  # none of no tokens
            branches.append(Branch(ids[a:b], first + a, line[-1] if line else None, context.base))
            line = [*line, len(branches) - 1]
        return line

    for q, _ in mine:
        if q not in stems:
            stems[q] = grow(q, questions[q].stem, [])
    return branches, [grow(q, questions[q].answers[i], stems[q]) for q, i in mine]


@dataclass(kw_only=True)
class Extension:
    """Scores what may follow stored contexts; every rank has one, and calls it with the same questions.

    Args:
        engine: the model, its schedule and its transports.
        context: this rank's share of the stored keys and values, of all contexts.
        n_tokens: positions of the context, or of the first of several.
        last_hidden: its; see `Before`.
        more: further contexts, as the stored keys have them.
    """

    engine: Engine
    context: ContextKeys
    n_tokens: int
    last_hidden: torch.Tensor | None
    more: tuple[Before, ...] = ()

    @property
    def contexts(self) -> tuple[Before, ...]:
        """All of them."""
        return Before(self.n_tokens, self.last_hidden), *self.more

    @torch.inference_mode()
    def score(self, questions: Sequence[Question]) -> list[Scored]:
        """The answers that this rank computed; of ranks that share the weights, the first has them. Collective."""
        engine = self.engine
        dealt = deal(questions, self._holders)
        lines = [branches_of(questions, each, self.contexts, engine.chunk_tokens) for each in dealt]
        branches, answers = lines[self._here]
        placed = Dealt(
            runs=tuple(tuple(b.run for b in each) for each, _ in lines), copies=engine.grid.copies
        )  # fmt: skip
        states = self._hidden(branches, placed, max(branch.stop for each, _ in lines for branch in each))
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
            last_hidden = self.contexts[questions[q].context].last_hidden
            assert last_hidden is not None
            before_TC = torch.cat([last_hidden[None].to(hidden_TC), hidden_TC[:-1]])
        targets_T = torch.from_numpy(answer).to(hidden_TC.device)
        logprobs, greedy = Head(self.engine.weights.model).judge(before_TC, targets_T)
        return Scored(q, i, logprobs.numpy(), greedy.numpy(), hidden_TC[-1].float().cpu().numpy())

    def _hidden(self, branches: list[Branch], placed: Dealt, longest: int) -> list[torch.Tensor]:
        """Hidden states (C, hidden) after the final norm of each of this rank's branches. Collective.

        Args:
            branches: of this rank.
            placed: the branches of all ranks.
            longest: tokens of the longest text that any of them is the end of.
        """
        weights, device = self.engine.weights, self.engine.device
        packs = packed(branches, self.engine.chunk_tokens)
        chunks = [pack.chunk(device) for pack in packs]
        if not chunks:  # walks along, and nobody takes its result
            chunks = [Chunk(torch.zeros(1, dtype=torch.int64, device=device), self.n_tokens)]
        self.engine.flight.pass_on()
        decoder = decoder_of(weights.model)

        def attend(layer: int, calls: list[Call]) -> Sequence[torch.Tensor]:
            each = [one for pack, call in zip(packs, calls, strict=False) for one in pack.calls(call)]
            out_THE = self.attend(branches, placed, longest, layer, each or calls)
            return torch.split(out_THE, [pack.size for pack in packs]) if packs else [out_THE]

        weights.enter(0)
        with finite_layers(decoder) if self.engine.check_finite else nullcontext():
            packed_states = layer_major(decoder, chunks, longest, attend)
        weights.close()
        states = [state_CD for pack, each in zip(packs, packed_states, strict=False) for state_CD in pack.split(each)]
        if self.engine.check_finite:
            for branch, hidden_CD in zip(branches, states, strict=True):
                finite(hidden_CD, f"output of the final norm, tokens {branch.start} to {branch.run.stop - 1}")
        return states

    def attend(
        self, branches: list[Branch], placed: Dealt, longest: int, layer: int, calls: list[Call]
    ) -> torch.Tensor:
        """A layer's attention (T, H, E): each branch to its own line, then across ranks to the stored keys.

        ``calls`` has what each branch hands over; of a rank without any, what the token does that walks along.
        """
        engine, program = self.engine, self.engine.schedule.program(self.engine.position)
        engine.flight.enter(layer, len(program))
        engine.weights.leave(layer)
        rule = rule_of(calls[0], longest)
        across = replace(rule, mask=apart(rule.mask, [each.base for each in self.contexts]))
        execution = Execution(
            rank=engine.position, program=program, transport=engine.transport, backend=engine.backends[layer],
            heads=engine.layers[layer].heads, rule=across, query_layout=placed, key_layouts=self._key_layouts,
            device=engine.device, recorder=engine.recorder, flight=engine.flight,
        )  # fmt: skip
        if branches:
            execution.partials[engine.position] = self._own(branches, layer, calls, rule)
        runs = [(b.run.start, call.q_1HCD[0].transpose(0, 1)) for b, call in zip(branches, calls, strict=False)]
        out_THE = execution.run(Queries(tuple(runs)), self._keys(layer, calls))
        engine.weights.enter(layer + 1)
        return out_THE if branches else out_THE.new_zeros(1, *out_THE.shape[1:])

    @property
    def _key_layouts(self) -> tuple[Holding, ...]:
        """Which rank has which of the keys that all ranks' queries meet."""
        return self.context.layouts if self.more else (self.context.layout,)

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
