"""Texts that are in memory on a model that is loaded once: sums of log-probabilities, and answers. No run folder.

Short texts go to one rank each, and ranks exchange nothing; long ones are dealt over all, as a document is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Heads, Keys
from cpmpi.attention.layout import Dealt, Layout, Piece
from cpmpi.comm.device import room_of
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.cost.choose import choose_schedule
from cpmpi.cost.memory import Memory, choose_residence, document_memory
from cpmpi.cost.workload import TokenSizes
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.engine.contexts import BATCH_TOKENS, check_rotary
from cpmpi.engine.continuations import batches
from cpmpi.engine.decode import Decoding, TokenIds
from cpmpi.engine.extend import Branch, Extension, Question, Scored, branches_of
from cpmpi.engine.generate import Answer, end_tokens
from cpmpi.engine.options import ModelOptions
from cpmpi.engine.prepare import find_place, inspect, progress_of, workload
from cpmpi.engine.run import load_engine
from cpmpi.engine.score import Engine
from cpmpi.engine.state import Decision, Inputs, Prepared
from cpmpi.engine.trunk import Trunk, candidates, judge, plan, without
from cpmpi.model.attention_call import Call, rule_of
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.head import Head
from cpmpi.model.linear import choose_products
from cpmpi.model.probe import DOCUMENT_TOKENS
from cpmpi.model.rotary import length_matters, same_for
from cpmpi.model.size import inner_width
from cpmpi.model.weights import weight_bytes

Which = tuple[int, int]  # an answer: of which question, and which of its answers
Batch = list[tuple[int, Question]]  # questions with their numbers


class Total(NamedTuple):
    """An answer's log-probability, and whether each of its tokens is the most probable one."""

    logprob: float
    greedy: bool


def longest_of(question: Question) -> int:
    """Tokens of the question with its longest answer that go through the model: all but the last."""
    return len(question.stem) + max(map(len, question.answers)) - 1


class NoKeys:
    """A rank's share of a context that has no tokens."""

    def __init__(self, layout: Layout, heads: Sequence[Heads], device: torch.device) -> None:
        self.layout, self.layouts = layout, (layout,)
        self.pieces: tuple[Piece, ...] = ()
        self._heads, self._device = heads, device

    def layer(self, layer: int) -> Keys:
        """None of a layer."""
        return Keys.empty((), self._heads[layer], self._device)


class Apart(Extension):
    """Texts after no context, each on one rank: all that a token attends to is there. Every question has a stem."""

    @torch.inference_mode()
    def score(self, questions: Sequence[Question]) -> list[Scored]:
        """The answers that this rank computed; of ranks that share the weights, the first has them.

        An answer's last token predicts nothing, and does not go through the model: answers of one token cost nothing
        beside their stem. So there is no last hidden state either.
        """
        fed = [Question(one.stem, tuple(answer[:-1] for answer in one.answers)) for one in questions]
        mine = [(q, i) for q in deal_whole(fed, self._holders)[self._here] for i in range(len(fed[q].answers))]
        branches, lines = branches_of(fed, mine, self.contexts, self.engine.chunk_tokens)
        if not branches:
            return []
        runs: list[tuple[Any, ...]] = [()] * self._holders
        runs[self._here] = tuple(branch.run for branch in branches)
        placed = Dealt(runs=tuple(runs), copies=self.engine.grid.copies)
        states = self._hidden(branches, placed, max(branch.stop for branch in branches))
        if self.engine.grid.tp_index(self.engine.rank):
            return []
        return [
            self._last(which, questions[which[0]].answers[which[1]], [states[place] for place in line])
            for which, line in zip(mine, lines, strict=True)
        ]

    def _last(self, which: Which, answer: TokenIds, states: list[torch.Tensor]) -> Scored:
        """The scores of the tokens of an answer that come after each of the last hidden states."""
        before_TC = torch.cat(states)[-len(answer) :]
        logprobs, greedy = Head(self.engine.weights.model).judge(
            before_TC, torch.from_numpy(answer).to(before_TC.device)
        )
        return Scored(*which, logprobs.numpy(), greedy.numpy(), np.empty(0, np.float32))

    def attend(
        self, branches: list[Branch], placed: Dealt, longest: int, layer: int, calls: list[Call]
    ) -> torch.Tensor:
        """A layer's attention (T, H, E): each branch to its own line, and no message to anybody."""
        weights = self.engine.weights
        weights.leave(layer)
        rule = rule_of(calls[0], longest)
        out_THE, _ = self._own(branches, layer, calls, rule).finish(rule.sinks_H)
        weights.enter(layer + 1)
        return out_THE if branches else out_THE.new_zeros(1, *out_THE.shape[1:])


class Answering(Decoding, Apart):
    """Generates after prompts, each on one rank."""


def deal_whole(questions: Sequence[Question], holders: int) -> list[list[int]]:
    """Which holder computes which questions: the longest first, to whoever has the least tokens."""
    dealt: list[list[int]] = [[] for _ in range(holders)]
    load = [0] * holders
    sizes = [len(one.stem) + sum(map(len, one.answers)) for one in questions]
    for q in sorted(range(len(questions)), key=lambda q: (-sizes[q], q)):
        holder = min(range(holders), key=lambda h: (load[h], h))
        load[holder] += sizes[q]
        dealt[holder].append(q)
    return [sorted(each) for each in dealt]


class Session:
    """A model on the ranks. Every rank has one and makes the same calls; all but the properties are collective.

    Args:
        options: of the model.
        ranks: of the launch.

    Raises:
        UserError: something the user can mend, on all ranks alike; no weight is read yet.
    """

    def __init__(self, options: ModelOptions, ranks: Ranks) -> None:
        self.options, self.ranks = options, ranks
        self.checkpoint = checkpoint = ranks.together(Checkpoint, options.model)
        self._inputs = Inputs(
            checkpoint=checkpoint, documents=(), longest=checkpoint.max_positions or DOCUMENT_TOKENS
        )  # fmt: skip
        self.model = inspect(options, ranks, self._inputs)
        self.place = find_place(options, ranks, self._inputs, self.model)
        self._work = workload(options, self.model, self.place, tokens=1)
        self._products = choose_products(self.place.skeleton, self.model.device, self.place.ranks)
        self._room = room_of(self.place.ranks, self.model.device)  # before there are weights
        self._progress = progress_of(options, self.place.ranks)
        self._stack = ExitStack()
        self._engine: Engine | None = None
        self._memory: Memory | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return load_tokenizer(self.checkpoint.folder)

    @property
    def holders(self) -> int:
        """Ranks, or groups of ranks that share the weights, that compute different texts."""
        return self.ranks.size // self.options.tp

    @cached_property
    def by_length(self) -> bool:
        """Whether texts of different lengths may have different rotary embeddings, and cannot share a stem."""
        return length_matters(self.model.skeleton)

    def expect(self, longest: int, kept: int = 0) -> None:
        """Decide how to compute texts of so many tokens at most; the first time, read the weights. Collective.

        Args:
            longest: tokens of the longest text.
            kept: tokens whose keys and values, of all layers, stay on a rank at a time.
        """
        place, options = self.place, self.options
        schedule, reason = choose_schedule(
            place.ranks, place.topology, options.attention, replace(self._work, tokens=longest)
        )  # fmt: skip
        work = replace(self._work, tokens=max(longest, BATCH_TOKENS * self.holders))
        heads = [layer.heads for layer in place.layers]
        token_bytes = sum(h.kv_heads * (h.key_dim + h.value_dim) * h.dtype.itemsize for h in heads)
        parts = {**document_memory(work, schedule, self._sizes), "new keys and values": kept * token_bytes}
        choice = options.weights
        if self._memory is not None:  # as the weights are
            choice = "stream" if self._memory.stream else "resident"
        self._memory = place.ranks.together(
            choose_residence, parts, weight_bytes(place.reader), choice=choice, limit=options.memory_limit,
            room=self._room,
        )  # fmt: skip
        self._progress.say(f"attention of long texts: {reason}")
        self._progress.say(str(self._memory))
        if self._engine is None:
            decision = Decision(
                schedule=schedule, reason=reason, backends=work.backends, products=self._products, memory=self._memory
            )  # fmt: skip
            job = Prepared(
                options=options, inputs=self._inputs, model=self.model, place=place, decision=decision,
                progress=self._progress,
            )  # fmt: skip
            self._engine = self._stack.enter_context(load_engine(job))
            self._engine.progress = Progress(enabled=False)  # whoever asks counts texts
        self._engine.schedule = schedule

    @property
    def _sizes(self) -> TokenSizes:
        """What a token takes beside its attention."""
        return TokenSizes(
            hidden=self.checkpoint.text_config_value("hidden_size"), inner=inner_width(self.place.skeleton),
            vocabulary=self.checkpoint.vocab_size, chunk_tokens=self.options.chunk_tokens, stored_itemsize=0,
            checkpoint_bytes=0,
        )  # fmt: skip

    def batches(self, questions: Sequence[Question]) -> Iterator[Batch]:
        """The questions, the longest first, as many at a time as `score` should get; no collective."""
        order = sorted(range(len(questions)), key=lambda q: (-longest_of(questions[q]), q))
        for batch in batches([(q, questions[q]) for q in order], self.holders):
            alike: Batch = []
            for entry in batch:
                if alike and not self._same(longest_of(alike[0][1]), longest_of(entry[1])):
                    yield alike
                    alike = []
                alike.append(entry)
            yield alike

    def _same(self, *lengths: int) -> bool:
        """Whether texts of these lengths have the same rotary embeddings."""
        return len(set(lengths)) == 1 or not self.by_length or same_for(self.model.skeleton, lengths)

    def score(self, questions: Sequence[Question]) -> dict[Which, Total] | None:
        """What each answer's tokens sum up to, on rank 0; None on the others. Collective.

        Args:
            questions: one of the `batches`; each has a stem, and every answer tokens.
        """
        joints, others = self._plan(questions)
        found: list[Scored] = []
        for joint in joints:
            found += judge(self._trunk, questions[joint.question], joint)
        places = [q for q, one in enumerate(others) if any(map(len, one.answers))]
        left = [Question(one.stem, tuple(filter(len, one.answers))) for one in map(others.__getitem__, places)]
        numbers = [[i for i, answer in enumerate(others[q].answers) if len(answer)] for q in places]
        if left:
            found += [
                s._replace(question=places[s.question], answer=numbers[s.question][s.answer])
                for s in Apart(**self._alone).score(left)
            ]
        mine = {
            (s.question, s.answer): Total(float(np.sum(s.logprobs, dtype=np.float64)), bool(s.greedy.all()))
            for s in found
        }  # fmt: skip
        everyone = self.ranks.gather(mine)
        return None if everyone is None else {which: total for each in everyone for which, total in each.items()}

    def _plan(self, questions: Sequence[Question]) -> Any:
        """What all ranks compute together, and the questions with the other answers.

        A text that is long for one rank is always dealt; there its last token goes through the model too, so that it
        must have a place there.
        """
        limit = self.checkpoint.max_positions
        fits = [
            (limit is None or self.options.allow_longer or longest_of(one) < limit)
            and self._same(longest_of(one), longest_of(one) + 1)
            for one in questions
        ]
        joints = [joint for _, joint in candidates(questions, BATCH_TOKENS) if fits[joint.question]]
        rest = without(questions, joints)
        more, _ = plan(rest, self.holders)
        joints += [joint for joint in more if fits[joint.question]]
        return joints, without(questions, joints)

    @property
    def _alone(self) -> dict[str, Any]:
        """What an extension of no context is made of."""
        assert self._engine is not None, "expect comes first"
        heads = [layer.heads for layer in self.place.layers]
        world = self.ranks.size // self.place.grid.head_groups
        context = NoKeys(Layout(n_tokens=0, world=world), heads, self.model.device)
        return {"engine": self._engine, "context": context, "n_tokens": 0, "last_hidden": None}

    def _trunk(self, ids: npt.NDArray[np.int64]) -> Trunk:
        return Trunk(**self._alone, ids=ids, segments=self.options.segments, gather=self.place.ranks.allgather)

    def generate(self, prompts: Sequence[TokenIds], most: int, stop: Sequence[str]) -> list[list[int]]:
        """The most probable token after each prompt, and so on: token ids of each, on all ranks. Collective.

        Args:
            prompts: token ids of each.
            most: tokens for each.
            stop: texts after which a prompt ends; so does it before a token that ends texts.
        """
        spans = [(len(prompt), len(prompt) + most - 1) for prompt in prompts]
        self.ranks.together(check_rotary, self.model, spans)
        tokenizer = self.ranks.together(lambda: self.tokenizer)
        ends = {*end_tokens(self.checkpoint), tokenizer.eos_token_id}
        answers = [Answer(prompt="", tokenizer=tokenizer, stop=tuple(stop)) for _ in prompts]
        assert self._same(*(last for _, last in spans))

        def choose(i: int, logits_V: torch.Tensor, _: list[int]) -> int:
            token = -1 if answers[i].ended else int(logits_V.argmax())
            return -1 if token in ends else token

        answering = Answering(**self._alone, gather=self.place.ranks.allgather)
        for step in answering.generate(prompts, choose, most):
            for i, token in step:
                answers[i].add(token)
        return [answer.ids for answer in answers]

    def close(self) -> None:
        """Let the weights go, and close the transports. Collective."""
        self._engine = None
        self._stack.close()


class Sessions:
    """The sessions of a launch by number, for calls that travel between ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.all: list[Session | None] = []

    def open(self, options: ModelOptions) -> int:
        """The number of a new session."""
        self.all.append(Session(options, self.ranks))
        return len(self.all) - 1

    def do(self, number: int, name: str, *arguments: Any) -> Any:
        """What a session's method says."""
        return getattr(self.all[number], name)(*arguments)

    def close(self, number: int) -> None:
        """Close a session, and forget it."""
        session, self.all[number] = self.all[number], None
        if session is not None:
            session.close()
