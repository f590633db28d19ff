"""One document on all ranks: the layer-major forward with attention across ranks, then log-probabilities.

Legend: T this rank's tokens, C tokens of a chunk, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Execution, Keys, Queries
from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout, Piece
from cpmpi.attention.schedule import Program, Schedule
from cpmpi.comm.flight import Flight
from cpmpi.comm.progress import Progress
from cpmpi.comm.transport import Transport
from cpmpi.engine.checkpoint import Checkpoints
from cpmpi.engine.resume import Resume
from cpmpi.kernels.backend import Backend
from cpmpi.model.attention_call import Call, rule_of
from cpmpi.model.blocks import done_up_to
from cpmpi.model.finite import finite, finite_layers
from cpmpi.model.forward import chunked, cut, layer_major
from cpmpi.model.head import Head, decoder_of
from cpmpi.model.probe import Layer
from cpmpi.model.token_scores import NOTHING, Wanted
from cpmpi.model.weights import Weights
from cpmpi.timeline.intervals import Recorder

KeepKeys = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(kw_only=True)
class Scores:
    """What one rank found for its tokens.

    ``positions`` and ``logprobs`` (float32) belong together: the log-probability of the token at each position. The
    rank that holds the document's last token has its ``last_hidden`` (hidden,) float32. ``kept`` has, by name, the
    other scores that are wanted (`cpmpi.model.token_scores.Wanted`), a row for each position.
    """

    positions: torch.Tensor
    logprobs: torch.Tensor
    last_hidden: torch.Tensor | None
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Pass:
    """One document on its way through the layers of one rank.

    Attributes:
        ids_T: all token ids of the document, and the one after it where that is scored, too.
        layout, computed: which position of a head group keeps the keys of which tokens, and computes which tokens.
        parts: the chunks that this rank computes, as runs of positions.
        kept: where in the chunks the tokens lie whose keys this rank keeps.
        program: of this rank's part in attention.
        keep: takes finished keys and values.
        gone_on: when the model's own code last went on, a time of ``time.perf_counter``.
        attending: seconds that attention took so far.
    """

    ids_T: torch.Tensor
    layout: Layout
    computed: Layout
    parts: list[Piece]
    kept: list[tuple[int, slice]]
    program: Program
    keep: KeepKeys | None
    gone_on: float
    attending: float = 0.0


@dataclass(kw_only=True)
class Engine:
    """Runs documents on the ranks of a grid; every rank has one, and calls it with the same documents.

    Args:
        rank: this rank.
        weights: the model with this rank's share of the weights.
        layers: its layers, with this rank's share of the heads.
        schedule, transport: of the attention among the ranks of a head group, by their positions.
        backends: the attention kernel of each layer.
        grid: how ranks share heads and tokens.
        summing: among the ranks that share the weights, where they do; the model's own sums go over it.
        checkpoints: taken on the way, where that is wanted.
        recorder: notes what happens when, where a timeline is wanted.
        flight: records where this rank is, and what it waits for.
        chunk_tokens: tokens that go through the model at a time.
        check_finite: whether layers are searched for NaN and infinities.
        wanted: scores besides log-probabilities.
        first: position of the first token that is scored, at least 1.
    """

    rank: int
    weights: Weights
    layers: tuple[Layer, ...]
    schedule: Schedule
    transport: Transport
    backends: tuple[Backend, ...]
    device: torch.device
    progress: Progress
    grid: Grid = field(default_factory=Grid)
    summing: Transport | None = None
    checkpoints: Checkpoints | None = None
    recorder: Recorder | None = None
    flight: Flight = field(default_factory=Flight)
    chunk_tokens: int = 1024
    check_finite: bool = False
    wanted: Wanted = NOTHING
    first: int = 1

    @property
    def position(self) -> int:
        """This rank's place in its head group."""
        return self.grid.position(self.rank)

    @torch.inference_mode()
    def score(
        self, token_ids: npt.NDArray[np.integer], layout: Layout, name: str, keep: KeepKeys | None = None,
        resume: Resume | None = None,
    ) -> Scores:  # fmt: skip
        """Log-probabilities of this rank's share of a document. Collective.

        Args:
            token_ids: all token ids (T_all,) of the document, and the one after it where that is to be scored, too.
            layout: which position of a head group holds which tokens.
            name: the document's name, for progress.
            keep: takes each finished layer's number and this rank's keys (T, G, D) and values (T, G, E), and owns them.
            resume: where the document goes on; None: it begins.
        """
        started = time.perf_counter()
        way = self._begin(token_ids, layout, keep, started)
        first = resume.attention if resume is not None else 0
        self.progress.start(name, layout.n_tokens, len(self.layers), first)
        self.weights.begin(first, resume.done if resume is not None else ())
        decoder = decoder_of(self.weights.model)
        # A rank without tokens walks along with the first token, whose result nobody takes.
        chunks = cut(way.ids_T, way.parts or [Piece(0, 1)])
        with finite_layers(decoder) if self.check_finite else nullcontext(), self._from(resume), self._watched(way):
            states = layer_major(decoder, chunks, layout.n_tokens, partial(self.attend, way), first)
        self.weights.close()
        decoded = time.perf_counter()
        scores = self._head(way, states)
        self._note_layers(len(self.layers), way.gone_on, time.perf_counter())
        scores.seconds.update(
            {"attention": way.attending, "decoder": decoded - started, "head": time.perf_counter() - decoded}
        )
        return scores

    def attend(self, way: Pass, layer: int, calls: list[Call]) -> Sequence[torch.Tensor]:
        """A layer's attention, where all chunks have met: gather this rank's keys, keep them, attend across ranks.

        Returns:
            The output (C, H, E) of each chunk, with which it goes on through its layer to the next attention.
        """
        begun = time.perf_counter()
        self._note_layers(layer, way.gone_on, begun)
        self.flight.enter(layer, len(way.program))
        if self.checkpoints is not None:
            self.checkpoints.meet(layer)
        self._check(way, layer, calls)
        self.weights.leave(layer)
        keys = self._gather_keys(way, layer, calls)
        if way.keep is not None:
            way.keep(layer, keys.k_SGD, keys.v_SGE)
        runs = [(part.start, call.q_1HCD[0].transpose(0, 1)) for part, call in zip(way.parts, calls, strict=False)]
        out_THE = self._execution(way, layer, calls).run(Queries(tuple(runs)), keys)
        self.weights.enter(layer + 1)
        self.progress.update(layer + 1)
        if self.checkpoints is not None:
            self.checkpoints.leave(layer)
        way.gone_on = time.perf_counter()
        way.attending += way.gone_on - begun
        if not way.parts:
            return [out_THE.new_zeros(1, *out_THE.shape[1:])]
        return torch.split(out_THE, [part.size for part in way.parts])

    def _tick(self, layers_done: float) -> None:
        """A part of a layer's attention is done."""
        self.progress.update(layers_done)
        if self.checkpoints is not None:
            self.checkpoints.check_grace()

    def _watched(self, way: Pass) -> AbstractContextManager[None]:
        """Within it checkpoints are taken."""
        return nullcontext() if self.checkpoints is None else self.checkpoints.watching(self.weights.model, way.parts)

    def _from(self, resume: Resume | None) -> AbstractContextManager[None]:
        """Within it the model goes on where the document does."""
        if resume is None:
            return nullcontext()
        return done_up_to(self.weights.model, resume.blocks, resume.last, resume.saved)

    def _begin(self, token_ids: npt.NDArray[np.integer], layout: Layout, keep: KeepKeys | None, started: float) -> Pass:
        """This rank's way through a document."""
        computed = self.grid.computed(layout)
        parts = chunked(computed.pieces(self.position), self.chunk_tokens)
        return Pass(
            ids_T=torch.from_numpy(token_ids.astype(np.int64)).to(self.device), layout=layout, computed=computed,
            parts=parts, kept=rows_of(layout.pieces(self.position), parts),
            program=self.schedule.program(self.position), keep=keep, gone_on=started,
        )  # fmt: skip

    def _gather_keys(self, way: Pass, layer: int, calls: list[Call]) -> Keys:
        """The keys and values that this rank keeps, from the chunks that made them."""
        keys = Keys.empty(way.layout.pieces(self.position), self.layers[layer].heads, self.device)
        if way.kept:
            torch.cat([calls[i].k_1GCD[0].transpose(0, 1)[rows] for i, rows in way.kept], out=keys.k_SGD)
            torch.cat([calls[i].v_1GCE[0].transpose(0, 1)[rows] for i, rows in way.kept], out=keys.v_SGE)
        return keys

    def _execution(self, way: Pass, layer: int, calls: list[Call]) -> Execution:
        """This rank's part in the attention of a layer."""
        return Execution(
            rank=self.position, program=way.program, transport=self.transport, backend=self.backends[layer],
            heads=self.layers[layer].heads, rule=rule_of(calls[0], way.layout.n_tokens), query_layout=way.computed,
            key_layouts=(way.layout,), device=self.device, recorder=self.recorder, flight=self.flight,
            tick=lambda done: self._tick(layer + done),
        )  # fmt: skip

    def _check(self, way: Pass, layer: int, calls: list[Call]) -> None:
        """Where it is asked for: refuse NaN and infinities in what the chunks hand over."""
        if not self.check_finite:
            return
        for part, call in zip(way.parts, calls, strict=False):
            for what, tensor in (("queries", call.q_1HCD), ("keys", call.k_1GCD), ("values", call.v_1GCE)):
                finite(tensor, f"layer {layer}, {what} of tokens {part.start} to {part.stop - 1}")

    def _note_layers(self, layer: int, start_s: float, stop_s: float) -> None:
        """For a timeline: the model has computed up to the attention of ``layer``, which comes now."""
        if self.recorder is not None:
            self.recorder.layer = layer
            self.recorder.note("layers", 0, start_s, stop_s)

    def _head(self, way: Pass, states: Sequence[torch.Tensor]) -> Scores:
        """The hidden state at position i predicts token i + 1, where that is known; the last token's is kept.

        Ranks that share the weights have the same hidden states, and take an equal share of each chunk.
        """
        n_tokens, tp, index = way.layout.n_tokens, self.grid.tp, self.grid.tp_index(self.rank)
        head = Head(self.weights.model)
        positions, last_hidden = [torch.empty(0, dtype=torch.int64)], None
        found: dict[str, list[torch.Tensor]] = {"logprobs": [torch.empty(0)]}
        for part, hidden_TC in zip(way.parts, states, strict=False):
            if self.check_finite:
                finite(hidden_TC, f"output of the final norm, tokens {part.start} to {part.stop - 1}")
            begin = max(part.start, self.first - 1)
            predicting = max(0, min(part.stop, len(way.ids_T) - 1) - begin)
            first, stop = (begin + predicting * i // tp for i in (index, index + 1))
            positions.append(torch.arange(first + 1, stop + 1))
            rows_TC = hidden_TC[first - part.start : stop - part.start]
            for scores in head.scores(rows_TC, way.ids_T[first + 1 : stop + 1], self.wanted):
                for name, values in scores.items():
                    found.setdefault(name, []).append(values)
            if part.stop == n_tokens and index == 0:
                last_hidden = hidden_TC[-1].float().cpu()
        kept = {name: torch.cat(values) for name, values in found.items()}
        return Scores(
            positions=torch.cat(positions), logprobs=kept.pop("logprobs"), last_hidden=last_hidden, kept=kept
        )  # fmt: skip


def rows_of(pieces: Sequence[Piece], parts: Sequence[Piece]) -> list[tuple[int, slice]]:
    """Where the tokens of ``pieces`` lie in ``parts``, in order: the number of a part, and rows in it."""
    found = []
    for piece in pieces:
        for i, part in enumerate(parts):
            start, stop = max(piece.start, part.start), min(piece.stop, part.stop)
            if start < stop:
                found.append((i, slice(start - part.start, stop - part.start)))
    return found
