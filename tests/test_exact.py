"""The main job on 1, 2, 3, 4 and 7 ranks equals one transformers process: log-probabilities and KV.

Tolerances: see ``tolerances.py``; both sides compute in float32 and differ in the order of summation alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from .tolerances import check_keys, check_logprobs, of_a_sum

LENGTHS = (1, 2, 5, 17, 1000, 4099)
KV_HEADS = (8, 2, 1)  # of 8 query heads: 1:1, 4:1, 8:1
VOCABULARY = 300


def save_llama(folder, kv_heads, layers=2):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=kv_heads,
        intermediate_size=96, vocab_size=VOCABULARY, max_position_embeddings=8192, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def save_documents(folder, lengths=LENGTHS):
    folder.mkdir()
    for length in lengths:
        np.save(folder / f"{length:05d}.npy", np.random.default_rng(length).integers(0, VOCABULARY, length))


def truth(checkpoint, token_ids):
    """Of one transformers process in float32: log-probabilities (T,), (key_TGD, value_TGE) of each layer, and the last
    token's hidden state after the final norm (hidden,).
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    with torch.inference_mode():
        out = model(input_ids=ids[None], use_cache=True, output_hidden_states=True)
    logprobs = torch.log_softmax(out.logits[0, :-1].float(), -1).gather(1, ids[1:, None])[:, 0]
    kv = [
        tuple(x[0].transpose(0, 1).numpy() for x in (layer.keys, layer.values)) for layer in out.past_key_values.layers
    ]
    return np.concatenate([[np.nan], logprobs.numpy()]), kv, out.hidden_states[-1][0, -1].numpy()


def shared_folder(tmp_path):
    from mpi4py import MPI

    return MPI.COMM_WORLD.bcast(tmp_path)


@pytest.mark.parametrize("ranks", [
    *(pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 2, 4)),
    *(pytest.param(n, marks=(pytest.mark.mpi(n), pytest.mark.slow)) for n in (3, 7)),
])  # fmt: skip
def test_job_equals_one_transformers_process(ranks, tmp_path):
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.run import run

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    assert comm.size == ranks
    for i, kv_heads in enumerate(KV_HEADS):
        many = (1, 2, 5) if ranks < 3 else (1, 2, 5)[i : i + 1]  # more ranks than cores take their time
        checkpoint, documents = folder / f"model-{kv_heads}", folder / f"documents-{kv_heads}"
        if comm.rank == 0:
            save_llama(checkpoint, kv_heads)
            save_documents(documents)
        comm.Barrier()
        for segments in many:
            run(
                JobOptions(
                    model=checkpoint, inputs=(str(documents),), output=folder / f"run-{kv_heads}-{segments}",
                    segments=segments, kv_dtype="float32", chunk_tokens=300, quiet=True,
                )
            )  # fmt: skip
        comm.Barrier()
        if comm.rank == 0:
            expected = {n: truth(checkpoint, np.load(documents / f"{n:05d}.npy")) for n in LENGTHS}
            for segments in many:
                with cpmpi.open_run(folder / f"run-{kv_heads}-{segments}") as done:
                    for document, n in zip(done.documents, LENGTHS, strict=True):
                        compare(document, *expected[n])


def compare(document, logprobs, kv, last_hidden):
    """Assert that a stored document equals the truth; nll and perplexity are its own log-probabilities' in float64."""
    n = len(logprobs) - 1
    assert document.n_tokens == len(logprobs)
    check_logprobs(document.logprobs, logprobs, document.id)
    if n:
        expected_nll = -np.sum(logprobs[1:], dtype=np.float64)
        assert document.nll == pytest.approx(expected_nll, rel=0, abs=of_a_sum(n))
        assert document.nll == pytest.approx(-np.sum(document.logprobs[1:], dtype=np.float64), rel=1e-12)
        assert document.perplexity == pytest.approx(np.exp(document.nll / n), rel=1e-12)
    assert document.last_hidden.shape == last_hidden.shape
    check_keys(document.last_hidden, last_hidden, document.id)
    assert kv
    for layer, expected in enumerate(kv):
        for got, want in zip(document.kv(layer), expected, strict=True):
            check_keys(got, want, document.id, layer)


@pytest.mark.mpi(6)
def test_every_schedule_gives_the_same_result(tmp_path):
    """Ring over two levels, tree and hybrid on nodes of 1, 3 and 2 ranks, against transformers."""
    import torch
    from mpi4py import MPI

    from cpmpi.attention.layout import Layout
    from cpmpi.attention.schedule import Schedule
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.comm.transport import MPITransport
    from cpmpi.engine.outputs import assemble
    from cpmpi.engine.score import Engine
    from cpmpi.model.checkpoint import Checkpoint
    from cpmpi.model.probe import backends_of, probe

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
    comm.Barrier()
    device = torch.device("cpu")
    checkpoint = Checkpoint(folder / "model")
    skeleton = checkpoint.skeleton(torch.float32)
    layers = probe(skeleton)
    weights = checkpoint.weights(checkpoint.reader(skeleton, device), stream=False)
    transport = MPITransport(comm)
    for n_tokens in (3, 500):
        token_ids = np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens)
        expected = truth(folder / "model", token_ids) if comm.rank == 0 else None
        for kind in ("ring", "tree", "hybrid"):
            engine = Engine(
                rank=comm.rank, weights=weights, layers=layers, transport=transport, device=device,
                schedule=Schedule(kind=kind, nodes=[[0], [1, 2, 3], [4, 5]], parents=[1, None, 1]),
                backends=backends_of(layers, device, Ranks(comm)), progress=Progress(enabled=False), chunk_tokens=100,
            )  # fmt: skip
            scores = engine.score(token_ids, Layout(n_tokens=n_tokens, world=comm.size), "document")
            everyone = comm.gather((scores.positions.numpy(), scores.logprobs.numpy(), scores.last_hidden, 0))
            if comm.rank == 0:
                logprobs, last_hidden = assemble(everyone, n_tokens)
                check_logprobs(logprobs, expected[0], kind, n_tokens)
                check_keys(last_hidden, expected[2], kind, n_tokens)
    transport.close()
