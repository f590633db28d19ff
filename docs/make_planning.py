"""Write the tables of docs/planning.md: the plan against Meta's measurements, and for 1M and 10M tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cpmpi.cost.hardware import HARDWARE
from cpmpi.cost.plan import Plan, Request, make_plan
from cpmpi.model.checkpoint import Blueprint
from cpmpi.model.size import ModelSize, model_size
from cpmpi.text import human_bytes, seconds_text
from cpmpi.topology.synthetic import synthetic

TARGET = Path(__file__).resolve().parent / "planning.md"
CONFIGS = Path(__file__).resolve().parent.parent / "benchmarks" / "configs"
# Nodes of 8 H100, tokens, and the published seconds: Yang et al., arXiv 2411.01783, Llama 3 405B.
META = ((1, 131_072, 42.0), (2, 131_072, 21.0), (4, 131_072, 10.95), (8, 131_072, 5.85), (16, 131_072, 3.8))
META += ((16, 1_000_000, 77.0),)
META_FLOPS = 502e12
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (1_000_000, 10_000_000)
MODELS = (("llama-3-8b", "8B", 1), ("llama-3-405b", "405B", 8))


def sized(name: str) -> ModelSize:
    """The size of one of the configs beside the benchmarks."""
    return model_size(Blueprint(CONFIGS / f"{name}.json"))


def meta_seconds(model: ModelSize, nodes: int, tokens: int) -> tuple[float, Plan]:
    """What the plan says of one of Meta's runs, tensor-parallel sums left out: the achieved rate includes them."""
    chip = replace(HARDWARE["h100"], matmul_flops=META_FLOPS, attention_flops=META_FLOPS)
    request = Request(tokens=tokens, kv_dtype=None, tp=8)
    made = make_plan(model, request, synthetic(f"nodes={nodes},gpus=8"), chip)
    return made.total_s - made.seconds["tensor-parallel sums"], made


def meta_rows(model: ModelSize) -> Iterator[str]:
    """Markdown rows: nodes, GPUs, tokens, published, planned, difference."""
    for nodes, tokens, published in META:
        seconds, _ = meta_seconds(model, nodes, tokens)
        off = seconds / published - 1
        yield f"| {nodes} | {8 * nodes} | {tokens:,} | {published:g} s | {seconds:.3g} s | {off:+.0%} |"


def scale_rows(model: ModelSize, label: str, tp: int, most_gpus: int = GPUS[-1]) -> Iterator[str]:
    """Markdown rows of one model on up to so many H200: tokens, GPUs, time by phase, memory, KV, schedule."""
    for tokens in TOKENS:
        for gpus in GPUS:
            if gpus > most_gpus:
                continue
            machine = synthetic(f"nodes={gpus // 8},gpus=8")
            p = make_plan(model, Request(tokens=tokens, tp=tp), machine, HARDWARE["h200"])
            other = p.seconds["matmul"] + p.seconds["head"] + p.seconds.get("tensor-parallel sums", 0.0)
            times = (p.total_s, p.seconds["attention"], other, p.seconds["exposed transfer"], p.seconds["KV writing"])
            cells = [label, f"{tokens // 1_000_000}M", f"{gpus:,}", *map(seconds_text, times)]
            cells += [p.schedule, f"{human_bytes(p.needed_bytes)}{'' if p.fits else ' (does not fit)'}"]
            yield f"| {' | '.join(cells)} |"


def filled(text: str, name: str, rows: list[str]) -> str:
    """The text with these rows as the body of the table behind the comment that names it."""
    pattern = rf"(<!-- table: {name} -->\n\|[^\n]*\n\|[-|]*\n)(?:\|[^\n]*\n)*"
    return re.sub(pattern, lambda match: match[1] + "".join(f"{row}\n" for row in rows), text)


def main() -> None:
    """Write the tables."""
    text = TARGET.read_text(encoding="utf-8")
    models = {name: sized(name) for name, *_ in MODELS}
    text = filled(text, "meta", list(meta_rows(models["llama-3-405b"])))
    rows = [row for name, label, tp in MODELS for row in scale_rows(models[name], label, tp)]
    TARGET.write_text(filled(text, "scale", rows), encoding="utf-8")


if __name__ == "__main__":
    main()
