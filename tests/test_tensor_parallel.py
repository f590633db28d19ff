"""Ranks that share the weights: the same results as one transformers process, two sums a layer, no key held twice.

Tolerances: see ``tolerances.py``; both sides compute in float32 and differ in the order of summation alone.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from .families import FAMILIES, UNSHARED
from .test_exact import LENGTHS, compare, save_documents, save_llama, shared_folder, truth
from .tiny_models import VOCABULARY, save_tiny, tiny_config
from .tiny_models import truth as tiny_truth
from .tolerances import check_keys, check_logprobs

KV_HEADS = (1, 2, 8)  # of 8 query heads
HEADS, HEAD_DIM, HIDDEN, LAYERS = 8, 8, 64, 2
# Plain, soft caps, experts, inputs of every layer, a scaled head; refused: learned positions, sinks. All are slow.
FEW = ("Llama 3", "Gemma 2", "Mixtral", "Gemma 4", "Cohere", "Granite", "GPT-NeoX", "GPT-2", "gpt-oss")


def grid_case(tp, cp, *marks):
    return pytest.param(tp, cp, marks=[pytest.mark.mpi(tp * cp), *marks], id=f"{tp}x{cp}")


GRIDS = [
    grid_case(4, 1), grid_case(2, 3), grid_case(2, 1, pytest.mark.slow),
    grid_case(2, 2, pytest.mark.slow), grid_case(4, 2, pytest.mark.slow), grid_case(4, 3, pytest.mark.slow),
]  # fmt: skip


def options_of(folder, checkpoint, documents, output, **own):
    from cpmpi.engine.options import JobOptions

    return JobOptions(
        model=folder / checkpoint, inputs=(str(folder / documents),), output=folder / output,
        **{"kv_dtype": "float32", "chunk_tokens": 300, "quiet": True, **own},
    )  # fmt: skip


@pytest.mark.parametrize(("tp", "cp"), GRIDS)
def test_a_grid_equals_one_transformers_process(tp, cp, tmp_path):
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.run import run
    from cpmpi.run.verify import verify_run

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    assert comm.size == tp * cp
    for kv_heads in KV_HEADS:
        if comm.rank == 0:
            save_llama(folder / f"model-{kv_heads}", kv_heads, LAYERS)
            save_documents(folder / f"documents-{kv_heads}")
        comm.Barrier()
        ways = [("ring", "resident", 2), ("tree", "stream", 5)]
        if tp * cp > 2:  # more ranks than cores take their time
            ways = [ways[kv_heads % 2]]
        for attention, weights, segments in ways:
            run(
                options_of(
                    folder, f"model-{kv_heads}", f"documents-{kv_heads}", f"run-{kv_heads}-{attention}", tp=tp,
                    attention=attention, weights=weights, segments=segments,
                )
            )  # fmt: skip
        comm.Barrier()
        if comm.rank == 0:
            expected = {n: truth(folder / f"model-{kv_heads}", document(folder, kv_heads, n)) for n in LENGTHS}
            for attention, _, _ in ways:
                assert verify_run(folder / f"run-{kv_heads}-{attention}").problems == []
                with cpmpi.open_run(folder / f"run-{kv_heads}-{attention}") as done:
                    for found, n in zip(done.documents, LENGTHS, strict=True):
                        compare(found, *expected[n])
                        compare_virtual(found, expected[n][1])
                    assert stored_numbers(done) == LAYERS * sum(LENGTHS) * kv_heads * 2 * HEAD_DIM


def document(folder, kv_heads, n_tokens):
    return np.load(folder / f"documents-{kv_heads}" / f"{n_tokens:05d}.npy")


def compare_virtual(found, kv):
    """What plain h5py reads of the virtual datasets is the same."""
    for name, part in (("key", 0), ("value", 1)):
        stored = found.group[f"kv/{name}"][...]
        for layer, expected in enumerate(kv):
            check_keys(stored[layer], expected[part], name, layer)


def stored_numbers(done):
    """Numbers of keys and values in all shards."""
    places = [done.shard(rank).document(i) for rank in range(done.world_size) for i in range(len(done.documents))]
    return sum(p.n_bytes // p.itemsize for p in places)


@pytest.mark.mpi(4)
def test_two_sums_a_layer_and_nothing_else_on_the_wire(tmp_path):
    from mpi4py import MPI

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        save_documents(folder / "documents", (1000,))
    for tp, kv_heads in [(2, 8), (2, 1), (4, 2), (4, 1)]:
        if comm.rank == 0:
            save_llama(folder / f"{tp}-{kv_heads}", kv_heads, LAYERS)
        comm.Barrier()
        check_wire(comm, folder, tp, kv_heads)


def check_wire(comm, folder, tp, kv_heads):
    """Count what one document of 1,000 tokens sends, sums and keeps on 4 ranks."""
    from cpmpi.comm.ranks import start
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import load_engine, open_run_folder
    from cpmpi.model.forward import chunked

    name = f"{tp}-{kv_heads}"
    job = prepare(options_of(folder, name, "documents", f"run-{name}", tp=tp, attention="ring", keep_kv=False), start())
    open_run_folder(job)
    layout, position = job.spec.documents[0].layout, job.place.grid.position(job.ranks.rank)
    pieces = job.place.grid.computed(layout).pieces(position)
    held = [0]
    token_ids = job.ranks.spread(job.inputs.documents[0].token_ids if job.ranks.is_root else None)
    with load_engine(job) as engine:
        scores = engine.score(token_ids, layout, "d", lambda _, k, v: held.append(k.numel() + v.numel()))
    sums, summed_bytes, sent = engine.summing.sums, engine.summing.summed_bytes, engine.summing.sent_bytes
    keys_sent = comm.allreduce(engine.transport.sent_bytes)
    tokens = sum(piece.size for piece in pieces)
    assert tokens == 1000 // (4 // tp)
    assert (sums, sent) == (2 * LAYERS * len(chunked(pieces, 300)), 0)
    assert summed_bytes == 2 * LAYERS * tokens * HIDDEN * 4
    # Among the positions of a head group keys go round a ring; every group moves the keys of its own heads.
    token_numbers, positions = kv_heads * 2 * HEAD_DIM, layout.world
    assert positions == 4 // min(tp, kv_heads)
    assert keys_sent == (positions - 1) * 1000 * token_numbers * 4 * LAYERS
    assert comm.allreduce(sum(held)) == LAYERS * 1000 * token_numbers  # no key on two ranks
    # Every token's log-probability comes from one rank.
    assert sorted(i for part in comm.allgather(scores.positions.tolist()) for i in part) == list(range(1, 1000))
    # A rank has its share of what is in layers, and the rest whole.
    weights = dict(engine.weights.model.named_parameters())
    assert weights["model.layers.0.mlp.gate_proj.weight"].shape == (96 // tp, HIDDEN)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (HIDDEN, 96 // tp)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (kv_heads * HEAD_DIM // min(tp, kv_heads), HIDDEN)


@pytest.mark.parametrize(
    ("names", "weights"), [(FEW, ("resident",)), pytest.param((), ("resident", "stream"), marks=pytest.mark.slow)]
)
@pytest.mark.mpi(2)
def test_families(names, weights, tmp_path):
    """Every family of docs/models.md, or a few, that has ``--tp`` there is right with it, the others are refused."""
    from mpi4py import MPI

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    families = [family for family in FAMILIES if not names or family.name in names]
    for i, family in enumerate(families):
        if comm.rank == i % 2:
            save_tiny(folder / f"{i}", tiny_config(family.model_type, **family.own), seed=i)
            (folder / f"{i}" / "documents").mkdir()
            np.save(folder / f"{i}" / "documents" / "d.npy", np.random.default_rng(i).integers(3, VOCABULARY, 150))
    comm.Barrier()
    for i, family in enumerate(families):
        check_family(comm, folder / f"{i}", family, weights)


def check_family(comm, folder, family, weights):
    from cpmpi.comm.ranks import start
    from cpmpi.engine.prepare import prepare
    from cpmpi.engine.run import run
    from cpmpi.errors import UserError
    from cpmpi.run.reader import open_run

    def options(weights):
        own = {"tp": 2, "weights": weights, "chunk_tokens": 40, "keep_kv": False, "allow_longer": True}
        return options_of(folder, folder, folder / "documents", folder / weights, **own)

    if family.name in UNSHARED:
        with pytest.raises(UserError, match="--tp"):
            prepare(options("resident"), start())
        return
    for way in weights:
        run(options(way))
    comm.Barrier()
    if comm.rank == 0:
        expected = tiny_truth(folder, np.load(folder / "documents" / "d.npy"))
        found = []
        for way in weights:
            with open_run(folder / way) as done:
                found.append(done.documents[0].logprobs)
        check_logprobs(found[0], expected, family.name)
        np.testing.assert_array_equal(found[0], found[-1], err_msg=family.name)


@pytest.mark.mpi(2)
def test_in_bfloat16_a_share_is_as_exact_as_the_whole(tmp_path):
    """Against float32, ranks that share the weights err no more than one transformers process in bfloat16 does.

    Both round as often, a rank's sums once more; errors are random, so their means over 1,000 tokens differ by some
    percent. A sum that lost half of its parts, or came in another type, would be far off.
    """
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM

    from cpmpi.engine.run import run
    from cpmpi.run.reader import open_run

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        save_tiny(folder / "model", tiny_config("qwen3", num_hidden_layers=2, max_position_embeddings=1000))
        (folder / "documents").mkdir()
        np.save(folder / "documents" / "d.npy", np.random.default_rng(0).integers(3, VOCABULARY, 1000))
    comm.Barrier()
    for weights in ("resident", "stream"):
        run(options_of(folder, "model", "documents", weights, tp=2, weights=weights, dtype="bfloat16"))
    comm.Barrier()
    if comm.rank == 0:
        token_ids = np.load(folder / "documents" / "d.npy")
        exact = tiny_truth(folder / "model", token_ids)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()
        ids_T = torch.from_numpy(token_ids)
        with torch.inference_mode():
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
        theirs = logits_TV.log_softmax(1).gather(1, ids_T[1:, None])[:, 0].numpy() - exact[1:]
        with open_run(folder / "resident") as resident, open_run(folder / "stream") as streamed:
            assert resident.attributes["dtype"] == "bfloat16"
            np.testing.assert_array_equal(resident.documents[0].logprobs, streamed.documents[0].logprobs)
            ours = resident.documents[0].logprobs[1:] - exact[1:]
        print(f"mean error {np.abs(ours).mean():.2e}, transformers {np.abs(theirs).mean():.2e}")
        assert np.abs(ours).mean() <= 1.25 * np.abs(theirs).mean()
        assert np.abs(ours).max() <= 2 * np.abs(theirs).max()


REFUSED = {
    "phi3": "colwise_gather_output for",
    "olmo2": "colwise_gather_output for",
    "gpt2": "has no tensor-parallel plan",
    "gpt_oss": "has no tensor-parallel plan",
    "deepseek_v3": "does not split its attention|more than 2",
    "llama4_text": "packed_rowwise|does not say|more than 2",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_plans_that_need_more_are_refused_by_name(model_type):
    from cpmpi.errors import UserError
    from cpmpi.model.probe import probe
    from cpmpi.model.tensor_parallel import share

    whole, narrow = skeleton(model_type), skeleton(model_type)
    layers = probe(whole)

    def shared():
        sharing = share(whole, layers, 2, 0)
        sharing.narrow(narrow)
        return sharing.layers(narrow, layers, 1000)

    with pytest.raises(UserError, match=rf"--tp.*{type(whole).__name__}.*({REFUSED[model_type]})"):
        shared()


def skeleton(model_type, **own):
    """A small model of a family without weights."""
    import json
    import tempfile
    from pathlib import Path

    import torch

    from cpmpi.model.checkpoint import Blueprint

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**tiny_config(model_type, **own).to_dict(), "model_type": model_type}))
        return Blueprint(file).skeleton(torch.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "choices"),
    [
        (8, 2, 3, "1, 2, 4, 8"), (8, 8, 16, "1, 2, 4, 8"), (6, 2, 4, "1, 2, 6"), (6, 3, 2, "1, 3, 6"),
        (12, 3, 4, "1, 3, 6, 12"),
    ],
)  # fmt: skip
def test_a_tp_that_does_not_divide_the_heads_lists_those_that_do(heads, kv_heads, tp, choices):
    from cpmpi.errors import UserError
    from cpmpi.model.probe import probe
    from cpmpi.model.tensor_parallel import share

    model = skeleton(
        "llama", num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=8 * heads, intermediate_size=240
    )
    expected = f"--tp {tp} does not divide LlamaForCausalLM ({heads} query and {kv_heads} KV heads); choose one of"
    with pytest.raises(UserError, match=f"^{re.escape(f'{expected} {choices}')}$"):
        share(model, probe(model), tp, 0)


@pytest.mark.mpi(2)
def test_ranks_that_do_not_make_whole_grids_are_refused(tmp_path):
    from mpi4py import MPI

    from cpmpi.comm.ranks import start
    from cpmpi.engine.prepare import prepare
    from cpmpi.errors import UserError

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        save_documents(folder / "documents", (10,))
    comm.Barrier()
    with pytest.raises(UserError, match=r"--tp 4: node \S+ has 2 ranks.*choose one of 1, 2$"):
        prepare(options_of(folder, "model", "documents", "run", tp=4), start())
    assert not (folder / "run").exists()
