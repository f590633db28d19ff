"""Continuations of stored documents equal the whole text computed from scratch by one transformers process.

Tolerance: as in test_exact, float32 sums in another order, 1e-4 a log-probability; keys are stored in float32 here.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_exact import VOCABULARY, save_llama, shared_folder

CONTEXT = 301
STEMS = (9, 0, 4)
ANSWERS = ((3, 1, 7, 20), (5,), (2, 2))


def ids_of(n: int, seed: int):
    return np.random.default_rng(seed).integers(0, VOCABULARY, n).astype(np.int64)


def make_questions():
    from cpmpi.engine.extend import Question

    return [
        Question(ids_of(stem, q), tuple(ids_of(n, 100 * q + i + 7) for i, n in enumerate(answers)))
        for q, (stem, answers) in enumerate(zip(STEMS, ANSWERS, strict=True))
    ]


def scratch(model, context, stem, answer):
    """Log-probabilities of the answer's tokens, whether each is the most probable, by one transformers process."""
    import torch

    ids_T = torch.from_numpy(np.concatenate([context, stem, answer]).astype(np.int64))
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    n = len(answer)
    before_CV = torch.log_softmax(logits_TV[-n - 1 : -1], -1)
    targets = ids_T[-n:]
    return before_CV.gather(1, targets[:, None])[:, 0].numpy(), (before_CV.argmax(1) == targets).numpy()


def extension_of(comm, folder, run, kind, resident):
    """An extension of the run's one document on the ranks of this launch."""
    import torch

    from cpmpi.attention.layout import Layout
    from cpmpi.attention.schedule import Schedule
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.comm.transport import MPITransport
    from cpmpi.engine.extend import Extension
    from cpmpi.engine.score import Engine
    from cpmpi.model.probe import backends_of, probe
    from cpmpi.model.weights import Weights
    from cpmpi.run.cache import StoredKeys
    from tests.loaded import load

    device = torch.device("cpu")
    model = load(folder / "model", torch.float32)
    layers = probe(model)
    nodes = [[0], list(range(1, comm.size))] if comm.size > 1 else [[0]]
    engine = Engine(
        rank=comm.rank, weights=Weights(model), layers=layers, transport=MPITransport(comm), device=device,
        schedule=Schedule(kind=kind, nodes=nodes, parents=[None, 0][: len(nodes)]),
        backends=backends_of(layers, device, Ranks(comm)), progress=Progress(enabled=False), chunk_tokens=6,
    )  # fmt: skip
    document = run.documents[0]
    stored = StoredKeys(
        document, Layout(n_tokens=CONTEXT, world=comm.size, segments=3), comm.rank, group=0,
        heads=tuple(layer.heads for layer in layers), device=device, resident=resident,
    )  # fmt: skip
    return Extension(
        engine=engine, context=stored, n_tokens=CONTEXT, last_hidden=torch.from_numpy(document.last_hidden)
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 3)])
def test_answers_equal_the_whole_text_from_scratch(ranks, tmp_path):
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM

    import cpmpi

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        np.save(folder / "context.npy", ids_of(CONTEXT, 5))
    comm.Barrier()
    with cpmpi.prefill(
        model=folder / "model", inputs=folder / "context.npy", output=folder / "run", kv_dtype="float32"
    ) as run:
        questions = make_questions()
        if comm.rank == 0:
            model = AutoModelForCausalLM.from_pretrained(
                folder / "model", dtype=torch.float32, attn_implementation="sdpa"
            )
            expected = {
                (q, i): scratch(model.eval(), ids_of(CONTEXT, 5), question.stem, answer)
                for q, question in enumerate(questions)
                for i, answer in enumerate(question.answers)
            }
        for kind, resident in (("tree", True), ("ring", False), ("hybrid", True)):
            extension = extension_of(comm, folder, run, kind, resident)
            for _ in range(2):  # a second pass finds all as the first did
                scored = comm.gather(extension.score(questions))
            extension.engine.transport.close()
            extension.context.close()
            if comm.rank == 0:
                found = {(s.question, s.answer): s for each in scored for s in each}
                assert found.keys() == expected.keys()
                for which, (logprobs, greedy) in expected.items():
                    assert np.abs(found[which].logprobs - logprobs).max() <= 1e-4, (kind, which)
                    assert (found[which].greedy == greedy).all(), (kind, which)


def test_answers_are_dealt_evenly_and_stems_counted_once_a_holder():
    from cpmpi.engine.extend import Question, branches_of, deal

    questions = [Question(ids_of(100, 0), tuple(ids_of(10, i) for i in range(4)))]
    dealt = deal(questions, 2)
    assert sorted(which for each in dealt for which in each) == [(0, i) for i in range(4)]
    assert [len(each) for each in dealt] == [2, 2]
    other = Question(ids_of(0, 0), (ids_of(120, 0),))
    assert [len(each) for each in deal([*questions, other], 2)] == [1, 4]  # a second stem costs more than it saves
    branches, lines = branches_of(questions, [(0, 1), (0, 3)], 50, chunk_tokens=60)
    assert [(b.start, len(b.ids), b.parent) for b in branches] == [
        (50, 50, None), (100, 50, 0), (150, 10, 1), (150, 10, 1),
    ]  # fmt: skip
    assert lines == [[0, 1, 2], [0, 1, 3]]


def collect(decoding, prompts, sampling, most):
    streams = [sampling.stream(i) for i in range(len(prompts))]
    found = [[] for _ in prompts]
    for step in decoding.generate(prompts, lambda i, x, ids: sampling.choose(x, ids, streams[i]), most):
        for i, token in step:
            found[i].append(token)
    return found


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 3)])
def test_greedy_tokens_are_those_of_transformers(ranks, tmp_path):
    """Three prompts of unlike lengths after a stored document, token for token, by every schedule; and drawn ones."""
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM

    import cpmpi
    from cpmpi.engine.decode import Decoding
    from cpmpi.model.sampling import Sampling

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        np.save(folder / "context.npy", ids_of(CONTEXT, 5))
    comm.Barrier()
    prompts, most = [ids_of(n, n) for n in (8, 1, 3)], 12
    with cpmpi.prefill(
        model=folder / "model", inputs=folder / "context.npy", output=folder / "run", kv_dtype="float32"
    ) as run:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        expected = []
        for prompt in prompts:
            whole = torch.from_numpy(np.concatenate([ids_of(CONTEXT, 5), prompt]))[None]
            made = model.generate(
                whole, attention_mask=torch.ones_like(whole), max_new_tokens=most, do_sample=False, eos_token_id=[-1],
                pad_token_id=0,
            )  # fmt: skip
            expected.append(made[0, whole.shape[1] :].tolist())
        drawn = []
        for kind, resident in (("tree", True), ("ring", False), ("hybrid", True)):
            one = extension_of(comm, folder, run, kind, resident)
            decoding = Decoding(
                engine=one.engine, context=one.context, n_tokens=CONTEXT, last_hidden=None, gather=comm.allgather
            )  # fmt: skip
            for sampling in (Sampling(), Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=4)):
                found = collect(decoding, prompts, sampling, most)
                if not sampling.temperature:
                    assert found == expected, kind
                else:
                    drawn.append(found)
            one.engine.transport.close()
            one.context.close()
        assert drawn[0] == drawn[1] == drawn[2]
        assert drawn[0] != expected
