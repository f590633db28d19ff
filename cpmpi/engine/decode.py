"""Tokens after a stored context, one a step: queries travel to the stored keys, new keys stay where they are made.

The layer loop never changes a cache. What a step makes of keys and values is set aside layer by layer and inserted
once, for all layers and sequences, when the step is over (JetStream's deferred insertion), into one preallocated,
left-aligned buffer. In the step itself a token attends to the stored keys across ranks, to its sequence's rows of the
buffer, and to itself: three partials of one softmax.

Legend: L layers of one shape, S sequences of this rank, B rows of the buffer for each, N new tokens, G KV heads, D key
head dim, E value head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Heads
from cpmpi.attention.layout import Dealt
from cpmpi.engine.extend import Branch, Extension, LineKeys, keys_of
from cpmpi.model.attention_call import Call
from cpmpi.model.head import Head

TokenIds = npt.NDArray[np.int64]
Fresh = tuple[torch.Tensor, torch.Tensor]  # keys (C, G, D) and values (C, G, E) of some tokens
Choose = Callable[[int, torch.Tensor, list[int]], int]


class GrownKeys:
    """Keys and values that were made after the context: stacked over layers, a row of ``capacity`` for each sequence.

    ``lengths`` says how many of each row are there.
    """

    def __init__(self, heads: Sequence[Heads], sequences: int, capacity: int, device: torch.device) -> None:
        self.lengths = [0] * sequences
        self._stacks: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        self._place: dict[int, tuple[int, int]] = {}
        for shape in dict.fromkeys(heads):
            layers = [i for i, h in enumerate(heads) if h == shape]
            size = len(layers), sequences, capacity, shape.kv_heads
            k_LSBGD, v_LSBGE = (
                torch.empty(*size, dim, dtype=shape.dtype, device=device) for dim in (shape.key_dim, shape.value_dim)
            )
            self._place |= {layer: (len(self._stacks), i) for i, layer in enumerate(layers)}
            self._stacks.append((layers, k_LSBGD, v_LSBGE))

    def row(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is there of a sequence: keys (n, G, D) and values (n, G, E) of a layer."""
        stack, i = self._place[layer]
        _, k_LSBGD, v_LSBGE = self._stacks[stack]
        n = self.lengths[sequence]
        return k_LSBGD[i, sequence, :n], v_LSBGE[i, sequence, :n]

    def insert(
        self, sequences: Sequence[int], sizes: Sequence[int], fresh: Sequence[Sequence[tuple[Any, Any]]]
    ) -> None:
        """Append what one pass made: for each layer, keys and values of runs of ``sizes`` tokens of some sequences."""
        rows_N: list[int] = []
        columns_N: list[int] = []
        for sequence, size in zip(sequences, sizes, strict=True):
            rows_N += [sequence] * size
            columns_N += range(self.lengths[sequence], self.lengths[sequence] + size)
            self.lengths[sequence] += size
        for layers, k_LSBGD, v_LSBGE in self._stacks:
            for buffer, part in ((k_LSBGD, 0), (v_LSBGE, 1)):
                new_LNGD = torch.stack([torch.cat([run[part] for run in fresh[layer]]) for layer in layers])
                buffer[:, rows_N, columns_N] = new_LNGD


@dataclass(kw_only=True)
class Growing:
    """A prompt and what was generated after it.

    Attributes:
        ids: of both so far.
        holder: who computes it.
        row: of the holder's buffer.
        done: how many of ``ids`` went through the model.
    """

    ids: list[int]
    holder: int
    row: int
    done: int = 0


@dataclass(kw_only=True)
class Decoding(Extension):
    """Generates what follows a context; every rank has one, and calls it with the same prompts.

    Args:
        gather: what every rank gives, in the order of ranks, to all (an ``allgather``).
    """

    gather: Callable[[Any], list[Any]]
    _grown: GrownKeys | None = None
    _rows: list[int] = field(default_factory=list)
    _fresh: list[list[Fresh]] = field(default_factory=list)

    def generate(self, prompts: Sequence[TokenIds], choose: Choose, most: int) -> Iterator[list[tuple[int, int]]]:
        """The tokens of each step, as (prompt, token) of the prompts that go on; the same on all ranks. Collective.

        Args:
            prompts: token ids that follow the context, at least one each.
            choose: the next token of a prompt from its logits (V,) and its ids so far; a negative number ends it.
            most: tokens for each.
        """
        engine, going = self.engine, dict(enumerate(self._deal(prompts)))
        mine = [s for s in going.values() if s.holder == self._here]
        capacity = max((len(s.ids) + most for s in mine), default=0)
        self._grown = GrownKeys([layer.heads for layer in engine.layers], len(mine), capacity, engine.device)
        for _ in range(most):
            logits = self._pass(going)
            first = not engine.grid.tp_index(engine.rank)  # of those that share the weights, one chooses for all
            chosen = [(i, choose(i, logits_V, going[i].ids)) for i, logits_V in logits.items() if first]
            step = sorted(entry for each in self.gather(chosen) for entry in each)
            for i, token in step:
                if token < 0:
                    del going[i]
                else:
                    going[i].ids.append(token)
            if not going:
                return
            yield [(i, token) for i, token in step if token >= 0]

    def _deal(self, prompts: Sequence[TokenIds]) -> list[Growing]:
        """A holder for each prompt: the longest first, to whoever has the least tokens."""
        load, rows = [0] * self._holders, [0] * self._holders
        dealt: dict[int, Growing] = {}
        for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
            holder = min(range(self._holders), key=lambda h: (load[h], h))
            dealt[i] = Growing(ids=prompts[i].tolist(), holder=holder, row=rows[holder])
            load[holder] += len(prompts[i])
            rows[holder] += 1
        return [dealt[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _pass(self, going: dict[int, Growing]) -> dict[int, torch.Tensor]:
        """Take what is new of all prompts through the model: logits (V,) after each of this rank's. Collective."""
        lines: list[list[tuple[int, Branch]]] = [[] for _ in range(self._holders)]
        for i, s in going.items():
            line = lines[s.holder]
            line += [(i, b) for b in self._cut(np.array(s.ids[s.done :]), self.n_tokens + s.done, len(line))]
            s.done = len(s.ids)
        placed = Dealt(
            runs=tuple(tuple(b.run for _, b in line) for line in lines), copies=self.engine.grid.copies
        )  # fmt: skip
        own = lines[self._here]
        self._rows, self._fresh = [going[i].row for i, _ in own], []
        longest = max(b.stop for line in lines for _, b in line)
        states = self._hidden([b for _, b in own], placed, longest)
        if not own:
            return {}
        assert self._grown is not None
        self._grown.insert(self._rows, [len(b.ids) for _, b in own], self._fresh)
        last = {i: state[-1:] for (i, _), state in zip(own, states, strict=True)}
        logits_NV = Head(self.engine.weights.model).logits(torch.cat(list(last.values())))
        return dict(zip(last, logits_NV, strict=True))

    def _cut(self, run: TokenIds, start: int, first: int) -> Iterator[Branch]:
        """New tokens of a prompt as branches, each following the one before; ``first`` is the place of the first."""
        size = self.engine.chunk_tokens
        for n, a in enumerate(range(0, len(run), size)):
            yield Branch(run[a : a + size], start + a, first + n - 1 if n else None)

    def attend(
        self, branches: list[Branch], placed: Dealt, longest: int, layer: int, calls: list[Call]
    ) -> torch.Tensor:
        """As for continuations; the new keys are set aside."""
        self._fresh.append([keys_of(call) for _, call in zip(branches, calls, strict=False)])
        return super().attend(branches, placed, longest, layer, calls)

    def _line(self, branches: list[Branch], i: int, layer: int, calls: list[Call]) -> Iterator[LineKeys]:
        """What the buffer has of the sequence, then what is new."""
        assert self._grown is not None
        if self._grown.lengths[self._rows[i]]:
            yield *self._grown.row(layer, self._rows[i]), self.n_tokens
        yield from super()._line(branches, i, layer, calls)
