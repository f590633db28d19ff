"""Scores besides log-probabilities (``--keep``), from a position on (``--from``): against one transformers process.

Tolerances: log-probabilities as in tolerances.py; entropy and variance are sums over the vocabulary of products of
these with probabilities, which add up to 1: twice their bounds. Ranks, greedy and the order of the best tokens follow
from logits that differ by some 1e-5 between the two sides: they must agree wherever no other logit is that close.
"""

from __future__ import annotations

import numpy as np
import pytest

from .test_exact import VOCABULARY, save_llama, shared_folder
from .tolerances import TOKEN

LENGTHS = (1, 2, 61, 700)
CLOSE = 5e-4
IDS = (7, 299, 0)
ALL = ("rank", "entropy", "greedy", "moments", "topk=5")


def truth_logprobs(checkpoint, ids):
    """Log-probabilities (T, V), float64, of what follows each token, by one transformers process in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.as_tensor(ids, dtype=torch.int64)[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), 1).numpy()


def check_kept(document, before, first=1):
    """All scores of a document, given the distribution (T, V) before each of its tokens (rows from ``first`` count)."""
    T, ids = document.n_tokens, document.token_ids
    assert document.first_scored == min(first, T)
    rows, p = np.arange(first, T), before[first:]
    actual = p[np.arange(len(rows)), ids[first:]]
    assert np.abs(document.logprobs[first:] - actual).max(initial=0) <= TOKEN
    assert np.isnan(document.logprobs[:first]).all()
    apart = np.abs(p - actual[:, None])
    apart[np.arange(len(rows)), ids[first:]] = np.inf
    sure = apart.min(1, initial=np.inf) > CLOSE
    assert not len(rows) or sure.mean() > 0.5
    kept = {name: document.kept(name) for name in ("rank", "entropy", "greedy", "moments", "topk", "ids")}
    assert kept["rank"].dtype == np.int32
    expected = 1 + (p > actual[:, None]).sum(1)
    np.testing.assert_array_equal(kept["rank"][first:][sure], expected[sure])
    assert kept["greedy"].dtype == np.bool_
    np.testing.assert_array_equal(kept["greedy"][first:][sure], (expected == 1)[sure])
    entropy = -(np.exp(p) * p).sum(1)
    variance = (np.exp(p) * (p + entropy[:, None]) ** 2).sum(1)
    assert np.abs(kept["entropy"][first:] - entropy).max(initial=0) <= 2 * TOKEN
    np.testing.assert_array_equal(kept["moments"][:, 0], kept["entropy"])
    assert np.abs(kept["moments"][first:, 1] - variance).max(initial=0) <= 2 * TOKEN * 10
    best, values = kept["topk"]
    assert (best.dtype, best.shape, values.dtype, values.shape) == (np.int32, (T, 5), np.float32, (T, 5))
    ordered = np.sort(p, 1)[:, ::-1][:, :6]
    assert np.abs(values[first:] - ordered[:, :5]).max(initial=0) <= TOKEN
    sure = (-np.diff(ordered, axis=1)).min(1, initial=np.inf) > CLOSE
    np.testing.assert_array_equal(best[first:][sure], np.argsort(-p, 1)[:, :5][sure])
    given, values = kept["ids"]
    assert given.tolist() == list(IDS)
    assert np.abs(values[first:] - p[:, list(IDS)]).max(initial=0) <= TOKEN
    for name, nothing in (("rank", -1), ("greedy", False)):
        assert (kept[name][:first] == nothing).all()
    assert np.isnan(kept["entropy"][:first]).all()
    assert (best[:first] == -1).all()


def shifted(logprobs):
    """From what follows each token to what is before each, the first without anything."""
    return np.concatenate([np.full((1, logprobs.shape[1]), np.nan), logprobs[:-1]])


def prepare(folder):
    save_llama(folder / "model", 2)
    (folder / "documents").mkdir()
    for length in LENGTHS:
        np.save(
            folder / "documents" / f"{length:03d}.npy", np.random.default_rng(length).integers(0, VOCABULARY, length)
        )
    (folder / "ids.txt").write_text(", ".join(map(str, IDS)))


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 2, 3)])
def test_kept_scores_are_those_of_transformers(ranks, tmp_path, monkeypatch):
    """All of them, on several ranks, sharing weights on two, written a few rows at a time."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine import outputs
    from cpmpi.run.verify import verify_run

    monkeypatch.setattr(outputs, "PORTION_BYTES", 1000)
    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        prepare(folder)
    comm.Barrier()
    keep = (*ALL, f"ids={folder}/ids.txt")
    given = {"model": folder / "model", "inputs": folder / "documents", "chunk_tokens": 100, "keep": keep}
    cpmpi.score(**given, output=folder / "run", tp=2 if ranks == 2 else 1).close()
    given["inputs"] = folder / "documents" / "700.npy"
    cpmpi.prefill(**given, output=folder / "late", from_position=333, segments=3).close()
    cpmpi.score(**{**given, "keep": ()}, output=folder / "plain", tp=2 if ranks == 2 else 1).close()
    if comm.rank:
        return
    with cpmpi.open_run(folder / "run") as run, cpmpi.open_run(folder / "plain") as plain:
        assert run.scoring.keep.startswith("entropy greedy ids=")
        for document in run.documents:
            check_kept(document, shifted(truth_logprobs(folder / "model", document.token_ids)))
        assert plain.documents[0].kept_names == ()
        np.testing.assert_array_equal(run.documents[-1].logprobs, plain.documents[0].logprobs)
        whole = run.documents[-1].logprobs
    with cpmpi.open_run(folder / "late") as run:
        document = run.documents[0]
        check_kept(document, shifted(truth_logprobs(folder / "model", document.token_ids)), first=333)
        assert document.nll == pytest.approx(-whole[333:].sum(dtype=np.float64), rel=1e-5)
        assert document.perplexity == pytest.approx(np.exp(document.nll / (700 - 333)), rel=1e-12)
    for name in ("run", "late", "plain"):
        assert verify_run(folder / name).problems == []
