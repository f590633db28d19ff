"""The main job: documents and a checkpoint in, exact log-probabilities and KV in a run folder out. Collective."""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Heads
from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout
from cpmpi.attention.schedule import Schedule
from cpmpi.comm.device import available_bytes, choose_device, resident_set_bytes, set_threads
from cpmpi.comm.log import rank_log
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks, start
from cpmpi.comm.transport import MPITransport
from cpmpi.cost.choose import choose_schedule
from cpmpi.cost.memory import Memory, choose_residence, document_memory
from cpmpi.documents.read import Document, read_documents
from cpmpi.engine.options import JobOptions
from cpmpi.engine.placement import check_grid, place, split
from cpmpi.engine.score import Engine, Scores
from cpmpi.errors import UserError
from cpmpi.kernels.backend import Backend
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.fingerprint import model_sha256, tokenizer_sha256
from cpmpi.model.forward import sum_outputs
from cpmpi.model.probe import Layer, backends_of, probe
from cpmpi.model.tensor_parallel import Sharing, share
from cpmpi.model.weight_reader import WeightReader
from cpmpi.model.weights import weight_bytes
from cpmpi.run import folder as resume
from cpmpi.run import spec as run_spec
from cpmpi.run.index import RunIndex
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import publish_text
from cpmpi.run.reader import open_run
from cpmpi.run.shard import prepare_shard
from cpmpi.run.writer import ShardWriter
from cpmpi.text import duration, human_bytes, table
from cpmpi.timeline.files import check_files, save_files
from cpmpi.timeline.intervals import Recorder
from cpmpi.topology.describe import Topology
from cpmpi.topology.text import summary as topology_summary
from cpmpi.version import __version__


@dataclass(kw_only=True)
class Job:
    """A job under way on one rank: what was asked, who we are, and what is known before the first document."""

    options: JobOptions
    ranks: Ranks
    topology: Topology
    device: torch.device
    threads: int
    progress: Progress
    checkpoint: Checkpoint
    documents: list[Document]  # on rank 0 only: they may be large
    dtype: torch.dtype
    layers: tuple[Layer, ...]
    backends: tuple[Backend, ...]
    sharing: Sharing | None
    reader: WeightReader
    schedule: Schedule
    reason: str
    memory: Memory
    spec: run_spec.RunSpec
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """How ranks share heads and tokens."""
        return Grid() if self.sharing is None else self.sharing.grid


def run(options: JobOptions) -> dict[int, float]:
    """Run the job; the seconds that each document took, by its place in the run (none for those finished before).

    Raises:
        UserError: something the user can mend; before any work where it can be known then.
    """
    return run_prepared(prepare(options, start()))


def run_prepared(job: Job) -> dict[int, float]:
    """Run a job that nothing was found against; what `run` returns. Collective."""
    options, ranks = job.options, job.ranks
    recorder = None
    if options.trace or options.plot:
        ranks.comm.Barrier()
        recorder = Recorder(rank=ranks.rank, epoch_s=time.perf_counter())
    with ExitStack() as stack:
        if ranks.is_root:
            stack.enter_context(resume.only_writer(options.output))
        index, spec, finished = open_run_folder(job)
        stack.enter_context(rank_log(RunPaths(options.output).log, ranks))
        writer = None
        if spec.kv is not None:
            writer = stack.enter_context(open_writer(job, index, spec, finished, recorder))
        todo = [i for i in range(len(spec.documents)) if i not in finished]
        if todo:
            engine = load_engine(job, recorder)
            for i in todo:
                score_document(job, engine, index, writer, i)
            engine.close()
        if index is not None:
            index.finish()
    if recorder is not None:
        everyone = ranks.comm.gather(recorder.intervals)
        if everyone is not None:
            intervals = [interval for rank in everyone for interval in rank]
            save_files(intervals, plot=options.plot, trace=options.trace, title=f"{options.output.name}, measured")
    if ranks.is_root:
        report(job)
    return job.seconds


def prepare(options: JobOptions, ranks: Ranks) -> Job:
    """Everything that can be refused is refused here: no weight is read, nothing is written. Collective."""
    progress = Progress(enabled=ranks.is_root and not options.quiet)
    device = ranks.together(choose_device, ranks, options.device)
    threads = set_threads(ranks)
    ranks.on_root(resume.check_folder, options.output)
    ranks.on_root(check_files, plot=options.plot, trace=options.trace, run_folder=options.output)
    checkpoint = ranks.together(Checkpoint, options.model)
    documents: list[Document] = []
    ranks.on_root(lambda: documents.extend(_read_documents(options, checkpoint, progress)))
    dtype = checkpoint.compute_dtype(options.dtype, device)
    whole = ranks.together(checkpoint.skeleton, dtype)
    longest: int = ranks.on_root(lambda: max(len(d.token_ids) for d in documents))
    layers = ranks.together(probe, whole, longest)
    heads = tuple(layer.heads for layer in layers)
    ranks, topology = place(ranks, measure=options.attention == "auto")
    progress = Progress(enabled=ranks.is_root and not options.quiet)
    sharing, model = None, whole
    if options.tp > 1:
        sharing, model, layers = ranks.together(
            _share, options, checkpoint, whole, layers, longest, topology, ranks.rank
        )
    reader = ranks.together(checkpoint.reader, model, device, sharing=sharing, check_finite=options.check_finite)
    grid = Grid() if sharing is None else sharing.grid
    spec = ranks.on_root(make_spec, options, topology, checkpoint, documents, dtype, heads, grid)
    backends = backends_of(layers, device)
    schedule, reason = choose_schedule(
        ranks, topology, options.attention, layers, backends, tokens=longest, segments=options.segments,
        device=device, grid=grid,
    )  # fmt: skip
    parts = document_memory(
        model, layers, schedule, tokens=longest, segments=options.segments, grid=grid, hidden=spec.hidden_size,
        vocabulary=checkpoint.vocab_size, chunk_tokens=options.chunk_tokens,
        stored_itemsize=spec.kv.stored.itemsize if spec.kv else 0,
    )  # fmt: skip
    memory = ranks.together(
        choose_residence, parts, weight_bytes(reader), choice=options.weights, limit=options.memory_limit,
        available=available_bytes(ranks, device), program=resident_set_bytes() if device.type == "cpu" else 0,
    )  # fmt: skip
    job = Job(
        options=options, ranks=ranks, topology=topology, device=device, threads=threads, progress=progress,
        checkpoint=checkpoint, documents=documents, dtype=dtype, layers=layers, backends=backends, sharing=sharing,
        reader=reader, schedule=schedule, reason=reason, memory=memory, spec=spec,
    )  # fmt: skip
    introduce(job)
    needed = ranks.comm.allreduce(run_spec.bytes_to_write(options.output, spec, ranks.rank))
    ranks.on_root(run_spec.check_room, options.output, needed)
    return job


def _share(
    options: JobOptions, checkpoint: Checkpoint, whole: Any, layers: tuple[Layer, ...], tokens: int,
    topology: Topology, rank: int,
) -> tuple[Sharing, torch.nn.Module, tuple[Layer, ...]]:  # fmt: skip
    """This rank's share of the weights, the model without weights that it makes, and the layers of that."""
    check_grid(topology, options.tp)
    sharing = share(whole, layers, options.tp, rank % options.tp)
    model = checkpoint.skeleton(whole.config.dtype, sharing=sharing)
    narrow = sharing.probe(model, layers, tokens)
    return sharing, model, narrow


def _read_documents(options: JobOptions, checkpoint: Checkpoint, progress: Progress) -> list[Document]:
    def tokenized(done: int, characters: int) -> None:
        progress.say(f"tokenized {done:,} of {characters:,} characters")

    documents = read_documents(
        options.inputs, checkpoint=checkpoint.folder, vocab_size=checkpoint.vocab_size,
        special_tokens=options.special_tokens, progress=tokenized,
    )  # fmt: skip
    limit = checkpoint.max_positions
    too_long = [d for d in documents if limit is not None and len(d.token_ids) > limit]
    if too_long and not options.allow_longer:
        d = max(too_long, key=lambda d: len(d.token_ids))
        raise UserError(
            f"{d.source}: document {d.id!r} has {len(d.token_ids)} tokens, but {checkpoint.folder} was made for "
            f"{limit} positions (max_position_embeddings); --allow-longer runs it all the same"
        )
    return documents


def make_spec(
    options: JobOptions,
    topology: Topology,
    checkpoint: Checkpoint,
    documents: list[Document],
    dtype: torch.dtype,
    heads: tuple[Heads, ...],
    grid: Grid,
) -> run_spec.RunSpec:
    """What the run folder will hold."""
    kv = None
    if options.keep_kv:
        shapes = dict.fromkeys((h.kv_heads, h.key_dim, h.value_dim) for h in heads)
        if len(shapes) > 1:
            raise UserError(
                f"{checkpoint.folder}: its layers differ in KV heads and head dims ({', '.join(map(str, shapes))}), "
                "which a run folder cannot hold; `cpmpi score` keeps no KV"
            )
        ((kv_heads, key_dim, value_dim),) = shapes
        kv = run_spec.KVSpec(
            layers=len(heads), heads=kv_heads, key_dim=key_dim, value_dim=value_dim, dtype=options.kv_dtype
        )
    return run_spec.RunSpec(
        model=json.dumps(checkpoint.config.to_dict(), sort_keys=True, default=str),
        model_sha256=model_sha256(checkpoint.folder),
        tokenizer_sha256=tokenizer_sha256(checkpoint.folder),
        dtype=str(dtype).removeprefix("torch."),
        kv=kv,
        world_size=topology.world,
        topology=topology.to_json(),
        hidden_size=checkpoint.text_config_value("hidden_size"),
        documents=tuple(_document_spec(d, topology.world, options.segments, grid) for d in documents),
        command=options.command,
    )


def _document_spec(document: Document, world: int, segments: int, grid: Grid) -> run_spec.DocumentSpec:
    n_tokens = len(document.token_ids)
    return run_spec.DocumentSpec(
        id=document.id,
        source=document.source,
        n_tokens=n_tokens,
        layout=Layout(n_tokens=n_tokens, world=world // grid.head_groups, segments=segments),
        grid=grid,
        token_ids_sha256=run_spec.token_digest(document.token_ids),
    )


def introduce(job: Job) -> None:
    """Say what is going to happen, before it does."""
    ranks, spec, options = job.ranks, job.spec, job.options
    tokens = sum(d.n_tokens for d in spec.documents)
    own = str(job.checkpoint.text_config_value("dtype") or "float32").removeprefix("torch.")
    kv = "no KV kept"
    if spec.kv is not None:
        size = human_bytes(spec.kv.layers * tokens * spec.kv.token_bytes)
        kv = f"KV kept as {spec.kv.dtype}, {size}"
    where = f"{job.threads} thread{'s' * (job.threads > 1)} each" if job.device.type == "cpu" else "one device each"
    job.progress.say(f"cpmpi {__version__}: {ranks.size} rank{'s' * (ranks.size > 1)} on {job.device.type}, {where}")
    job.progress.say(topology_summary(job.topology))
    job.progress.say(
        f"model {options.model}: {job.checkpoint.config.model_type}, {len(job.layers)} layers, "
        f"stored as {own}, computed in {spec.dtype}; {kv}"
    )
    if options.tp > 1:
        job.progress.say(str(job.grid))
    job.progress.say(f"attention: {job.reason}")
    for backend in {b.name: b for b in job.backends}.values():
        job.progress.say(f"kernel {backend.name}: {backend.reason}")
    job.progress.say(str(job.memory))
    job.progress.say(f"{len(spec.documents)} document{'s' * (len(spec.documents) > 1)}, {tokens:,} tokens")


def open_run_folder(job: Job) -> tuple[RunIndex | None, run_spec.RunSpec, frozenset[int]]:
    """The run's index (rank 0 only), its spec with the run id that holds, and the documents that are finished."""
    options, ranks = job.options, job.ranks
    opened: list[RunIndex] = []

    def open_index() -> tuple[run_spec.RunSpec, frozenset[int]]:
        opened.append(resume.start_index(options.output, job.spec, overwrite=options.overwrite))
        return opened[0].spec, opened[0].finished

    spec, finished = ranks.on_root(open_index)
    if finished:
        job.progress.say(f"{len(finished)} of {len(spec.documents)} documents are finished already")
    return next(iter(opened), None), spec, finished


def open_writer(
    job: Job, index: RunIndex | None, spec: run_spec.RunSpec, finished: frozenset[int], recorder: Recorder | None
) -> ShardWriter:
    """Lay out or check this rank's shard, and record the sizes of all."""
    ranks = job.ranks
    path = ranks.together(prepare_shard, job.options.output, spec, ranks.rank, finished)
    sizes = ranks.comm.gather(path.stat().st_size)
    ranks.on_root(lambda: index.write_manifest(sizes) if index is not None and sizes is not None else None)
    # One layer may wait: a longer queue would not make the disk faster.
    return ShardWriter(path, spec, ranks.rank, queue_bytes=0, recorder=recorder)


def load_engine(job: Job, recorder: Recorder | None = None) -> Engine:
    """Read the weights and open the transports."""
    options, ranks = job.options, job.ranks
    began = time.perf_counter()
    weights = ranks.together(job.checkpoint.weights, job.reader, stream=job.memory.stream)
    job.progress.say(f"weights read in {duration(time.perf_counter() - began)}")
    if ranks.is_root:
        summary = {**asdict(job.schedule), "askers": "all", **asdict(job.grid), "segments": options.segments}
        text = json.dumps({**summary, "reason": job.reason}, indent=1)
        publish_text(RunPaths(options.output).schedule, text + "\n")
        publish_text(RunPaths(options.output).topology, job.spec.topology + "\n")
    group, sharers = split(ranks, job.grid)
    summing = None
    if job.sharing is not None:
        summing = MPITransport(sharers)
        sum_outputs(weights.model, job.sharing.summed, summing.sum)
    return Engine(
        rank=ranks.rank, weights=weights, layers=job.layers, schedule=job.schedule, transport=MPITransport(group),
        backends=job.backends, device=job.device, progress=job.progress, grid=job.grid, summing=summing,
        recorder=recorder, chunk_tokens=options.chunk_tokens, check_finite=options.check_finite,
    )  # fmt: skip


def score_document(job: Job, engine: Engine, index: RunIndex | None, writer: ShardWriter | None, i: int) -> None:
    """One document: compute, store, mark as finished."""
    document, ranks = job.spec.documents[i], job.ranks
    began = time.perf_counter()
    token_ids = ranks.spread(job.documents[i].token_ids if ranks.is_root else None)

    def keep(layer: int, k_TGD: torch.Tensor, v_TGE: torch.Tensor) -> None:
        assert writer is not None
        writer.put(i, layer, k_TGD.cpu(), v_TGE.cpu())

    scores = engine.score(token_ids, document.layout, document.id, keep if writer is not None else None)
    digest = writer.finish(i) if writer is not None else 0
    everyone = ranks.comm.gather((scores.positions.numpy(), scores.logprobs.numpy(), scores.last_hidden, digest))
    if index is not None:
        assert everyone is not None
        logprobs, last_hidden = assemble(everyone, document.n_tokens)
        index.write_outputs(
            i, token_ids=token_ids, logprobs=logprobs, last_hidden=last_hidden,
            digests=[digest for *_, digest in everyone] if writer is not None else (),
        )  # fmt: skip
    job.seconds[i] = time.perf_counter() - began
    _log(job, scores, writer, document.id)


def assemble(everyone: list[Any], n_tokens: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A document's log-probabilities (T,), the first of them NaN, and last hidden state from what all ranks found."""
    logprobs = np.full(n_tokens, np.nan, np.float32)
    for positions, values, *_ in everyone:
        logprobs[positions] = values
    (last_hidden,) = (hidden.numpy() for _, _, hidden, _ in everyone if hidden is not None)
    return logprobs, last_hidden


def _log(job: Job, scores: Scores, writer: ShardWriter | None, name: str) -> None:
    parts = {**scores.seconds, **({"writer blocked": writer.stats.blocked_s} if writer is not None else {})}
    text = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in parts.items())
    logging.getLogger("cpmpi").info("document %r: %d tokens here; %s", name, len(scores.positions), text)


def report(job: Job) -> None:
    """The results as a table, on standard output."""
    rows = []
    with open_run(job.options.output) as done:
        for i, d in enumerate(done.documents):
            seconds = job.seconds.get(i)
            rate = f"{d.n_tokens / seconds:,.0f}" if seconds else "(was done)"
            took = duration(seconds) if seconds else ""
            rows.append((d.id, f"{d.n_tokens:,}", f"{d.nll:.6g}", f"{d.perplexity:.4f}", took, rate))
    print(table(("document", "tokens", "nll", "perplexity", "time", "tokens/s"), rows, left=1))
    print(f"run folder: {job.options.output}")
