"""Every family equals one transformers process: documents beyond window and rope length, on one and three ranks.

Tolerances: see ``tolerances.py``. Both sides compute in float32 and differ in the order of sums only.
"""

import re
from functools import partial

import numpy as np
import pytest

from tests.families import DOCS, FAMILIES, REFUSED, table
from tests.test_exact import shared_folder
from tests.tiny_models import VOCABULARY, save_tiny, tiny_config, truth
from tests.tolerances import TOKEN, check_logprobs

LENGTHS = (150, 40)  # a short document after a long one: rotary embeddings must forget the long one
CONTEXT = 97  # of the long one: what follows is beyond the window from its first tokens, or from some token on
# What goes on from stored keys here; all families do in test_extend_families, which is slow.
GOES_ON = ("Llama 4", "Mistral", "Gemma 2", "Gemma 4", "gpt-oss", "DeepSeek V3")


@pytest.mark.parametrize("part", range(2))
@pytest.mark.mpi(3)
def test_every_family_equals_one_transformers_process(part, tmp_path):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    families = FAMILIES[part::2]
    expected = {}
    for i in range(comm.rank, len(families), comm.size):
        save_tiny(folder / f"{i}", tiny_config(families[i].model_type, **families[i].own), seed=i)
        expected[i] = [truth(folder / f"{i}", document(n)) for n in LENGTHS]
    expected = {i: logprobs for some in comm.allgather(expected) for i, logprobs in some.items()}
    worst = (0.0, "")
    for world in (MPI.COMM_SELF, comm):
        for i in range(len(families)) if world is comm else range(comm.rank, len(families), comm.size):
            whole, short = expected[i]
            goes_on = world is comm and families[i].name in GOES_ON
            after = partial(check_continued, whole, families[i].name) if goes_on else None
            found = scores(world, folder / f"{i}", after=after)
            for n, want, got in zip(LENGTHS, (whole, short), found, strict=True):
                worst = max(worst, (check_logprobs(got, want, families[i].name, world.size, n), families[i].name))
    print(f"worst: {worst[1]}, {worst[0]:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.mpi(3)
def test_streamed_weights_change_nothing_in_any_family(part, tmp_path):
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    for i, family in list(enumerate(FAMILIES))[part * 3 + rank :: 9]:
        save_tiny(tmp_path / f"{i}", tiny_config(family.model_type, **family.own), seed=i)
        resident, streamed = (scores(MPI.COMM_SELF, tmp_path / f"{i}", stream=stream) for stream in (False, True))
        for a, b in zip(resident, streamed, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=family.name)


def document(n_tokens):
    return np.random.default_rng(n_tokens).integers(3, VOCABULARY, n_tokens)


def scores(comm, folder, stream=False, dtype="float32", make=document, keep_of=lambda _: None, **own):
    """Log-probabilities of the documents of all lengths, as ``make`` makes them, on the ranks of ``comm``.

    ``keep_of`` makes of the weights what takes each layer's keys and values. In ``own``: ``kernel`` names the attention
    kernel, which the job chooses else; ``lengths``, ``segments``, ``chunk_tokens``; ``after`` is called with the engine
    in the end.
    """
    import torch

    from cpmpi.attention.layout import Layout
    from cpmpi.attention.schedule import Schedule
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.comm.transport import MPITransport
    from cpmpi.engine.outputs import assemble
    from cpmpi.engine.score import Engine
    from cpmpi.kernels.select import named
    from cpmpi.model.checkpoint import Checkpoint
    from cpmpi.model.probe import backends_of, probe

    device, dtype = torch.device("cpu"), getattr(torch, dtype)
    checkpoint = Checkpoint(folder)
    skeleton = checkpoint.skeleton(dtype)
    layers = probe(skeleton)
    weights = checkpoint.weights(checkpoint.reader(skeleton, device), stream=stream)
    transport = MPITransport(comm)
    backends = (named(own["kernel"]),) * len(layers) if "kernel" in own else backends_of(layers, device, Ranks(comm))
    engine = Engine(
        rank=comm.rank, layers=layers, weights=weights, device=device,
        schedule=Schedule(kind="ring", nodes=[list(range(comm.size))], parents=[None]), transport=transport,
        backends=backends, progress=Progress(enabled=False), chunk_tokens=own.get("chunk_tokens", 20),
    )  # fmt: skip
    found = []
    for n_tokens in own.get("lengths", LENGTHS):
        layout = Layout(n_tokens=n_tokens, world=comm.size, segments=own.get("segments", 2))
        mine = engine.score(make(n_tokens), layout, "document", keep_of(weights))
        everyone = comm.allgather((mine.positions.numpy(), mine.logprobs.numpy(), mine.last_hidden, 0))
        found.append(assemble(everyone, n_tokens)[0])
    if own.get("after"):
        own["after"](comm, engine)
    transport.close()
    return found


class Kept:
    """A layer's keys and values as a pass of this process left them on this rank, in place of stored ones."""

    def __init__(self, layout, position):
        self.layout, self.layouts = layout, (layout,)
        self._pieces, self._layers = layout.pieces(position), []

    def put(self, layer, key_TGD, value_TGE):
        from cpmpi.attention.execute import Keys, flat

        self._layers.append(Keys(self._pieces, flat([key_TGD, value_TGE]), key_TGD, value_TGE))

    def layer(self, layer):
        return self._layers[layer]


def check_continued(whole, name, comm, engine):
    """After the first tokens of the long document, the rest of it: half as a question, half as answer; and alone."""
    from dataclasses import replace

    from cpmpi.attention.layout import Layout
    from cpmpi.attention.schedule import Schedule
    from cpmpi.engine.extend import Extension, Question

    ids = document(LENGTHS[0])
    layout = Layout(n_tokens=CONTEXT, world=comm.size, segments=3)
    kept = Kept(layout, comm.rank)
    last = comm.allgather(engine.score(ids[:CONTEXT], layout, "context", kept.put).last_hidden)
    (last_hidden,) = (hidden for hidden in last if hidden is not None)
    middle = (CONTEXT + len(ids)) // 2
    rest, none = ids[CONTEXT:], ids[:0]
    questions = [Question(rest[: middle - CONTEXT], (rest[middle - CONTEXT :],)), Question(none, (rest, rest[:1]))]
    nodes = [[0], list(range(1, comm.size))]
    for kind in ("tree", "hybrid"):
        other = replace(engine, schedule=Schedule(kind=kind, nodes=nodes, parents=[None, 0]))
        extension = Extension(engine=other, context=kept, n_tokens=CONTEXT, last_hidden=last_hidden)
        for scored in extension.score(questions):
            expected = whole[middle:] if scored.question == 0 else whole[CONTEXT:][: len(scored.logprobs)]
            error = np.abs(scored.logprobs - expected)
            assert error.max() <= TOKEN, (name, kind, scored.question, scored.answer, error.max())


@pytest.mark.parametrize(("model_type", "own", "reason"), REFUSED, ids=[case[0] for case in REFUSED])
def test_unsupported_models_are_refused_by_name(model_type, own, reason, tmp_path):
    import torch

    from cpmpi.errors import UserError
    from cpmpi.model.checkpoint import Checkpoint
    from cpmpi.model.probe import probe

    config = tiny_config(model_type, **own)
    config.save_pretrained(tmp_path)
    weightless(tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)) as refusal:
        probe(Checkpoint(tmp_path).skeleton(torch.float32))
    assert len(str(refusal.value).splitlines()) == 1


def weightless(folder):
    """A weight file without any weight: refusals need none."""
    import torch
    from safetensors.torch import save_file

    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")


def test_the_documented_table_is_current():
    assert table() in DOCS.read_text(), "regenerate it: python -m tests.families"
