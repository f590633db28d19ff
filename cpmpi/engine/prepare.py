"""Prepare a job: read, inspect the model, place the ranks, decide. Nothing is written and no weight is read.

All that can be refused is refused here. Each step is collective: all ranks make it and raise its errors together.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cpmpi.attention.execute import Heads
from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout
from cpmpi.attention.schedule import Schedule
from cpmpi.choices import AUTO, OFF
from cpmpi.comm.carrier import choose_carrier
from cpmpi.comm.device import choose_device, room_of, set_threads
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.cost.choose import choose_schedule
from cpmpi.cost.memory import choose_residence, document_memory
from cpmpi.cost.workload import TokenSizes, Workload
from cpmpi.documents.read import InputDocument, ReadOptions, read_documents
from cpmpi.engine.circumstances import recorded_products, recorded_schedule
from cpmpi.engine.keeping import Keeping, check_documents, read_keeping, special_tokens
from cpmpi.engine.options import JobOptions, ModelOptions
from cpmpi.engine.placement import check_grid, number_ranks
from cpmpi.engine.report import introduce
from cpmpi.engine.state import Decision, Inputs, Job, Model, Place
from cpmpi.errors import UserError
from cpmpi.model.blocks import blocks_of
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.fingerprint import Fingerprint, fingerprint
from cpmpi.model.linear import choose_products
from cpmpi.model.probe import Layer, backends_of, probe
from cpmpi.model.size import inner_width
from cpmpi.model.tensor_parallel import WHOLE, Sharing, share
from cpmpi.model.weights import weight_bytes
from cpmpi.run import folder, parts, spec
from cpmpi.run.text_places import text_facts
from cpmpi.timeline.files import check_files


def prepare(options: JobOptions, ranks: Ranks) -> Job:
    """A job that nothing was found against. Collective.

    Raises:
        UserError: something the user can mend.
    """
    inputs = read(options, ranks)
    model = inspect(options, ranks, inputs)
    place = find_place(options, ranks, inputs, model)
    found = fingerprint(inputs.checkpoint.folder, place.ranks)
    run_spec = place.ranks.on_root(make_spec, options, inputs, model, place, found)
    job = Job(
        options=options, inputs=inputs, model=model, place=place, spec=run_spec,
        decision=decide(options, inputs, model, place, run_spec), progress=progress_of(options, place.ranks),
    )  # fmt: skip
    introduce(job)
    if options.share:
        needed = place.ranks.on_root(parts.check_room, options.output, job.spec, _hidden_bytes(options, place))
    else:
        needed = place.ranks.on_root(
            folder.check_room, options.output, job.spec, overwrite=options.overwrite,
            hidden_bytes=_hidden_bytes(options, place),
        )  # fmt: skip
    job.progress.say(needed)
    return job


def _hidden_bytes(options: JobOptions, place: Place) -> int:
    """Bytes of a token's hidden state in checkpoints; 0 where there are none."""
    return place.blocks.token_bytes if options.checkpoint != OFF and place.blocks.whole else 0


def progress_of(options: ModelOptions, ranks: Ranks) -> Progress:
    """Progress that rank 0 shows, unless it is not wanted."""
    return Progress(enabled=ranks.is_root and not options.quiet)


def read(options: JobOptions, ranks: Ranks) -> Inputs:
    """The checkpoint's description on every rank, and the documents on rank 0. Collective."""
    ranks.on_root(folder.check_folder, options.output, overwrite=options.overwrite)
    ranks.on_root(check_files, plot=options.plot, trace=options.trace, run_folder=options.output)
    checkpoint = ranks.together(Checkpoint, options.model)
    keeping: Keeping = ranks.on_root(read_keeping, options, checkpoint)
    documents: list[InputDocument] = []
    ranks.on_root(lambda: documents.extend(_read_documents(options, checkpoint, keeping, progress_of(options, ranks))))
    longest: int = ranks.on_root(_longest, options, documents) + keeping.scoring.prefix
    return Inputs(checkpoint=checkpoint, documents=tuple(documents), longest=longest, keeping=keeping)


def _longest(options: JobOptions, documents: list[InputDocument]) -> int:
    """Tokens of the longest document that this job may take."""
    lengths = [len(document.token_ids) for document in documents]
    if options.most_tokens is None:
        return max(lengths)
    within = [length for length in lengths if length <= options.most_tokens]
    if not within:
        raise UserError(
            f"--most-tokens {options.most_tokens}: all of the {len(lengths)} documents are longer, the shortest has "
            f"{min(lengths)}"
        )
    return max(within)


def _read_documents(
    options: JobOptions, checkpoint: Checkpoint, keeping: Keeping, progress: Progress
) -> list[InputDocument]:  # fmt: skip
    def tokenized(done: int, characters: int) -> None:
        progress.count("tokenized {done} of {of} characters", done, characters)

    reading = read_documents(
        options.inputs, checkpoint=checkpoint.folder, vocab_size=checkpoint.vocab_size, progress=tokenized,
        options=ReadOptions(
            column=options.column, id_column=options.id_column, select=options.select, limit=options.limit,
            skip_bad=options.skip_bad, special_tokens=special_tokens(options), prefix=keeping.scoring.prefix,
            spans=keeping.spans,
            max_positions=None if options.allow_longer or options.context else checkpoint.max_positions,
        ),
    )  # fmt: skip
    for note in (*reading.notes, check_documents(keeping, reading.documents)):
        if note:
            progress.say(note)
    for problem in reading.problems:  # said also where no progress is wanted: nothing is left out in silence
        Progress(enabled=True).say(f"left out: {problem}")
    return reading.documents


def inspect(options: ModelOptions, ranks: Ranks, inputs: Inputs) -> Model:
    """The model without weights, on every rank, and what its layers will ask for. Collective."""
    device = ranks.together(choose_device, ranks, options.device)
    dtype = inputs.checkpoint.compute_dtype(options.dtype, device)
    skeleton = ranks.together(inputs.checkpoint.skeleton, dtype)
    layers = ranks.together(probe, skeleton, inputs.together)
    return Model(device=device, dtype=dtype, skeleton=skeleton, layers=layers)


def find_place(options: ModelOptions, ranks: Ranks, inputs: Inputs, model: Model) -> Place:
    """The ranks numbered along the machine's rings, and each rank's share of the model. Collective."""
    threads = set_threads(ranks)
    ranks, topology = number_ranks(ranks, measure=options.attention == "auto")
    carrier = choose_carrier(ranks, topology, model.device, options.transport)
    sharing, skeleton, layers = WHOLE, model.skeleton, model.layers

    def take_share() -> tuple[Sharing, torch.nn.Module, tuple[Layer, ...]]:
        check_grid(topology, options.tp)
        sharing = share(model.skeleton, model.layers, options.tp, ranks.rank % options.tp)
        narrow = inputs.checkpoint.skeleton(model.dtype, sharing=sharing)
        return sharing, narrow, sharing.layers(narrow, model.layers, inputs.together)

    if options.tp > 1:
        sharing, skeleton, layers = ranks.together(take_share)
    reader = ranks.together(
        inputs.checkpoint.reader, skeleton, model.device, sharing=sharing, check_finite=options.check_finite
    )
    return Place(
        ranks=ranks, topology=topology, carrier=carrier, threads=threads, sharing=sharing,
        layers=layers, skeleton=skeleton, reader=reader, blocks=blocks_of(skeleton, layers),
    )  # fmt: skip


def decide(options: JobOptions, inputs: Inputs, model: Model, place: Place, run_spec: spec.RunSpec) -> Decision:
    """Kernels, schedule, and where the weights stay. Collective."""
    ranks = place.ranks
    work = workload(options, model, place, tokens=inputs.together)
    schedule, reason = schedule_for(options, None if options.overwrite else options.output, place, work)
    sizes = TokenSizes(
        hidden=run_spec.hidden_size, inner=inner_width(place.skeleton), vocabulary=inputs.checkpoint.vocab_size,
        chunk_tokens=options.chunk_tokens, stored_itemsize=run_spec.kv.stored.itemsize if run_spec.kv else 0,
        checkpoint_bytes=_hidden_bytes(options, place),
        kept_bytes=inputs.keeping.token_bytes * -(-inputs.longest // inputs.together),
    )  # fmt: skip
    memory = ranks.together(
        choose_residence, document_memory(work, schedule, sizes), weight_bytes(place.reader), choice=options.weights,
        limit=options.memory_limit, room=room_of(ranks, model.device),
    )  # fmt: skip
    recorded = None if options.overwrite else ranks.on_root(recorded_products, options.output)
    products = choose_products(place.skeleton, model.device, ranks, recorded=recorded)
    return Decision(schedule=schedule, reason=reason, backends=work.backends, products=products, memory=memory)


def schedule_for(options: ModelOptions, output: Path | None, place: Place, work: Workload) -> tuple[Schedule, str]:
    """The schedule that is asked for, and why. ``auto`` takes the one that the run in ``output`` was begun with.

    Another one would add up in another order. Where there is none yet, or none goes on (None), it chooses. Collective.
    """
    begun, ranks = None, place.ranks
    if options.attention == AUTO and output is not None:
        begun = ranks.on_root(recorded_schedule, output, ranks.size // place.grid.head_groups)
    schedule, reason = choose_schedule(ranks, place.topology, begun or options.attention, work)
    return schedule, reason if begun is None else f"{begun}: as this run was begun"


def workload(options: ModelOptions, model: Model, place: Place, *, tokens: int, stored: int = 0) -> Workload:
    """What the ranks will compute, with the kernels chosen for it. Collective."""
    return Workload(
        layers=place.layers, backends=backends_of(place.layers, model.device, place.ranks), grid=place.grid,
        carrier=place.carrier, device=model.device, tokens=tokens, segments=options.segments, stored=stored,
    )  # fmt: skip


def make_spec(options: JobOptions, inputs: Inputs, model: Model, place: Place, found: Fingerprint) -> spec.RunSpec:
    """What the run folder will hold; on rank 0."""
    checkpoint, world = inputs.checkpoint, place.topology.world
    return spec.RunSpec(
        model=json.dumps(checkpoint.config.to_dict(), sort_keys=True, default=str),
        model_path=str(checkpoint.folder.absolute()),
        model_sha256=found.model_sha256,
        tokenizer_sha256=found.tokenizer_sha256,
        files=tuple(sorted(found.files.items())),
        dtype=str(model.dtype).removeprefix("torch."),
        kv=_kv_spec(options, [layer.heads for layer in model.layers]) if options.keep_kv else None,
        world_size=world,
        topology=place.topology.to_json(),
        hidden_size=checkpoint.text_config_value("hidden_size"),
        documents=tuple(_document_spec(d, world, options.segments, place.grid, inputs) for d in inputs.documents),
        command=options.command,
        scoring=inputs.keeping.scoring,
    )


def _kv_spec(options: JobOptions, heads: list[Heads]) -> spec.KVSpec:
    shapes = tuple(spec.KVShape(h.kv_heads, h.key_dim, h.value_dim) for h in heads)
    return spec.KVSpec(shapes=shapes, dtype=options.kv_dtype)


def _document_spec(
    document: InputDocument, world: int, segments: int, grid: Grid, inputs: Inputs
) -> spec.DocumentSpec:  # fmt: skip
    n_tokens, keeping = len(document.token_ids), inputs.keeping
    return spec.DocumentSpec(
        id=document.id,
        source=document.source,
        n_tokens=n_tokens,
        layout=Layout(n_tokens=n_tokens + keeping.scoring.prefix, world=world // grid.head_groups, segments=segments),
        grid=grid,
        token_ids_sha256=spec.token_digest(document.token_ids),
        text=text_facts(document.places, keeping.scoring.first),
        extras=keeping.extras(document),
    )
