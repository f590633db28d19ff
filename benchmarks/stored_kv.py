"""Stored keys and values in use, against prefilling the same document again; all in one launch.

    python -m benchmarks.stored_kv [--tokens 65536] [--ranks 2] [--repeats 5]

The demo's checkpoint prefills its text once, by the job itself. Then four answers of 32 tokens are scored after it,
keys read from the shards each time, and a prompt is continued, by every schedule. Prints a line of JSON: seconds of the
prefill, of the answers (median, least and most, with the reading and without), how many times faster, how fast keys
were read beside a plain read of the same bytes, and milliseconds a decode step.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "demo" / "checkpoint"
ANSWERS, ANSWER_TOKENS, STEPS = 4, 32, 16


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder is not None:
        measure(asked.folder, asked.tokens, asked.repeats)
        return
    from cpmpi.jobs.demo import launcher

    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.stored_kv", "--folder", folder, "--tokens", str(asked.tokens)]
        threads = str(max(1, (os.cpu_count() or 1) // asked.ranks))
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
        subprocess.run(
            [*launcher(asked.ranks), *words, "--repeats", str(asked.repeats)], check=True,
            env={**os.environ, **as_root, "OMP_NUM_THREADS": threads},
        )  # fmt: skip


def measure(folder: Path, tokens: int, repeats: int) -> None:
    """One rank's part; rank 0 prints."""
    from cpmpi.comm.ranks import start
    from cpmpi.engine.contexts import Context, New, open_context, open_stored, prepare_contexts
    from cpmpi.engine.options import ContextOptions, JobOptions
    from cpmpi.engine.run import load_engine, run

    ranks = start()
    ids = text_ids(tokens + 200)
    if ranks.is_root:
        np.save(folder / "text.npy", ids[:tokens])
    ranks.comm.Barrier()
    common = {"model": CHECKPOINT, "quiet": True, "allow_longer": True}
    outcome = run(JobOptions.of(**common, inputs=folder / "text.npy", output=folder / "run"))
    found: dict[str, Any] = {"tokens": tokens, "ranks": ranks.size, "prefill_s": round(outcome.seconds[0], 2)}
    for kind in ("tree", "ring") if ranks.size > 1 else ("ring",):
        options = ContextOptions.of(**common, run=folder / "run", attention=kind, kv="memory")
        opened_run = ExitStack()
        stored, checkpoint = opened_run.enter_context(open_stored(options, ranks))
        work = New(stored=tokens, longest=200, at_once=ANSWER_TOKENS)
        job = prepare_contexts(options, ranks, stored, checkpoint, work)
        context = Context(document=0, n_tokens=tokens, upto=tokens)
        with load_engine(job) as engine:
            whole, alone, reading = [], [], []
            for _ in range(repeats + 1):  # the first one warms up
                ranks.comm.Barrier()
                began = time.perf_counter()
                with open_context(job, engine, context) as extension:
                    opened = time.perf_counter()
                    extension.score([question_of(ids[tokens:])])
                    ranks.comm.Barrier()
                ended = time.perf_counter()
                whole.append(ended - began)
                alone.append(ended - opened)
                reading.append(opened - began)
            seconds = statistics.median(whole[1:])
            with open_context(job, engine, context) as extension:
                step_ms = decode_ms(job, engine, extension, ids[tokens : tokens + 8])
        bytes_here = stored.documents[0].n_tokens * stored_bytes(stored) / ranks.size
        found[kind] = {
            "answers_s": [round(x, 4) for x in (seconds, min(whole[1:]), max(whole[1:]))],
            "without_reading_s": round(statistics.median(alone[1:]), 4),
            "times_faster": round(found["prefill_s"] / seconds, 1),
            "read_gb_per_s": round(bytes_here / statistics.median(reading[1:]) / 1e9, 2),
            "decode_step_ms": round(step_ms, 2),
        }
        opened_run.close()
    if ranks.is_root:
        found["plain_read_gb_per_s"] = round(plain_read(folder / "run" / "shards"), 2)
        print(json.dumps(found))


def text_ids(n: int) -> Any:
    """Token ids of the standard library's decimal module, over and over."""
    sys.path.insert(0, str(CHECKPOINT.parent))
    from document import document_text  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(CHECKPOINT)(document_text(), verbose=False)["input_ids"]
    return np.resize(np.array(ids, np.int64), n)


def question_of(ids: Any) -> Any:
    """Four answers without a question before them."""
    from cpmpi.engine.extend import Question

    answers = tuple(ids[i * 40 : i * 40 + ANSWER_TOKENS] for i in range(ANSWERS))
    return Question(np.empty(0, np.int64), answers)


def decode_ms(job: Any, engine: Any, extension: Any, prompt: Any) -> float:
    """Median milliseconds of a step that makes one token after the context."""
    from cpmpi.engine.decode import Decoding

    decoding = Decoding(
        engine=engine, context=extension.context, n_tokens=extension.n_tokens, last_hidden=None,
        gather=job.ranks.comm.allgather,
    )  # fmt: skip
    times = [time.perf_counter()]
    for _ in decoding.generate([prompt], lambda _, logits_V, __: int(logits_V.argmax()), STEPS):
        times.append(time.perf_counter())
    return 1e3 * statistics.median(np.diff(times)[1:])


def stored_bytes(run: Any) -> int:
    """Bytes of one token's keys and values in all layers, as stored."""
    layers = range(len(run.documents[0].kv_shapes))
    return sum(part.nbytes for layer in layers for part in run.documents[0].kv(layer, 0, 1, raw=True))


def plain_read(shards: Path) -> float:
    """GB/s of reading a shard's bytes from the page cache."""
    path = sorted(shards.rglob("*.h5"))[0]
    path.read_bytes()
    began = time.perf_counter()
    size = len(path.read_bytes())
    return size / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    main()
