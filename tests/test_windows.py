"""Documents in windows (``--context``) equal one transformers process on each window; see tolerances.py."""

from __future__ import annotations

import numpy as np
import pytest

from .test_exact import VOCABULARY, save_llama, shared_folder
from .test_keep import truth_logprobs
from .tolerances import TOKEN

LENGTHS = (1, 5, 41, 130)
PREFIX = 7


def expected_logprobs(checkpoint, ids, context, stride, first=1):
    """Log-probabilities (T,) by the rule of transformers' guide to the perplexity of fixed-length models: windows of
    context + 1 tokens of which the last is only a target, and in each the targets that no earlier one had."""
    found, before = np.full(len(ids), np.nan), 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context + 1, len(ids))
        targets = range(before, end)
        if len(targets):
            logprobs = truth_logprobs(checkpoint, ids[begin : begin + context])
            found[before:end] = [logprobs[i - 1 - begin, ids[i]] for i in targets]
        before = end
        if end == len(ids):
            break
    found[:first] = np.nan
    return found


@pytest.mark.mpi(2)
def test_windows_are_those_of_transformers(tmp_path):
    """Strides of all kinds, with a prefix token, from a position on, with weights shared and kept scores."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.run.verify import verify_run

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    checkpoint = folder / "model"
    if comm.rank == 0:
        save_llama(checkpoint, 2)
        (folder / "documents").mkdir()
        for length in LENGTHS:
            ids = np.random.default_rng(length).integers(0, VOCABULARY, length)
            np.save(folder / "documents" / f"{length:03d}.npy", ids)
    comm.Barrier()
    given = {"model": checkpoint, "inputs": folder / "documents", "chunk_tokens": 16}
    cases = {
        "half": {"context": 40},
        "disjoint": {"context": 40, "stride": 40, "tp": 2, "keep": ("rank", "topk=3")},
        "uneven": {"context": 33, "stride": 7, "weights": "stream"},
        "late": {"context": 12, "inputs": folder / "documents" / "130.npy", "from_position": 90, "segments": 3},
        "prefix": {"context": 30, "stride": 29, "prefix_token": PREFIX, "keep": ("entropy",)},
        "wide": {"context": 500},
    }
    for name, own in cases.items():
        cpmpi.score(**{**given, **own}, output=folder / name).close()
    with pytest.raises(cpmpi.UserError, match="holds a run with stride 20, this one has 10; choose another"):
        cpmpi.score(**given, output=folder / "half", context=40, stride=10)
    with pytest.raises(cpmpi.UserError, match="holds a run with context 40, this one has 0; choose another"):
        cpmpi.score(**given, output=folder / "half")
    if comm.rank:
        return
    for name, own in cases.items():
        context, stride = own["context"], own.get("stride", own["context"] // 2)
        assert verify_run(folder / name).problems == []
        with cpmpi.open_run(folder / name) as run:
            assert (run.scoring.context, run.scoring.stride) == (context, stride)
            for document in run.documents:
                ids, prefix = document.token_ids, int("prefix_token" in own)
                whole = np.concatenate([[PREFIX], ids])[1 - prefix :]
                first = own.get("from_position", 0) or 1
                expected = expected_logprobs(checkpoint, whole, context, stride, first)[prefix:]
                np.testing.assert_array_equal(np.isnan(document.logprobs), np.isnan(expected))
                known = ~np.isnan(expected)
                assert np.abs(document.logprobs - expected)[known].max(initial=0) <= TOKEN
                assert document.nll == pytest.approx(-expected[known].sum(), abs=1e-2)
                check_kept(document, known)
    with cpmpi.open_run(folder / "wide") as wide, cpmpi.open_run(folder / "half") as half:
        np.testing.assert_allclose(wide.documents[-1].logprobs[:41], half.documents[-1].logprobs[:41], atol=TOKEN)
        assert np.abs(wide.documents[-1].logprobs - half.documents[-1].logprobs)[41:].max() > 0.01


def check_kept(document, known):
    """What is kept belongs to the same windows as the log-probabilities."""
    if "topk" in document.kept_names:
        ids_TK, logprobs_TK = document.kept("topk")
        first = known & (ids_TK[:, 0] == document.token_ids)
        np.testing.assert_allclose(logprobs_TK[first, 0], document.logprobs[first], atol=1e-5)
        np.testing.assert_array_equal(document.kept("rank")[known] == 1, first[known])
        assert first.sum() == (document.kept("rank") == 1).sum()
    if "entropy" in document.kept_names:
        np.testing.assert_array_equal(np.isnan(document.kept("entropy")), ~known)


def test_every_token_is_scored_once_after_as_many_tokens_as_promised():
    from cpmpi.engine.windows import windows_of
    from cpmpi.run.spec import Scoring

    for n_tokens in (1, 2, 3, 17, 40):
        for context in range(1, 12):
            for stride in range(1, context + 1):
                for first in (1, 5):
                    scoring = Scoring(scored_from=first, context=context, stride=stride)
                    windows, scored = [*windows_of(n_tokens, scoring)], []
                    for window in windows:
                        assert 1 <= window.size <= context
                        assert window.start % stride == 0
                        for token in range(window.first, min(window.stop + 1, n_tokens)):
                            assert (
                                token - window.start == min(token, context) or token - window.start > context - stride
                            )
                            scored.append(token)
                    assert scored == [*range(first, n_tokens)]
                    assert windows[-1].stop == n_tokens


@pytest.mark.parametrize(("own", "words"), [
    ({"stride": 5}, "--stride 5: of the windows of --context, which is not given"),
    ({"context": 4, "stride": 5}, "--stride 5: more than --context 4: tokens between windows"),
    ({"context": 9000}, r"--context 9000: .*made for 8192 positions .*; --allow-longer"),
    ({"context": 40, "checkpoint": "5"}, "--checkpoint 5: a document in windows .* choose auto or off"),
    ({"context": 40, "keep_kv": True}, "--context 40: only with `cpmpi score`"),
    ({"context": 0}, "--context must be at least 1, not 0"),
])  # fmt: skip
def test_windows_that_cannot_be(own, words):
    from cpmpi.engine.keeping import check_windows
    from cpmpi.engine.options import JobOptions
    from cpmpi.errors import UserError

    with pytest.raises(UserError, match=words):
        check_windows(JobOptions.of(**{"model": "m", "inputs": "d", "output": "r", "keep_kv": False, **own}), 8192)
