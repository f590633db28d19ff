"""What a job will take, asked of the planner before it is submitted: does it fit into memory, time limit and disk?

The planner's rates are those of the named hardware, not measured here, so its times are rough: only what could never
end well is refused, the rest is said.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from cpmpi.choices import AUTO
from cpmpi.cost.hardware import Hardware, hardware
from cpmpi.cost.plan import Plan, Request, make_plan, mends
from cpmpi.documents.input_files import find_input_files
from cpmpi.documents.read import ReadOptions, read_documents
from cpmpi.engine.keeping import window_scoring
from cpmpi.engine.windows import windows_of
from cpmpi.errors import UserError, told_to_the_user
from cpmpi.model.checkpoint import Blueprint
from cpmpi.model.size import ModelSize, model_size
from cpmpi.slurm.request import BatchRequest, slurm_time
from cpmpi.text import counted, duration, human_bytes
from cpmpi.topology.synthetic import synthetic

CORE_FLOPS = 68e9  # of `cpmpi.cost.hardware`: float32, a core
MOST_READ_BYTES = 32e6  # of text to tokenize on a login node
BYTES_PER_TOKEN = 3.5  # of text that is not tokenized there
MOST_LENGTHS = 16  # planned one by one
START_S = 300  # for starting and reading, in a time limit of our own
MARGIN = 2.0  # on a predicted time, in a time limit of our own
MB = 1 << 20


@dataclass(frozen=True)
class Work:
    """The lengths of a job's documents, in tokens, and whether they are estimates."""

    lengths: tuple[int, ...]
    estimated: bool

    def __str__(self) -> str:
        about = "about " * self.estimated
        many = f"{len(self.lengths):,} document{'s' * (len(self.lengths) != 1)}"
        return f"{many}, {about}{sum(self.lengths):,} tokens, the longest {max(self.lengths):,}"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the planner says of a job on an allocation.

    Attributes:
        work: the documents.
        longest: the plan of the longest one.
        seconds: of all documents, the reading of the weights included.
        disk_bytes: that the run will have.
        memory_bytes: that a rank needs, with all weights in memory.
        streamed_bytes: that it needs with streamed weights.
        helps: what would make it fit.
    """

    work: Work
    longest: Plan
    seconds: float
    disk_bytes: int
    memory_bytes: int
    streamed_bytes: int
    helps: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a rank has the memory, with streamed weights if need be."""
        return self.streamed_bytes <= self.longest.memory_bytes


def work_of(params: dict[str, Any]) -> Work:
    """The documents of a command: token for token where that is quick, else from their size.

    Raises:
        UserError: an input is missing or broken.
    """
    inputs = [*params["inputs"], *params.get("more_inputs", ())]
    files = [file.path for file in find_input_files(inputs).files]
    sizes = [path.stat().st_size for path in files]
    text = sum(size for path, size in zip(files, sizes, strict=True) if path.suffix != ".npy")
    if text <= MOST_READ_BYTES:
        vocabulary = Blueprint(params["model"]).vocab_size
        wanted = ReadOptions(**{each.name: params[each.name] for each in fields(ReadOptions) if each.name in params})
        reading = read_documents(inputs, checkpoint=params["model"], vocab_size=vocabulary, options=wanted)
        return Work(tuple(len(d.token_ids) for d in reading.documents), estimated=False)
    lengths: list[float] = []
    for path, size in zip(files, sizes, strict=True):
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                lengths += [len(line) / BYTES_PER_TOKEN for line in lines if line.strip()]
        else:
            lengths.append(size / (4 if path.suffix == ".npy" else BYTES_PER_TOKEN))
    return Work(tuple(max(1, int(length)) for length in lengths), estimated=True)


def within(work: Work, most_tokens: int | None) -> Work:
    """The documents that a job takes which leaves longer ones to others.

    Raises:
        UserError: that is none.
    """
    lengths = tuple(length for length in work.lengths if most_tokens is None or length <= most_tokens)
    if not lengths:
        raise UserError(f"--most-tokens {most_tokens}: all documents are longer ({work})")
    return replace(work, lengths=lengths)


def forecast(params: dict[str, Any], request: BatchRequest, chip: Hardware, work: Work) -> Forecast:
    """Plan a job's documents on the allocation that is asked for.

    Args:
        params: of the command to submit, by the names of its options.
        request: the allocation.
        chip: of a rank, from `chip_of`.
        work: the documents.

    Raises:
        UserError: the model cannot be run, or the numbers do not go together.
    """
    blueprint = Blueprint(params["model"])
    dtype = str(blueprint.compute_dtype(params.get("dtype", AUTO), torch.device(chip.device))).removeprefix("torch.")
    given = {k: params[k] for k in ("kv_dtype", "segments", "chunk_tokens", "tp", "attention") if k in params}
    scoring = window_scoring(params.get("context"), params.get("stride"))
    lengths = [window.size for n_tokens in work.lengths for window in windows_of(n_tokens, scoring)]
    asked = Request(tokens=max(lengths), dtype=dtype, **{"kv_dtype": None, **given})
    kind = "ranks" if chip.device == "cpu" else "gpus"
    chip = chip.computing_in(dtype)
    with told_to_the_user():
        machine = synthetic(f"machine={chip.machine},nodes={request.nodes},{kind}={request.tasks_per_node}")
    size = model_size(blueprint, dtype, asked.tokens)
    longest = make_plan(size, asked, machine, chip)
    plans = [(replace(asked, tokens=tokens), count) for tokens, count in _grouped(lengths)]
    seconds = sum(make_plan(size, one, machine, chip).total_s * count for one, count in plans) + longest.weights_s
    streamed = longest.needed_bytes - _all_but_two_layers(longest, size)
    return Forecast(
        work=work, longest=longest, seconds=seconds, memory_bytes=longest.needed_bytes, streamed_bytes=streamed,
        disk_bytes=longest.disk_bytes * sum(work.lengths) // asked.tokens,
        helps=() if longest.fits else tuple(mends(size, asked, machine, chip)),
    )  # fmt: skip


def _all_but_two_layers(made: Plan, size: ModelSize) -> int:
    """Bytes of the weights that streaming keeps out of a rank's memory."""
    layers = made.memory["weights"] * (size.parameters - size.outside) / size.parameters
    return int(layers * max(0, size.n_layers - 2) / size.n_layers)


def _grouped(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Lengths and how many there are of each; where many differ, neighbours count as the longest of them."""
    ordered = sorted(lengths)
    step = -(-len(ordered) // MOST_LENGTHS) if len({*ordered}) > MOST_LENGTHS else 0
    if not step:
        yield from ((length, ordered.count(length)) for length in dict.fromkeys(ordered))
        return
    for first in range(0, len(ordered), step):
        some = ordered[first : first + step]
        yield some[-1], len(some)


def chip_of(name: str | None, request: BatchRequest, node_memory_bytes: int | None) -> Hardware:
    """A rank's share of a node: by name, by default an H100 where GPUs are asked for and cores elsewhere.

    Args:
        name: of `cpmpi.cost.hardware`, or None.
        request: what is asked for; cores and memory of a rank on the CPU come from it.
        node_memory_bytes: of a node, where the request does not say.
    """
    chip = hardware(name or ("h100" if request.gpus_per_node else "cpu"))
    if chip.device != "cpu":  # a rank has a device of its own
        return chip
    if request.cpus_per_task is not None or name is None:
        flops = CORE_FLOPS * (request.cpus_per_task or 1)
        chip = replace(chip, matmul_flops=flops, attention_flops=flops)
    node = node_memory_bytes
    if request.memory is not None and (asked := bytes_of(request.memory)):
        node = asked
    return chip if node is None else replace(chip, memory_bytes=node / request.tasks_per_node)


def bytes_of(memory: str) -> int:
    """Bytes of a memory size as Slurm reads it: MB where no unit is given."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", memory)
    assert found is not None
    return int(found[1]) * {"K": 1 << 10, "": MB, "M": MB, "G": 1 << 30, "T": 1 << 40}[found[2]]


def refusals(found: Forecast, request: BatchRequest, output: Path) -> Iterator[str]:
    """Why the job could not end well on this allocation."""
    if not found.fits:
        helps = f"; what would fit: {'; or '.join(found.helps)}" if found.helps else ""
        yield (
            f"memory: a rank needs about {human_bytes(found.streamed_bytes)} even with streamed weights, and has "
            f"{human_bytes(found.longest.memory_bytes)}{helps}"
        )
    limit = request.time_s
    if limit is not None and found.longest.total_s > limit - request.signal_s:
        yield (
            f"time: the longest document ({max(found.work.lengths):,} tokens) takes about "
            f"{duration(found.longest.total_s)}, more than the time limit of {duration(limit)}"
            + (f" less the {request.signal_s} s to stop in" if request.signal_s else "")
            + f"; ask for --time {slurm_time(own_limit(found.seconds, request.signal_s))}, or more nodes"
        )
    free = shutil.disk_usage(next(folder for folder in (output, *output.parents) if folder.exists())).free
    if found.disk_bytes > free:
        yield (
            f"disk: the run takes about {human_bytes(found.disk_bytes)}, but its file system has {human_bytes(free)} "
            "free; choose another --output, or `score`, which keeps no KV"
        )


def remarks(found: Forecast, request: BatchRequest) -> Iterator[str]:
    """What the user should know of the job: its time, its memory, its disk."""
    limit = request.time_s
    memory = human_bytes(min(found.memory_bytes, found.longest.memory_bytes))
    text = f"{found.work}: about {duration(found.seconds)} on {counted(request.ranks, 'rank')}, "
    yield text + f"{human_bytes(found.disk_bytes)} of disk, {memory} of memory a rank"
    if limit is not None and found.seconds > limit - request.signal_s:
        again = "it is requeued and goes on" if request.requeue else "start it again, it goes on"
        yield (
            f"warning: that is more than the time limit of {duration(limit)}: the job stops after the document it is "
            f"at, and {again}, about {int(found.seconds // max(1, limit - request.signal_s)) + 1} starts in all"
        )
    if found.memory_bytes > found.longest.memory_bytes >= found.streamed_bytes:
        yield (
            f"warning: with all weights in memory a rank needs {human_bytes(found.memory_bytes)} and has "
            f"{human_bytes(found.longest.memory_bytes)}: weights are read layer by layer (--weights stream)"
        )


def own_limit(seconds: float, signal_s: int) -> int:
    """A time limit for work of so many predicted seconds: twice that and five minutes, in steps of ten minutes."""
    return -(-int(MARGIN * seconds + START_S + signal_s) // 600) * 600
