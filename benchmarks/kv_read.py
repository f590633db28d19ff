"""How fast a stored document's keys and values come back, against a plain read of the same bytes in the same run.

    python -m benchmarks.kv_read --tokens 65536 --layers 8

The shard lies in the page cache. Each trial reads all layers in several ways, each into fresh memory: `raw` is `preadv`
of the same bytes by as many threads, nothing compared; `kv` is `Document.kv(raw=True)`; `same` is what `extend` and
`generate` read, computed in the stored type; `widened` the same, computed in float32 (its rate counts the bytes
stored). All but `raw` compare checksums. The order changes from trial to trial; the ratios are medians of the ratios
within the trials.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import cpmpi
from benchmarks.kv_write import make_spec
from cpmpi.attention.execute import Heads
from cpmpi.attention.layout import Layout
from cpmpi.run.cache import StoredKeys
from cpmpi.run.hdf5 import pread_all
from cpmpi.run.index import create_index
from cpmpi.run.layer_reader import THREADS
from cpmpi.run.shard import create_shard
from cpmpi.run.writer import ShardWriter


def make_run(folder: Path, tokens: int, layers: int, heads: int, dim: int) -> None:
    """A run of one document of random numbers."""
    spec = make_spec(tokens, layers, heads, dim, "bfloat16")
    index = create_index(folder, spec)
    path = create_shard(folder, index.spec, 0)
    index.write_manifest([path.stat().st_size])
    kv = torch.randn(tokens, heads, dim).bfloat16()
    with ShardWriter(path, index.spec, 0) as writer:
        for layer in range(layers):
            writer.put(0, layer, kv, kv)
        digest = writer.finish(0)
    logprobs = np.full(tokens, -1.0)
    logprobs[0] = np.nan
    index.write_outputs(
        0, token_ids=np.zeros(tokens), logprobs=logprobs, last_hidden=np.zeros(1), digests=[digest]
    )  # fmt: skip
    index.finish()


def read_raw(run: Any, layers: int) -> None:
    """The bytes alone, as many threads as the others have, a block of 1 MiB at a time."""
    shard = run.shard(0)
    place = shard.document(0)
    descriptor = os.open(shard.path, os.O_RDONLY)
    with ThreadPoolExecutor(THREADS) as pool:
        for layer in place.layers[:layers]:
            for offset, dim in ((layer.key_offset, layer.shape.key_dim), (layer.value_offset, layer.shape.value_dim)):
                data = np.empty(place.n_tokens * layer.shape.heads * dim * place.itemsize, np.uint8)
                starts = range(0, len(data), 1 << 20)
                for _ in pool.map(
                    lambda at, data=data, offset=offset: pread_all(
                        descriptor, data[at : at + (1 << 20)], offset + at, shard.path
                    ),
                    starts,
                ):
                    pass
    os.close(descriptor)


def read_keys(run: Any, layers: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """As a job reads them, a layer at a time."""
    document = run.documents[0]
    shape = Heads(query_heads=heads, kv_heads=heads, key_dim=dim, value_dim=dim, dtype=dtype)
    layout = Layout(n_tokens=document.n_tokens, world=1)
    with StoredKeys(
        document, layout, 0, group=0, heads=(shape,) * layers, device=torch.device("cpu"), resident=False
    ) as stored:  # fmt: skip
        for layer in range(layers):
            stored._read(layer)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write [default: temporary].")
@click.option("--tokens", default=32768, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--dim", default=128, show_default=True)
@click.option("--trials", default=7, show_default=True)
def main(folder: Path | None, tokens: int, layers: int, heads: int, dim: int, trials: int) -> None:
    """Measure reading stored keys against plain reads; prints a line of JSON."""
    with tempfile.TemporaryDirectory(dir=folder) as where:
        make_run(Path(where) / "run", tokens, layers, heads, dim)
        with cpmpi.open_run(Path(where) / "run") as run:
            ways: dict[str, Callable[[], Any]] = {
                "raw": lambda: read_raw(run, layers),
                "kv": lambda: [run.documents[0].kv(layer, raw=True) for layer in range(layers)],
                "same": lambda: read_keys(run, layers, heads, dim, torch.bfloat16),
                "widened": lambda: read_keys(run, layers, heads, dim, torch.float32),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for trial in range(trials + 1):
                for place in range(len(ways)):
                    name = list(ways)[(trial + place) % len(ways)]
                    began = time.perf_counter()
                    ways[name]()
                    if trial:  # the first one warms up
                        seconds[name].append(time.perf_counter() - began)
    total = tokens * layers * heads * 2 * dim * 2
    rates = {name: round(total / statistics.median(took) / 1e9, 2) for name, took in seconds.items()}
    pairs = {
        name: [raw / mine for raw, mine in zip(seconds["raw"], took, strict=True)] for name, took in seconds.items()
    }
    ratios = {name: round(statistics.median(each), 3) for name, each in pairs.items()}
    print(json.dumps({"bytes": total, "threads": THREADS, "gb_per_s": rates, "ratio_to_raw": ratios}))


if __name__ == "__main__":
    main()
