"""What follows a stored document in models of every kind: windows, chunks, sinks, soft caps, latent attention.

The truth is one transformers process, with its own plain attention, on document and continuation from scratch.
Tolerances: see ``tolerances.py``; keys and values are stored in float32, so that both sides differ in the order of sums
only.
"""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest

from tests.families import FAMILIES
from tests.test_exact import shared_folder
from tests.test_models import GOES_ON
from tests.tiny_models import VOCABULARY, save_tiny, tiny_config
from tests.tolerances import TOKEN, of_a_sum

CONTEXT, EARLY = 75, 29  # the window is 24, a chunk of Llama 4 has 32
STEM, ANSWERS, ALONE, PREFIX = 7, (4, 30, 1), 40, 2
PROMPTS, NEW = (26, 3), 9
SCHEDULES = ("tree", "ring", "hybrid")
FAMILY = {family.name: family for family in FAMILIES}
LENGTH_DEPENDENT = ("Llama, dynamic NTK",)  # of stored keys; LongRoPE's change once, and not here


def ids_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, n)


def words(ids) -> str:
    """Token ids as text for the tokenizer of ``save_words``."""
    return " ".join(f"t{i}" for i in ids)


def save_words(folder) -> None:
    """A tokenizer of which token i is the word ``t``i."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def prepare(folder, family, seed) -> None:
    """The checkpoint of a family, a document, and what may follow it."""
    save_tiny(folder / "model", tiny_config(family.model_type, **family.own), seed=seed)
    save_words(folder / "model")
    np.save(folder / "context.npy", ids_of(CONTEXT, 1))
    lines = [
        {"document": "context.npy", "id": "q", "text": words(ids_of(STEM, 2)), "choices": [
            ids_of(n, 10 + n).tolist() for n in ANSWERS
        ]},
        {"document": "context.npy", "id": "alone", "token_ids": ids_of(ALONE, 3).tolist()},
        {"document": "context.npy", "id": "early", "token_ids": ids_of(ALONE, 4).tolist(), "upto": EARLY},
    ]  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def before_and_after(context) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each continuation, what comes before it and its own tokens."""
    asked = np.concatenate([context, ids_of(STEM, 2)])
    return {
        **{f"q/{i}": (asked, ids_of(n, 10 + n)) for i, n in enumerate(ANSWERS)},
        "alone": (context, ids_of(ALONE, 3)),
        "early": (context[:EARLY], ids_of(ALONE, 4)),
    }


class Truth:
    """One transformers process that computes everything from scratch, without any cache."""

    def __init__(self, folder) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()

    def logits(self, ids):
        ids_1T = self._torch.from_numpy(np.asarray(ids, np.int64))[None]
        with self._torch.inference_mode():
            return self._model(input_ids=ids_1T, use_cache=False).logits[0].float()

    def score(self, before, after) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the tokens after, and whether each is the most probable one."""
        logits_TV = self.logits(np.concatenate([before, after]))[len(before) - 1 : -1]
        targets = self._torch.from_numpy(after.astype(np.int64))
        found = self._torch.log_softmax(logits_TV, -1).gather(1, targets[:, None])[:, 0]
        return found.numpy(), (logits_TV.argmax(1) == targets).numpy()

    def greedy(self, ids, n: int):
        ids, start, end = list(ids), len(ids), self._model.generation_config.eos_token_id
        while len(ids) < start + n:
            token = int(self.logits(ids)[-1].argmax())
            if token in np.atleast_1d([] if end is None else end):
                break
            ids.append(token)
        return ids[start:]


@contextmanager
def ranks_are(comm):
    """Within it jobs of this process run on the ranks of ``comm``."""
    from transformers import PreTrainedTokenizerFast

    from cpmpi.comm.ranks import Ranks
    from cpmpi.documents import continuations as lines
    from cpmpi.engine import continuations, generate, run

    with pytest.MonkeyPatch.context() as patch:
        for module in (continuations, generate, run):
            patch.setattr(module, "start", lambda: Ranks(comm))
        for module in (lines, continuations, generate):  # for some models transformers takes another class than saved
            patch.setattr(module, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
        yield


def check_scores(run, truth, context, *what) -> None:
    from cpmpi.run.scores import read_scores

    expected = before_and_after(context)
    assert [d.id for d in run.documents][: len(expected)] == [*expected]
    for name, (before, after) in expected.items():
        logprobs, greedy = truth.score(before, after)
        document = run.documents[name]
        error = np.abs(document.logprobs - logprobs)
        assert error.max() <= TOKEN, (*what, name, error.max())
        assert error.sum() <= of_a_sum(len(after)), (*what, name)
        assert (document.greedy == greedy).all(), (*what, name)
    for row in read_scores(run.paths.scores):
        if not np.isnan(row.unconditional):
            total = float(truth.score(ids_of(PREFIX, 9), expected[row.id][1])[0].sum())
            assert abs(row.unconditional - total) <= of_a_sum(row.n_tokens), (*what, row.id)
            assert row.mutual_info == row.logprob - row.unconditional


def check_family(comm, folder, family, seed, attention, **extending) -> None:
    """Prefill, extend and generate on the ranks of ``comm``, and compare with transformers on its first."""
    import cpmpi

    if comm.rank == 0:
        folder.mkdir()
        prepare(folder, family, seed)
    comm.Barrier()
    given = {"model": folder / "model", "attention": attention, "chunk_tokens": 16, "allow_longer": True}
    prompts = [words(ids_of(n, n)) for n in PROMPTS]
    with ranks_are(comm):
        cpmpi.prefill(**given, inputs=folder / "context.npy", output=folder / "run", kv_dtype="float32").close()
        given["run"] = folder / "run"
        scored = cpmpi.extend(
            **given, inputs=folder / "lines.jsonl", output=folder / "scores", unconditional=words(ids_of(PREFIX, 9)),
            **extending,
        )  # fmt: skip
        answers = cpmpi.generate(**given, prompts=prompts, max_new_tokens=NEW)
    if comm.rank == 0:
        truth, context = Truth(folder / "model"), ids_of(CONTEXT, 1)
        check_scores(scored, truth, context, family.name, comm.size, attention)
        for n, answer in zip(PROMPTS, answers, strict=True):
            expected = truth.greedy([*context, *ids_of(n, n)], NEW)
            assert answer == words(expected), (family.name, comm.size, attention, n)
    scored.close()
    comm.Barrier()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 2, 4, 5)])
def test_special_attention_goes_on_as_from_scratch(ranks, tmp_path):
    from mpi4py import MPI

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    for i, name in enumerate(GOES_ON):
        check_family(comm, folder / f"{i}", FAMILY[name], i, SCHEDULES[(i + ranks) % 3], kv=("memory", "mapped")[i % 2])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.mpi(3)
def test_every_family_goes_on_as_from_scratch(part, tmp_path):
    from mpi4py import MPI

    from cpmpi.errors import UserError

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    for i, family in list(enumerate(FAMILIES))[part::3]:
        if family.name not in LENGTH_DEPENDENT:
            check_family(comm, folder / f"{i}", family, i, SCHEDULES[i % 3])
            continue
        with pytest.raises(UserError, match="rotary embeddings of this model depend on the document's length"):
            check_family(comm, folder / f"{i}", family, i, "tree")
        comm.Barrier()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 4"])
@pytest.mark.mpi(5)
def test_what_any_number_of_ranks_stored_goes_on_on_any_other(name, tmp_path):
    """1, 2, 3 and 5 ranks store a document, 1, 2, 3 and 5 go on; windows and sinks, and layers of several shapes."""
    from mpi4py import MPI

    import cpmpi

    world, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    sizes = (1, 2, 3, 5)
    comms = {n: world.Split(0 if world.rank < n else MPI.UNDEFINED) for n in sizes}
    here = folder / "family"
    if world.rank == 0:
        here.mkdir()
        prepare(here, FAMILY[name], 0)
        truth = Truth(here / "model")
    world.Barrier()
    given = {"model": here / "model", "chunk_tokens": 16, "segments": 3}
    for writers in sizes:
        if world.rank < writers:
            with ranks_are(comms[writers]):
                cpmpi.prefill(
                    **given, inputs=here / "context.npy", output=here / f"run{writers}", kv_dtype="float32"
                ).close()
        world.Barrier()
        for readers in sizes:
            if world.rank < readers:
                given["run"], output = here / f"run{writers}", here / f"scores-{writers}-{readers}"
                kind = SCHEDULES[(writers + readers) % 3]
                with ranks_are(comms[readers]):
                    scored = cpmpi.extend(**given, inputs=here / "lines.jsonl", output=output, attention=kind)
                if world.rank == 0:
                    check_scores(scored, truth, ids_of(CONTEXT, 1), name, writers, readers, kind)
                scored.close()
                del given["run"]
            world.Barrier()
