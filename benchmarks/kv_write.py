"""How fast a rank's KV reaches the disk, against a plain write of the same bytes in the same run.

    python benchmarks/kv_write.py --folder /scratch --tokens 65536 --layers 8

Each trial writes the same tensors three ways, each into a fresh file and with fsync: `raw` is `os.pwrite` alone, in
chunks of the writer's size; `same` is the shard writer with KV of the stored type; `convert` is the writer with float32
tensors stored as --dtype (its rate counts the bytes stored). The order changes from trial to trial. The ratios are
medians of the ratios within the trials, so that a disk that is slower in one trial does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from cpmpi.attention.layout import Layout
from cpmpi.run.hdf5 import pwrite_all
from cpmpi.run.shard import create_shard
from cpmpi.run.spec import DocumentSpec, KVSpec, RunSpec
from cpmpi.run.writer import CHUNK_BYTES, ShardWriter
from cpmpi.text import human_bytes


def make_spec(tokens: int, layers: int, heads: int, dim: int, dtype: str) -> RunSpec:
    """One document on one rank."""
    kv = KVSpec.alike(layers=layers, heads=heads, key_dim=dim, value_dim=dim, dtype=dtype)
    document = DocumentSpec(id="d", source="", n_tokens=tokens, layout=Layout(n_tokens=tokens, world=1))
    return RunSpec(
        model="{}", model_sha256="", tokenizer_sha256="", dtype="float32", kv=kv, world_size=1, hidden_size=1,
        documents=(document,),
    )  # fmt: skip


def write_raw(folder: Path, layers: int, tensors: tuple[torch.Tensor, ...]) -> float:
    """Seconds for the bytes alone."""
    data = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    began = time.perf_counter()
    descriptor = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT)
    offset = 0
    for _ in range(layers):
        for part in data:
            for start in range(0, part.nbytes, CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                pwrite_all(descriptor, chunk, offset)
                offset += chunk.nbytes
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - began


def write_shard(folder: Path, spec: RunSpec, tensors: tuple[torch.Tensor, ...]) -> float:
    """Seconds for the writer, from the first layer to the digest; laying out the file is not counted."""
    assert spec.kv is not None
    path = create_shard(folder, spec, 0)
    with ShardWriter(path, spec, 0) as writer:
        began = time.perf_counter()
        for layer in range(spec.kv.layers):
            writer.put(0, layer, *tensors)
        writer.finish(0)
        return time.perf_counter() - began


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write [default: temporary].")
@click.option("--tokens", default=32768, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--dim", default=128, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--trials", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    folder: Path | None, tokens: int, layers: int, heads: int, dim: int, dtype: str, trials: int, as_json: bool
) -> None:
    """Measure the shard writer against plain writes."""
    spec = make_spec(tokens, layers, heads, dim, dtype)
    assert spec.kv is not None
    wide = (torch.randn(tokens, heads, dim), torch.randn(tokens, heads, dim))
    stored = tuple(tensor.to(getattr(torch, dtype)) for tensor in wide)
    total = tokens * spec.kv.bytes_per_token
    ways: dict[str, Callable[[Path], float]] = {
        "raw": lambda where: write_raw(where, layers, stored),
        "same": lambda where: write_shard(where, spec, stored),
        "convert": lambda where: write_shard(where, spec, wide),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + 1):
        for place in range(len(ways)):
            name = list(ways)[(trial + place) % len(ways)]
            where = Path(tempfile.mkdtemp(dir=folder))
            took = ways[name](where)
            shutil.rmtree(where)
            if trial:  # the first one warms up
                seconds[name].append(took)
    result = {"bytes": total, "dtype": dtype, "trials": trials}
    rates = {name: total / statistics.median(took) / 1e9 for name, took in seconds.items()}
    ratios = {name: statistics.median(raw / mine for raw, mine in zip(seconds["raw"], seconds[name])) for name in ways}
    if as_json:
        click.echo(json.dumps({**result, "gb_per_s": rates, "ratio_to_raw": ratios}))
        return
    click.echo(f"{human_bytes(total)} of {dtype}, fsync included, median of {trials}")
    for name in ways:
        click.echo(f"{name:8} {rates[name]:6.2f} GB/s   {ratios[name]:.2f} of raw")


if __name__ == "__main__":
    main()
