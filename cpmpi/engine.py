"""One document on all ranks: the layer-major forward with attention across ranks, then log-probabilities.

Legend: T this rank's tokens, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention_call import Call, rule_of
from cpmpi.execute import Execution, Keys, Queries
from cpmpi.finite import finite_layers
from cpmpi.forward import Head, chunks, decoder_of, layer_major
from cpmpi.kernels.backend import Backend
from cpmpi.layout import Layout, Piece
from cpmpi.probe import Layer
from cpmpi.progress import Progress
from cpmpi.schedule import Schedule
from cpmpi.transport import Transport
from cpmpi.weights import StreamedWeights, finite

KeepKeys = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(kw_only=True)
class Scores:
    """What one rank found for its tokens.

    ``positions`` and ``logprobs`` (float32) belong together: the log-probability of the token at each position. The
    rank that holds the document's last token has its ``last_hidden`` (hidden,) float32.
    """

    positions: torch.Tensor
    logprobs: torch.Tensor
    last_hidden: torch.Tensor | None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Engine:
    """Runs documents on the ranks of a schedule; every rank has one, and calls it with the same documents."""

    rank: int
    causal_lm: torch.nn.Module
    layers: tuple[Layer, ...]
    schedule: Schedule
    transport: Transport
    backends: tuple[Backend, ...]
    device: torch.device
    progress: Progress
    chunk_tokens: int = 1024
    weights: StreamedWeights | None = None
    check_finite: bool = False

    @torch.inference_mode()
    def score(
        self, token_ids: npt.NDArray[np.integer], layout: Layout, name: str, keep: KeepKeys | None = None
    ) -> Scores:
        """Log-probabilities of this rank's share of a document. Collective.

        Args:
            token_ids: all token ids (T_all,) of the document.
            layout: which rank holds which tokens.
            name: the document's name, for progress.
            keep: takes each finished layer's number and this rank's keys (T, G, D) and values (T, G, E), and owns them.
        """
        started = time.perf_counter()
        ids_T = torch.from_numpy(token_ids.astype(np.int64)).to(self.device)
        parts = chunks(layout.pieces(self.rank), self.chunk_tokens)
        program = self.schedule.program(self.rank)
        self.progress.start(name, layout.n_tokens, len(self.layers))
        attending = 0.0

        def attend(layer: int, calls: list[Call]) -> Sequence[torch.Tensor]:
            nonlocal attending
            begun = time.perf_counter()
            if self.check_finite:
                for part, call in zip(parts, calls, strict=False):
                    for what, tensor in (("queries", call.q_1HCD), ("keys", call.k_1GCD), ("values", call.v_1GCE)):
                        finite(tensor, f"layer {layer}, {what} of tokens {part.start} to {part.stop - 1}")
            if self.weights is not None:
                self.weights.leave(layer)
            heads, rule = self.layers[layer].heads, rule_of(calls[0], layout.n_tokens)
            keys = Keys.empty(layout.pieces(self.rank), heads, self.device)
            if parts:
                torch.cat([c.k_1GCD[0].transpose(0, 1) for c in calls], out=keys.k_SGD)
                torch.cat([c.v_1GCE[0].transpose(0, 1) for c in calls], out=keys.v_SGE)
            if keep is not None:
                keep(layer, keys.k_SGD, keys.v_SGE)
            runs = [(part.start, call.q_1HCD[0].transpose(0, 1)) for part, call in zip(parts, calls, strict=False)]
            execution = Execution(
                rank=self.rank, program=program, transport=self.transport, backend=self.backends[layer], heads=heads,
                rule=rule, query_layout=layout, key_layouts=(layout,), device=self.device,
                tick=lambda done: self.progress.update(layer + done),
            )  # fmt: skip
            out_THE = execution.run(Queries(tuple(runs)), keys)
            if self.weights is not None:
                self.weights.enter(layer + 1)
            self.progress.update(layer + 1)
            attending += time.perf_counter() - begun
            if not parts:  # a rank without tokens walks along with the first token, whose result nobody takes
                return [out_THE.new_zeros(1, heads.query_heads, heads.value_dim)]
            return torch.split(out_THE, [part.size for part in parts])

        if self.weights is not None:
            self.weights.enter(0)
        decoder = decoder_of(self.causal_lm)
        with finite_layers(decoder) if self.check_finite else nullcontext():
            states = layer_major(decoder, ids_T, parts or [Piece(0, 1)], attend)
        if self.weights is not None:
            self.weights.close()
        decoded = time.perf_counter()
        positions, logprobs, last_hidden = self._head(ids_T, parts, states)
        return Scores(
            positions=positions, logprobs=logprobs, last_hidden=last_hidden,
            seconds={"attention": attending, "decoder": decoded - started, "head": time.perf_counter() - decoded},
        )  # fmt: skip

    def _head(
        self, ids_T: torch.Tensor, parts: Sequence[Piece], states: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The hidden state at position i predicts token i + 1; the last token's predicts nothing yet and is kept."""
        n_tokens = len(ids_T)
        head = Head(self.causal_lm)
        positions, logprobs, last_hidden = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)], None
        for part, hidden_TC in zip(parts, states, strict=False):
            if self.check_finite:
                finite(hidden_TC, f"output of the final norm, tokens {part.start} to {part.stop - 1}")
            stop = min(part.stop, n_tokens - 1)
            targets = torch.arange(part.start + 1, stop + 1)
            positions.append(targets)
            logprobs.append(head.logprobs(hidden_TC[: stop - part.start], ids_T[part.start + 1 : stop + 1]))
            if part.stop == n_tokens:
                last_hidden = hidden_TC[-1].float().cpu()
        return torch.cat(positions), torch.cat(logprobs), last_hidden
