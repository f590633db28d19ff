"""A long document for real: 131,072 tokens of text through the demo's checkpoint on two CPU ranks.

    python -m benchmarks.long_document [--tokens 131072] [--runs 3] [--ranks 2]

The text is Python's standard library, module after module. Prints, for each run, the document's time, its rate, the
peak memory of a rank beside what the start line says, and the share of the bound: the time that the counted
multiplications and additions take at the matrix-product and attention rates measured just before in this model's
shapes, on all ranks at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.main_job import Sizes, emit, rates_worker, worker

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "demo" / "checkpoint"


def make_document(folder: Path, tokens: int) -> Path:
    """The first so many tokens of the standard library's modules, in alphabetical order, as token ids."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids
        if len(ids) >= tokens:
            break
    np.save(folder / "document.npy", np.array(ids[:tokens]))
    return folder / "document.npy"


def sizes() -> Sizes:
    """The demo checkpoint's."""
    c = json.loads((CHECKPOINT / "config.json").read_text())
    return Sizes(
        hidden=c["hidden_size"], intermediate=c["intermediate_size"], layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"], head_dim=c["head_dim"],
        vocabulary=c["vocab_size"],
    )  # fmt: skip


def cpmpi_worker(document: Path) -> None:
    """The job itself, KV written to disk included."""
    from benchmarks.memory import peak_bytes
    from cpmpi.comm.ranks import start
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run_prepared

    ranks = start()
    options = JobOptions(
        model=CHECKPOINT, inputs=(str(document),), output=document.parent / "run", overwrite=True, quiet=True
    )
    job = prepare(options, ranks)
    (seconds,) = run_prepared(job).seconds.values()
    peaks = ranks.comm.gather(peak_bytes())
    if ranks.is_root and peaks is not None:
        emit(seconds=seconds, peak_bytes=max(peaks), formula_bytes=job.decision.memory.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    asked = parser.parse_args()
    module = "benchmarks.long_document"
    products, attention = sizes().flops(asked.tokens)
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        document = make_document(Path(folder), asked.tokens)
        for _ in range(asked.runs):
            rates = worker(["rates"], ranks=asked.ranks, module=module)
            figures = worker(["cpmpi", str(document)], ranks=asked.ranks, module=module)
            bound = (products / rates["matmul"] + attention / rates["attention"]) / asked.ranks
            found.append((figures["seconds"], bound / figures["seconds"]))
            print(
                f"{asked.tokens:,} tokens on {asked.ranks} ranks: {figures['seconds']:.1f} s, "
                f"{asked.tokens / figures['seconds']:,.0f} tokens/s, {found[-1][1]:.2f} of the bound ({bound:.1f} s at "
                f"{rates['matmul'] / 1e9:.0f} and {rates['attention'] / 1e9:.0f} GFLOP/s a rank); "
                f"peak {figures['peak_bytes'] / 1e6:.0f} MB a rank, start line {figures['formula_bytes'] / 1e6:.0f} MB",
                flush=True,
            )
    seconds, share = (statistics.median(values) for values in zip(*found, strict=True))
    print(f"median: {seconds:.1f} s, {asked.tokens / seconds:,.0f} tokens/s, {share:.2f} of the bound")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rates"]:
        rates_worker(sizes(), "float32")
    elif sys.argv[1:2] == ["cpmpi"]:
        cpmpi_worker(Path(sys.argv[2]))
    else:
        main()
