"""A decode step after a stored context, and what it could be done by instead; all in one launch.

    python -m benchmarks.decode_step [--tokens 16384] [--ranks 2] [--prompts 4] [--repeats 7]

A random Llama (8 layers of width 1024, 133 million parameters, float32) goes on after random stored keys; the ways take
turns, so that other work on the machine meets them alike:

- ``deferred``: as `cpmpi generate` does: new keys of all layers go into one stacked buffer when the step is over;
- ``by_layer``: each layer's new keys go into that layer's buffer inside its attention, which then meets the buffer
  alone;
- ``one_rank``: all stored keys are moved to rank 0 first, and it goes on alone, with the threads of all ranks.

Prints a line of JSON: milliseconds a step of each (median, least and most), the parts of a ``deferred`` step (its
attention with what waits in it; the checkpoint's own layers and head, measured alone; the rest, as a share of a step),
seconds to move the keys, and after how many tokens moving them would have paid.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 6


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder is not None:
        measure(asked.folder, asked.tokens, asked.prompts, asked.repeats)
        return
    from cpmpi.jobs.demo import launcher

    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        words = [sys.executable, "-m", "benchmarks.decode_step", "--folder", folder, "--tokens", str(asked.tokens)]
        words += ["--prompts", str(asked.prompts), "--repeats", str(asked.repeats)]
        threads = str(max(1, (os.cpu_count() or 1) // asked.ranks))
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
        subprocess.run(
            [*launcher(asked.ranks), *words], check=True, env={**os.environ, **as_root, "OMP_NUM_THREADS": threads}
        )


def save_model(folder: Path) -> None:
    """The random checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8, intermediate_size=2816,
        vocab_size=32000, max_position_embeddings=1 << 20,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


class RandomKeys:
    """Stored keys and values that were never computed, in the place of `cpmpi.run.cache.StoredKeys`."""

    def __init__(self, layout: Any, position: int, layers: Sequence[Any]) -> None:
        import torch

        from cpmpi.attention.execute import Keys

        self.layout = layout
        self.kept = [Keys.empty(layout.pieces(position), layer.heads, torch.device("cpu")) for layer in layers]
        torch.manual_seed(position)
        for keys in self.kept:
            keys.k_SGD.normal_()
            keys.v_SGE.normal_()

    def layer(self, layer: int) -> Any:
        return self.kept[layer]


def measure(folder: Path, tokens: int, prompts: int, repeats: int) -> None:
    """One rank's part; rank 0 prints."""
    import torch

    from cpmpi.attention.layout import Layout
    from cpmpi.comm.ranks import start

    ranks = start()
    threads = torch.get_num_threads()
    engine = engine_of(folder, ranks, ranks.comm)
    context = RandomKeys(Layout(n_tokens=tokens, world=ranks.size), ranks.rank, engine.layers)
    ids = [np.random.default_rng(i).integers(0, 32000, 8) for i in range(prompts)]
    ways = {
        name: decoding_of(engine, context, tokens, ranks.comm, by_layer=name == "by_layer")
        for name in ("deferred", "by_layer")
    }
    ranks.comm.Barrier()
    began = time.perf_counter()
    whole = gathered(context, tokens, ranks.comm, engine.layers)
    ranks.comm.Barrier()
    move_s = time.perf_counter() - began
    alone = None
    if whole is not None:
        from mpi4py import MPI

        single = engine_of(folder, ranks, MPI.COMM_SELF, engine)
        alone = decoding_of(single, whole, tokens, MPI.COMM_SELF)
    times: dict[str, list[float]] = {name: [] for name in (*ways, "one_rank")}
    attention: list[float] = []
    for _ in range(repeats + 1):
        for name, way in ways.items():
            with attending(way) as spent:
                steps, spent_s = steps_s(way, ids, spent)
            times[name].append(statistics.median(steps))
            if name == "deferred":
                attention.append(statistics.median(spent_s))
        ranks.comm.Barrier()
        if alone is not None:
            torch.set_num_threads(threads * ranks.size)
            times["one_rank"].append(statistics.median(steps_s(alone, ids, [0.0])[0]))
            torch.set_num_threads(threads)
        wait(ranks.comm)
    if ranks.is_root:
        held = [len(each) for each in np.array_split(np.arange(prompts), ranks.size)]
        weights_s = statistics.median(forward_s(engine, max(held)) for _ in range(repeats))
        about = {"tokens": tokens, "ranks": ranks.size, "prompts": prompts}
        print(json.dumps(about | found_of(times, attention, weights_s, move_s)))
    ranks.comm.Barrier()


def found_of(times: dict[str, list[float]], attention: list[float], weights_s: float, move_s: float) -> dict[str, Any]:
    """What is printed; the first trial, which warms up, is left out."""
    ends = (statistics.median, min, max)
    ms = {name: [round(1e3 * f(each[1:]), 2) for f in ends] for name, each in times.items()}
    step, by_layer, alone = (statistics.median(times[name][1:]) for name in ("deferred", "by_layer", "one_rank"))
    attend = statistics.median(attention[1:])
    return {
        "step_ms": ms, "by_layer_to_deferred": round(by_layer / step, 3),
        "attention_ms": round(1e3 * attend, 2), "weights_ms": round(1e3 * weights_s, 2),
        "rest_of_the_step": round(1 - (attend + weights_s) / step, 3),
        "move_s": round(move_s, 3), "one_rank_to_deferred": round(alone / step, 3),
        "moving_pays_after_steps": None if alone >= step else round(move_s / (step - alone)),
    }  # fmt: skip


def wait(comm: Any) -> None:
    """A barrier whose waiting takes no core."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def engine_of(folder: Path, ranks: Any, comm: Any, like: Any = None) -> Any:
    """The model on the ranks of a communicator, with queries that travel."""
    import torch

    from cpmpi.attention.schedule import Schedule
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.comm.transport import MPITransport
    from cpmpi.engine.score import Engine
    from cpmpi.model.checkpoint import Checkpoint
    from cpmpi.model.linear import choose_products, use_products
    from cpmpi.model.probe import backends_of, probe

    device = torch.device("cpu")
    if like is None:
        checkpoint = Checkpoint(folder)
        skeleton = checkpoint.skeleton(torch.float32)
        layers = probe(skeleton)
        weights = checkpoint.weights(checkpoint.reader(skeleton, device), stream=False)
        use_products(weights.model, choose_products(skeleton, device, ranks))
        backends = backends_of(layers, device, Ranks(comm))
    else:
        weights, layers, backends = like.weights, like.layers, like.backends
    return Engine(
        rank=comm.rank, weights=weights, layers=layers, transport=MPITransport(comm), device=device,
        schedule=Schedule(kind="tree", nodes=[list(range(comm.size))], parents=[None]), backends=backends,
        progress=Progress(enabled=False),
    )  # fmt: skip


def decoding_of(engine: Any, context: Any, tokens: int, comm: Any, *, by_layer: bool = False) -> Any:
    """A decoding that inserts new keys at the end of a step, or layer by layer."""
    from cpmpi.engine.decode import Decoding, GrownKeys
    from cpmpi.engine.extend import keys_of

    class ByLayer(Decoding):
        """New keys go into the layer's buffer inside its attention."""

        def attend(self, branches: Any, placed: Any, longest: int, layer: int, calls: Any) -> Any:
            grown = self._grown
            assert grown is not None
            if layer == 0:
                self._before = list(grown.lengths)
                for row, branch in zip(self._rows, branches, strict=True):
                    grown.lengths[row] += len(branch.ids)
            for row, call in zip(self._rows, calls, strict=False):
                for buffer, new in zip(grown.row(layer, row), keys_of(call), strict=True):
                    buffer[self._before[row] :] = new
            return super(Decoding, self).attend(branches, placed, longest, layer, calls)

        def _line(self, branches: Any, i: int, layer: int, calls: Any) -> Iterator[Any]:
            assert self._grown is not None
            yield *self._grown.row(layer, self._rows[i]), self.n_tokens

    class Inserted(GrownKeys):
        """A buffer whose insertion at the end of a step has been done before: only the lengths are told."""

        def insert(self, sequences: Any, sizes: Any, fresh: Any) -> None:
            pass

    made = (ByLayer if by_layer else Decoding)(
        engine=engine, context=context, n_tokens=tokens, last_hidden=None, gather=comm.allgather
    )  # fmt: skip
    made.__dict__["_buffers"] = Inserted if by_layer else GrownKeys
    return made


def steps_s(decoding: Any, prompts: Sequence[Any], spent: list[float]) -> tuple[list[float], list[float]]:
    """Seconds of each step after the prompts, and by how much ``spent`` grew in it."""
    from cpmpi.engine import decode

    before, decode.GrownKeys = decode.GrownKeys, decoding.__dict__["_buffers"]  # type: ignore[misc]
    try:
        times, grown = [], []
        for _ in decoding.generate(prompts, lambda i, logits_V, ids: int(logits_V.argmax()), STEPS + 1):
            times.append(time.perf_counter())
            grown.append(spent[0])
        return np.diff(times).tolist(), np.diff(grown).tolist()
    finally:
        decode.GrownKeys = before  # type: ignore[misc]


@contextmanager
def attending(decoding: Any) -> Iterator[list[float]]:
    """Within it, seconds of attention: across ranks, with what waits in it, and of each line to itself."""
    from cpmpi.attention.execute import Execution

    spent, run, own = [0.0], Execution.run, type(decoding)._own

    def timed(real: Any) -> Any:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = real(*args)
            spent[0] += time.perf_counter() - began
            return result

        return call

    Execution.run, type(decoding)._own = timed(run), timed(own)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Execution.run, type(decoding)._own = run, own  # type: ignore[method-assign]


def forward_s(engine: Any, tokens: int) -> float:
    """Seconds of the checkpoint's own layers and head for one token of so many prompts, without attention."""
    import torch

    from cpmpi.model.forward import Chunk, layer_major
    from cpmpi.model.head import Head, decoder_of

    chunks = [Chunk(torch.zeros(1, dtype=torch.int64), 9) for _ in range(tokens)]
    zeros = torch.zeros(1, engine.layers[0].heads.query_heads, engine.layers[0].heads.value_dim)
    with torch.inference_mode():
        began = time.perf_counter()
        states = layer_major(decoder_of(engine.weights.model), chunks, 10, lambda *_: [zeros] * tokens)
        Head(engine.weights.model).logits(torch.cat(states))
        return time.perf_counter() - began


def gathered(context: RandomKeys, tokens: int, comm: Any, layers: Sequence[Any]) -> Any:
    """All keys on rank 0, moved there layer by layer; None elsewhere."""
    import torch

    from cpmpi.attention.execute import Keys
    from cpmpi.attention.layout import Layout

    whole = None
    if comm.rank == 0:
        whole = RandomKeys.__new__(RandomKeys)
        whole.layout, whole.kept = Layout(n_tokens=tokens, world=1, segments=1), []
    for i, layer in enumerate(layers):
        mine = context.kept[i].flat_B.numpy()
        if comm.rank:
            comm.Send(mine, 0)
            continue
        parts = [context.kept[i]]
        for rank in range(1, comm.size):
            keys = Keys.empty(context.layout.pieces(rank), layer.heads, torch.device("cpu"))
            comm.Recv(keys.flat_B.numpy(), rank)
            parts.append(keys)
        assert whole is not None
        kept = Keys.empty(whole.layout.pieces(0), layer.heads, torch.device("cpu"))
        for keys in parts:
            row = 0
            for piece in keys.pieces:
                kept.k_SGD[slice(*piece)] = keys.k_SGD[row : row + piece.size]
                kept.v_SGE[slice(*piece)] = keys.v_SGE[row : row + piece.size]
                row += piece.size
        whole.kept.append(kept)
    return whole


if __name__ == "__main__":
    main()
