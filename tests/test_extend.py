"""Continuations of stored documents equal the whole text computed from scratch by one transformers process.

Tolerance: as in test_exact, float32 sums in another order, 1e-4 a log-probability; keys are stored in float32 here.
"""

from __future__ import annotations

import csv
import json
import re

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
    from cpmpi.errors import UserError

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
        extension = extension_of(comm, folder, run, "tree", True)
        extension.engine.check_finite = True
        with torch.no_grad():
            extension.engine.weights.model.model.layers[1].mlp.down_proj.weight.fill_(np.nan)
        with pytest.raises(UserError, match=r"output of layers\.1: \d+ of \d+ numbers are NaN"):
            extension.score(questions)
        extension.engine.transport.close()
        extension.context.close()


def test_answers_are_dealt_evenly_and_stems_counted_once_a_holder():
    from cpmpi.engine.extend import Before, Question, branches_of, deal

    questions = [Question(ids_of(100, 0), tuple(ids_of(10, i) for i in range(4)))]
    dealt = deal(questions, 2)
    assert sorted(which for each in dealt for which in each) == [(0, i) for i in range(4)]
    assert [len(each) for each in dealt] == [2, 2]
    other = Question(ids_of(0, 0), (ids_of(120, 0),))
    assert [len(each) for each in deal([*questions, other], 2)] == [1, 4]  # a second stem costs more than it saves
    branches, lines = branches_of(questions, [(0, 1), (0, 3)], [Before(50)], chunk_tokens=60)
    assert [(b.start, len(b.ids), b.parent) for b in branches] == [
        (50, 50, None), (100, 50, 0), (150, 10, 1), (150, 10, 1),
    ]  # fmt: skip
    assert lines == [[0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("limits", [{}, {"window": 40}, {"window": 3}, {"documents": (64, 103)}])
def test_runs_that_share_a_kernel_call_see_what_they_see_alone(limits):
    """Every visible pair of query and key once, and no other; two contexts beside one another, blind to each other."""
    import torch

    from cpmpi.attention.execute import SHORT, joined
    from cpmpi.attention.layout import Piece
    from cpmpi.engine.extend import APART, apart
    from cpmpi.kernels.mask import Mask

    mask = apart(Mask(**limits), [0, APART])
    starts = [(100, 3), (100, 7), (100, SHORT), (100, 1), (103, 2), (APART + 90, 4), (APART + 90, 1)]
    groups = joined([(start, torch.zeros(n, 1, 1)) for start, n in starts], mask)
    assert [len(q) for group in groups for _, q in group.runs] == [n for _, n in starts]
    for piece in (Piece(0, 50), Piece(50, 100), Piece(99, 100), Piece(APART, APART + 90), Piece(40, 102)):
        seen = torch.zeros(sum(n for _, n in starts), piece.size, dtype=torch.int64)
        calls = 0
        for group in groups:
            for row, start, q_THD, part, each in group.over(piece, mask):
                columns = slice(part.start - piece.start, part.stop - piece.start)
                seen[row : row + len(q_THD), columns] += each.dense(range(start, start + len(q_THD)), part)
                calls += each.sight(range(start, start + len(q_THD)), part) != "none"
        expected = torch.cat([mask.dense(range(start, start + n), piece) for start, n in starts])
        assert torch.equal(seen, expected.long()), piece
        if not limits:
            assert calls == {0: 3, 50: 3, 99: 3, APART: 1, 40: 5}[piece.start], (
                "runs that see all of a piece go together"
            )


def test_small_contexts_go_together():
    from cpmpi.engine.contexts import Context
    from cpmpi.engine.continuations import Task, together

    def task(n, *joints):
        return Task(Context(document=0, n_tokens=n, upto=n), [], list(joints), [])

    def sizes(tasks, most):
        return [[one.context.upto for one in group] for group in together(tasks, most)]

    tasks = [task(n) for n in (10, 20, 30, 5, 40, 0)]
    assert sizes(tasks, 60) == [[10, 20, 30], [5, 40, 0]]
    assert sizes(tasks, 1) == [[10, 20], [30, 5], [40, 0]], "as many tokens as the longest has"
    assert sizes(tasks, 0) == [[n] for n in (10, 20, 30, 5, 40, 0)]
    assert sizes([task(1), task(2, "joint"), task(3), task(4)], 60) == [[1], [2], [3, 4]]
    assert sizes([task(1)] * 20, 60) == [[1] * 16, [1] * 4]


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


def save_context(folder):
    save_llama(folder / "model", 2)
    np.save(folder / "context.npy", ids_of(CONTEXT, 5))
    lines = [
        {"document": "context.npy", "id": "whole", "choices": [ids_of(n, n).tolist() for n in (4, 9, 2)]},
        {"document": "context.npy", "id": "alone", "token_ids": ids_of(30, 3).tolist()},
        {"document": "context.npy", "id": "early", "token_ids": ids_of(5, 4).tolist(), "upto": 17},
        {"document": "context.npy", "id": "first", "token_ids": ids_of(5, 6).tolist(), "upto": 1},
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.mpi(2)
def test_the_job_scores_lines_into_a_run_of_its_own(tmp_path):
    """Whole and partial contexts of two documents in one pass, answers, tensor parallelism, mapped keys: against one
    transformers process."""
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM

    import cpmpi
    from cpmpi.run.verify import verify_run

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    documents = {"context.npy": ids_of(CONTEXT, 5), "other.npy": ids_of(77, 6)}
    if comm.rank == 0:
        save_context(folder)
        np.save(folder / "other.npy", documents["other.npy"])
        with open(folder / "lines.jsonl", "a") as file:
            file.write(json.dumps({"document": "other.npy", "id": "other", "token_ids": ids_of(6, 8).tolist()}) + "\n")
    comm.Barrier()
    model, inputs = folder / "model", [folder / name for name in documents]
    cpmpi.prefill(model=model, inputs=inputs, output=folder / "run", kv_dtype="float32").close()
    given = {"model": model, "run": folder / "run", "inputs": folder / "lines.jsonl", "quiet": True}
    ways = {"auto": {}, "mapped": {"kv": "mapped", "attention": "tree"}, "tp": {"tp": 2, "weights": "stream"}}
    for name, options in ways.items():
        cpmpi.extend(**given, **options, output=folder / name).close()
    comm.Barrier()
    if comm.rank:
        return
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    for name in ways:
        assert verify_run(folder / name).problems == []
        with cpmpi.open_run(folder / name) as run:
            names = ["whole/0", "whole/1", "whole/2", "alone", "early", "first", "other"]
            assert [d.id for d in run.documents] == names
            for line in lines:
                context = documents[line["document"]][: line.get("upto")]
                for i, answer in enumerate(line.get("choices") or [line["token_ids"]]):
                    d = run.documents[f"{line['id']}/{i}" if "choices" in line else line["id"]]
                    logprobs, greedy = scratch(truth, context, ids_of(0, 0), np.array(answer))
                    assert np.abs(d.logprobs - logprobs).max() <= 1e-4, (name, d.id)
                    assert (d.greedy == greedy).all()
                    assert d.nll == pytest.approx(-logprobs.sum(dtype=np.float64), abs=1e-4 * len(answer))
                    assert d.perplexity == pytest.approx(np.exp(d.nll / len(answer)), rel=1e-12)
                    assert d.continues["context_tokens"] == len(context)
            rows = list(csv.DictReader((folder / name / "scores.csv").open()))
            sums = [float(row["logprob"]) for row in rows[:3]]
            assert [row["best"] for row in rows[:3]] == ["yes" if s == max(sums) else "no" for s in sums]
            assert float(rows[3]["per_token"]) == pytest.approx(-run.documents["alone"].nll / 30, rel=1e-12)


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
def test_stored_keys_reach_any_number_of_ranks(writers, tmp_path):
    """Every position of every world gets exactly its tokens' rows, bit for bit, whoever wrote them."""
    import torch

    import cpmpi
    from cpmpi.attention.execute import Heads
    from cpmpi.attention.layout import Layout
    from cpmpi.run.cache import StoredKeys
    from tests.runs import KV, kv_of, make_run, make_spec

    tokens = 50
    make_run(tmp_path, make_spec(lengths=(tokens,), world=writers))
    shape = KV.shapes[0]
    heads = Heads(
        query_heads=shape.heads, kv_heads=shape.heads, key_dim=shape.key_dim, value_dim=shape.value_dim,
        dtype=torch.float32,
    )  # fmt: skip
    with cpmpi.open_run(tmp_path) as run:
        for readers in (1, 2, 3, 5):
            layout = Layout(n_tokens=tokens, world=readers, segments=3)
            for position in range(readers):
                with StoredKeys(
                    run.documents[0], layout, position, group=0, heads=(heads,) * KV.layers,
                    device=torch.device("cpu"), resident=bool(readers % 2),
                ) as stored:  # fmt: skip
                    rows = [i for piece in layout.pieces(position) for i in range(piece.start, piece.stop)]
                    for layer in range(KV.layers):
                        expected = kv_of(0, layer, tokens)
                        for got, want in zip(stored.layer(layer)[2:], expected, strict=True):
                            assert torch.equal(got, want[rows].to(torch.bfloat16).float()), (readers, position, layer)


@pytest.mark.mpi(2)
def test_what_cannot_be_continued_is_refused(tmp_path, capsys):
    from mpi4py import MPI

    from .test_bad_input import call

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    line = {"document": "context.npy", "id": "a", "token_ids": [1]}
    lines = {
        "unknown": ({**line, "document": "contxt.npy"}, "no document 'contxt.npy' in .*; the closest: 'context.npy'"),
        "far": ({**line, "upto": CONTEXT + 1}, f'"upto" is {CONTEXT + 1}, but document .* has {CONTEXT} tokens'),
        "vocabulary": ({**line, "token_ids": [300]}, "token id 300: the vocabulary has 300 tokens"),
        "long": ({**line, "token_ids": [1] * 8000}, "more than the 8192 positions"),
    }
    if comm.rank == 0:
        save_context(folder)
        save_llama(folder / "other", 1)
        for name, (content, _) in lines.items():
            (folder / f"{name}.jsonl").write_text(json.dumps(content))
    comm.Barrier()
    prefill = ["prefill", "--quiet", "--input", f"{folder}/context.npy", "--model", f"{folder}/model", "--output"]
    assert call([*prefill, f"{folder}/run"], capsys)[0] == 0
    assert call(["score", *prefill[1:], f"{folder}/bare"], capsys)[0] == 0
    expected = [(f"{name}.jsonl", "model", "run", reason) for name, (_, reason) in lines.items()]
    expected += [
        ("lines.jsonl", "other", "run", "its model has the digest .* was made with another one"),
        ("lines.jsonl", "model", "bare", r"keeps no keys and values \(it was made by `cpmpi score`\)"),
        ("lines.jsonl", "model", "absent", "no run here"),
    ]
    for file, model, run, reason in expected:
        words = ["--input", f"{folder}/{file}", "--model", f"{folder}/{model}", "--run", f"{folder}/{run}"]
        status, told = call(["extend", "--quiet", *words, "--output", f"{folder}/out"], capsys)
        assert status == 1, (file, model, run)
        if comm.rank == 0:
            assert re.match(f"error: .*{reason}", told), told
            assert told.count("\n") == 1
            assert not (folder / "out").exists()
    words = ["--input", f"{folder}/lines.jsonl", "--model", f"{folder}/model", "--run", f"{folder}/run/run.h5"]
    status, told = call(["extend", "--quiet", *words, "--output", f"{folder}/run", "--overwrite"], capsys)
    assert status == 1  # whatever name the stored run goes by, it is not deleted
    if comm.rank == 0:
        assert re.match("error: --output .* is the run with the stored documents", told), told
        assert (folder / "run" / "run.h5").exists()
    words = ["generate", "--quiet", "--model", f"{folder}/model", "--run", f"{folder}/run", "--prompt", "x"]
    for more, reason in ((["--top-p", "2"], "--top-p 2.0: must be above 0 and at most 1"), ([], "no tokenizer there")):
        status, told = call([*words, *more], capsys)
        assert status == 1
        if comm.rank == 0:
            assert f"error: {reason}" in told or reason in told


@pytest.mark.mpi(2)
def test_an_answer_in_text_is_that_of_transformers(tmp_path):
    """The demo's checkpoint with its tokenizer, from Python: greedy, to a stop text, and the same after two prompts."""
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cpmpi

    from .test_continuations import CHECKPOINT

    folder = shared_folder(tmp_path)
    text = "class Decimal:\n    def __init__(self, value):\n        self.value = value\n"
    if MPI.COMM_WORLD.rank == 0:
        (folder / "text.txt").write_text(text)
    MPI.COMM_WORLD.Barrier()
    cpmpi.prefill(model=CHECKPOINT, inputs=folder / "text.txt", output=folder / "run", kv_dtype="float32").close()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    prompt = "\n    def __repr__(self):"
    ids = tokenizer(text)["input_ids"] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = torch.tensor([ids])
    made = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(made[0, len(ids) :], clean_up_tokenization_spaces=False)
    given = {"model": CHECKPOINT, "run": folder / "run", "max_new_tokens": 24}
    assert cpmpi.generate(**given, prompts=prompt) == [expected]
    assert cpmpi.generate(**given, prompts=["x = ", prompt])[1] == expected
    stop = expected[5:8]
    assert cpmpi.generate(**given, prompts=prompt, stop=stop) == [expected[: expected.index(stop)]]
