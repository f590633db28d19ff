"""Texts in memory, on a model that is loaded once, have the scores and answers of one transformers process.

Bounds: tests/tolerances.py; sums of n tokens within ``of_a_sum(n)``.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.families import FAMILIES
from tests.test_exact import shared_folder
from tests.test_extend import scratch
from tests.tiny_models import save_tiny, tiny_config
from tests.tolerances import of_a_sum

DEMO = ROOT / "examples" / "demo" / "checkpoint"
# Tokens of a stem and of its answers: a single token, several, one that all ranks compute together, and that as a stem.
SIZES = ((9, (1, 1, 4)), (1, (3,)), (1, (1,)), (40, (700,)), (1, (1300,)), (800, (2, 1)), (5, (1, 30)))


def make_questions(vocabulary, sizes=SIZES):
    from cpmpi.engine.extend import Question

    def ids_of(n, seed):
        return np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.int64)

    return [
        Question(ids_of(stem, q), tuple(ids_of(n, 100 * q + i + 7) for i, n in enumerate(answers)))
        for q, (stem, answers) in enumerate(sizes)
    ]


def open_session(folder, **options):
    from cpmpi.comm.ranks import start
    from cpmpi.engine.options import ModelOptions
    from cpmpi.engine.session import Session

    return Session(ModelOptions.of(model=folder, quiet=True, device="cpu", **options), start())


def plain(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def totals_of(session, questions):
    """What the session says of every answer, on rank 0, and how many questions were in each batch."""
    from cpmpi.engine.session import longest_of

    session.expect(max(map(longest_of, questions)))
    found, batches = {}, list(session.batches(questions))
    for batch in batches:
        totals = session.score([question for _, question in batch])
        for (place, answer), total in (totals or {}).items():
            found[batch[place][0], answer] = total
    return found, list(map(len, batches))


def check(folder, questions, found):
    model = plain(folder)
    wanted = [(q, i) for q, question in enumerate(questions) for i in range(len(question.answers))]
    assert sorted(found) == wanted
    for q, i in wanted:
        answer = questions[q].answers[i]
        logprobs, greedy = scratch(model, answer[:0], questions[q].stem, answer)
        total = found[q, i]
        assert abs(total.logprob - logprobs.astype(np.float64).sum()) <= of_a_sum(len(answer)), (q, i)
        assert total.greedy == greedy.all(), (q, i)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.mpi(2)
def test_scores_equal_one_transformers_process(tp, monkeypatch):
    from cpmpi.engine import session as module

    session = open_session(DEMO, tp=tp, chunk_tokens=64)
    assert session.holders == 2 // tp
    questions = make_questions(session.checkpoint.vocab_size)
    best = int(plain(DEMO)(input_ids=_batch(questions[0].stem)).logits[0, -1].argmax())  # one that is greedy
    questions[0] = questions[0]._replace(answers=(*questions[0].answers, np.array([best])))
    dealt, judge = [], module.judge
    monkeypatch.setattr(
        module, "judge", lambda make, question, joint: dealt.append(joint) or judge(make, question, joint)
    )
    found, batches = totals_of(session, questions)
    assert batches == [len(questions)]
    assert bool(dealt) == (tp == 1)  # with both ranks in one group there is nobody to deal to
    if session.ranks.is_root:
        assert found[0, 3].greedy
        check(DEMO, questions, found)
    else:
        assert not found
    session.close()


def _batch(ids):
    import torch

    return torch.from_numpy(ids)[None]


@pytest.mark.mpi(2)
def test_texts_that_are_long_for_one_rank_are_dealt_and_weights_are_read_once(monkeypatch):
    from cpmpi.engine import session as module

    monkeypatch.setattr(module, "BATCH_TOKENS", 300)
    loads = []
    load = module.load_engine
    monkeypatch.setattr(module, "load_engine", lambda job: loads.append(1) or load(job))
    session = open_session(DEMO, chunk_tokens=64, attention="tree")
    for sizes in (((1, (350,)),), SIZES):
        questions = make_questions(session.checkpoint.vocab_size, sizes)
        found, _ = totals_of(session, questions)
        if session.ranks.is_root:
            check(DEMO, questions, found)
    assert loads == [1]
    session.close()


@pytest.mark.mpi(2)
def test_texts_with_other_rotary_embeddings_are_not_computed_together(tmp_path):
    """LongRoPE changes with the 65th token here: transformers looks at the longest of a batch, and so do we."""
    folder = shared_folder(tmp_path)
    session = None
    family = next(f for f in FAMILIES if f.name == "Phi-3")
    if _rank() == 0:
        save_tiny(folder, tiny_config(family.model_type, **family.own))
    _barrier()
    session = open_session(folder)
    assert session.by_length
    questions = make_questions(session.checkpoint.vocab_size, ((10, (3,)), (60, (40,)), (50, (14, 14)), (50, (15,))))
    found, batches = totals_of(session, questions)
    assert batches == [1, 3]  # 99 tokens go through the model; then 64 and less
    if session.ranks.is_root:
        model = plain(folder)
        for (q, i), total in found.items():
            stem, answer = questions[q].stem, questions[q].answers[i]
            assert abs(total.logprob - fed(model, stem, answer)) <= of_a_sum(len(answer)), (q, i)
    session.close()


def fed(model, stem, answer):
    """The answer's log-probability where its last token does not go through the model, as the harness has it."""
    import torch

    ids_T = torch.from_numpy(np.concatenate([stem, answer]))
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_T[None, :-1], use_cache=False).logits[0].double()
    targets = ids_T[-len(answer) :, None]
    return float(torch.log_softmax(logits_TV[-len(answer) :], -1).gather(1, targets).sum())


def _rank():
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank


def _barrier():
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.mpi(2)
def test_answers_equal_transformers_generate(tp):
    import torch

    session = open_session(DEMO, tp=tp, chunk_tokens=16)
    prompts = [
        np.array(session.tokenizer(text)["input_ids"], np.int64)
        for text in ("import sys\n", "class A:\n    def f(self", "def __add__(self, other):\n    " * 9)
    ]
    session.expect(max(map(len, prompts)) + 11, kept=200)
    found = session.generate(prompts, 12, ())
    model = plain(DEMO)
    for prompt, ids in zip(prompts, found, strict=True):
        ids_T = torch.from_numpy(prompt)
        whole = model.generate(ids_T[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        assert ids == whole[len(prompt) :].tolist()
    text = session.tokenizer.decode(found[2])
    stopped = session.generate([prompts[2]], 12, (text[3:5],))[0]
    assert text[3:5] in session.tokenizer.decode(stopped)
    assert len(stopped) < 12
    assert found[2][: len(stopped)] == stopped
    session.close()


@pytest.mark.mpi(2)
def test_ranks_follow_until_they_are_let_go():
    from cpmpi.comm.following import Following
    from cpmpi.comm.ranks import AgreedError, start

    ranks = start()

    class Worker:
        def add(self, a, b):
            return sum(ranks.allgather(a + b))

        def refuse(self):
            return ranks.together(self._bad)

        def _bad(self):
            from cpmpi.errors import UserError

            if not ranks.is_root:
                raise UserError("no")

    lead = Following(ranks, Worker())
    if ranks.is_root:
        assert lead.call("add", 1, 2) == 6
        assert lead.call("add", 2, 2) == 8
        lead.end("it was enough")
        lead.end()
    else:
        assert lead.follow() == "it was enough"
    lead = Following(ranks, Worker())
    with pytest.raises(AgreedError, match="rank 1/2: no"):
        lead.call("refuse") if ranks.is_root else lead.follow()
    lead.end("nobody hears it")
    assert not lead.broken
