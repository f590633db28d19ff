"""``cpmpi compare``: what it says of two runs, against plain loops over their tokens; and what it refuses."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cpmpi
from cpmpi.attention.layout import Layout
from cpmpi.jobs.compare import COLUMNS, command
from cpmpi.run.divergence import divergence
from cpmpi.run.extras import Extra
from cpmpi.run.folder import start_index
from cpmpi.run.kept import kept_extras
from cpmpi.run.paired import MOST_BLOCKS, block_length, over_blocks, over_documents
from cpmpi.run.spec import PLAIN, DocumentSpec, token_digest

from .conftest import ROOT
from .runs import HIDDEN, make_spec

DEMO = ROOT / "examples" / "demo" / "checkpoint"
LENGTHS = {"a": 300, "b": 2, "c": 70}
K, VOCABULARY = 4, 40


def logprobs_of(name: str, seed: int, first: int = 1) -> np.ndarray:
    length = LENGTHS.get(name, 50)
    found = -np.random.default_rng([seed, *name.encode()]).exponential(2.0, length).astype(np.float32)
    found[:first] = np.nan
    return found


def ids_of(name: str) -> np.ndarray:
    return np.random.default_rng([*name.encode()]).integers(0, 1000, LENGTHS.get(name, 50), dtype=np.int32)


def best_of(name: str, seed: int, k: int = K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A distribution (T, V) for each token, and its best ids and log-probabilities, nothing for the first."""
    random = np.random.default_rng([9, *name.encode()])
    logits = random.standard_normal((LENGTHS[name], VOCABULARY)) * 2  # the same for all seeds, but for noise
    logits += np.random.default_rng([seed, 9]).standard_normal(logits.shape) * 0.3
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logp, axis=1)[:, :k].astype("<i4")
    best = np.take_along_axis(logp, ids, 1).astype("<f4")
    ids[0], best[0] = -1, np.nan
    return logp, ids, best


def save_run(folder: Path, seed: int, names=("a", "b", "c"), *, top_k=0, spans=False, first=1, leave=(), tokens=None,
             **changes) -> Path:  # fmt: skip
    """A run of documents with these names, whose log-probabilities depend on the seed."""
    tokens = {name: ids_of(name) for name in names} | (tokens or {})
    documents, extras = [], {}
    for name in names:
        n, datasets = len(tokens[name]), {}
        kinds: list[Extra] = []
        if top_k:
            kinds += kept_extras(n, {"topk_ids": top_k, "topk_logprobs": top_k})
            _, datasets["kept/topk_ids"], datasets["kept/topk_logprobs"] = best_of(name, seed, top_k)
        if spans:
            bounds = [0, *range(7, n, 11), n]
            sums = [np.nansum(logprobs_of(name, seed)[a:b].astype("f8")) for a, b in pairwise(bounds)]
            counts = [b - max(1, a) for a, b in pairwise(bounds)]
            pairs = np.array([*pairwise(bounds)], "<i4")
            spanned = {"characters": pairs, "bytes": pairs, "n_tokens": np.array(counts, "<i4"),
                       "logprob": np.array(sums, "<f8")}  # fmt: skip
            datasets |= {f"spans/{what}": array for what, array in spanned.items()}
            kinds += [
                Extra(name=f"spans/{what}", shape=array.shape, labels=("span", "bound")[: array.ndim],
                      dtype=array.dtype.str, units="", definition="")
                for what, array in spanned.items()
            ]  # fmt: skip
        documents.append(
            DocumentSpec(id=name, source=name, n_tokens=n, layout=Layout(n_tokens=n, world=1, segments=1),
                         token_ids_sha256=token_digest(tokens[name]), extras=tuple(kinds))
        )  # fmt: skip
        extras[name] = datasets
    scoring = replace(PLAIN, scored_from=first if first > 1 else 0)
    spec = make_spec(kv=None, world=1, documents=tuple(documents), scoring=scoring, **changes)
    index = start_index(folder, spec)
    for i, name in enumerate(names):
        if name not in leave:
            logprobs = logprobs_of(name, seed, first)[: len(tokens[name])]
            index.write_outputs(
                i, token_ids=tokens[name], logprobs=logprobs, last_hidden=np.zeros(HIDDEN), extras=extras[name]
            )
    if not leave:
        index.finish()
    return folder


def opened(*folders):
    return [cpmpi.open_run(folder) for folder in folders]


def test_every_number_is_its_definition(tmp_path):
    a, b = opened(
        save_run(tmp_path / "a", 1, spans=True), save_run(tmp_path / "b", 2, ("c", "b", "a"), spans=True)
    )  # fmt: skip
    found = cpmpi.compare(a, b, most=5, passage=8)
    differences = {name: (logprobs_of(name, 1).astype("f8") - logprobs_of(name, 2))[1:] for name in LENGTHS}
    everything = np.concatenate(list(differences.values()))
    assert [one.document for one in found.documents] == ["a", "b", "c"]
    for one in found.documents:
        mine = differences[one.document]
        assert one.change.n_tokens == len(mine)
        assert one.change.difference == pytest.approx(mine.mean(), rel=1e-9)
        assert one.change.nll_a == pytest.approx(a.documents[one.document].nll / len(mine), rel=1e-9)
        assert one.change.nll_b == pytest.approx(b.documents[one.document].nll / len(mine), rel=1e-9)
        low, high = one.change.interval
        assert math.isnan(low) if len(mine) == 1 else low < one.change.difference < high
        np.testing.assert_allclose((low, high), over_blocks(mine, 0), rtol=1e-9)
    assert found.corpus.change.n_tokens == len(everything)
    assert found.corpus.change.difference == pytest.approx(everything.mean(), rel=1e-9)
    assert (found.block, found.corpus.divergence) == (0, None)
    assert [(one.start, one.stop) for one in found.positions][:3] == [(1, 2), (2, 4), (4, 8)]
    assert found.positions[-1].stop == 512
    for one in found.positions:
        inside = [d[max(0, one.start - 1) : one.stop - 1] for d in differences.values()]
        assert one.change.n_tokens == sum(map(len, inside))
        assert one.change.difference == pytest.approx(np.concatenate(inside).mean(), rel=1e-9)
        assert math.isnan(one.change.interval.low) == (sum(len(part) > 0 for part in inside) < 2)
    check_most_different(found, differences)
    assert len(found.spans) == sum(-(-(length - 7) // 11) + 1 for length in (300, 70)) + 1
    for one in found.spans:
        inside = differences[one.document][max(0, one.start - 1) : one.stop - 1]
        assert one.change.n_tokens == len(inside)
        assert one.change.difference == pytest.approx(inside.mean(), rel=1e-6, abs=1e-9)


def check_most_different(found, differences):
    """Tokens and passages of eight tokens in order of their sums, passages apart from each other."""
    ordered = sorted((-abs(d), name, i + 1) for name, values in differences.items() for i, d in enumerate(values))
    assert [(one.document, one.start) for one in found.tokens] == [(name, i) for _, name, i in ordered[:5]]
    sums = {name: np.convolve(values, np.ones(min(8, len(values))), "valid") for name, values in differences.items()}
    assert len(found.passages) == 5
    taken: set[tuple[str, int]] = set()
    for one in found.passages:
        left = max(
            abs(total) for name, values in sums.items() for i, total in enumerate(values)
            if not any((name, i + 1 + k) in taken for k in range(8))
        )  # fmt: skip
        assert abs(one.change.difference) * 8 == pytest.approx(left, rel=1e-9)
        assert one.change.n_tokens == one.stop - one.start == 8
        inside = differences[one.document][one.start - 1 : one.stop - 1]
        assert one.change.difference == pytest.approx(inside.mean(), rel=1e-9)
        taken |= {(one.document, i) for i in range(one.start, one.stop)}


def test_only_what_both_have_scored_is_compared(tmp_path):
    a, b = opened(save_run(tmp_path / "a", 1, ["a"], first=120), save_run(tmp_path / "b", 2, ["a"]))
    found = cpmpi.compare(a, b)
    mine = (logprobs_of("a", 1).astype("f8") - logprobs_of("a", 2))[120:]
    assert found.corpus.change.n_tokens == 180
    assert found.corpus.change.difference == pytest.approx(mine.mean(), rel=1e-9)
    assert (found.documents[0].start, found.documents[0].stop) == (120, 300)
    assert [one.change.n_tokens for one in found.positions] == [8, 128, 44]
    for one, (x, y) in zip(found.positions, ((120, 128), (128, 256), (256, 300)), strict=True):
        assert one.change.difference == pytest.approx(mine[x - 120 : y - 120].mean(), rel=1e-9)
        assert one.change.interval == over_blocks(mine[x - 120 : y - 120], 0)
    assert found.block == block_length(mine) > 0
    assert found.corpus.change.interval == over_blocks(mine, 0)
    same = cpmpi.compare(a, a)
    assert same.corpus.change.difference == 0
    assert same.corpus.change.sign == 0


def test_the_divergence_of_best_tokens_is_bounded_by_that_of_all():
    for name in ("a", "c"):
        (p, *a), (q, *b) = best_of(name, 1), best_of(name, 2, 6)
        kl = lambda x, y: (np.exp(x) * (x - y)).sum(1)  # noqa: E731
        m = np.logaddexp(p, q) - math.log(2)
        js = (kl(p, m) + kl(q, m)) / 2
        found = divergence(*((ids[1:], best[1:]) for ids, best in (a, b)))
        assert (found.kl_ab <= kl(p, q)[1:] + 1e-5).all()
        assert (found.kl_ba <= kl(q, p)[1:] + 1e-5).all()
        assert (found.js_low <= js[1:] + 1e-5).all()
        assert (found.js_high >= js[1:] - 1e-5).all()
        assert 0.2 * kl(p, q)[1:].mean() < found.kl_ab.mean(), "the bound says something"
        assert (found.js_high - found.js_low <= math.log(2) * (2 - found.known_a - found.known_b) / 2 + 1e-5).all()
        both = np.array([sum(np.exp(p[i, list({*a[0][i]} & {*b[0][i]})])) for i in range(1, len(p))])
        np.testing.assert_allclose(found.known_a, both, atol=1e-6)
        all_a, all_b = (best_of(name, seed, VOCABULARY)[1:] for seed in (1, 2))
        whole = divergence(*((ids[1:], best[1:]) for ids, best in (all_a, all_b)))
        for value, truth in ((whole.kl_ab, kl(p, q)), (whole.kl_ba, kl(q, p)), (whole.js_low, js), (whole.js_high, js)):
            np.testing.assert_allclose(value, truth[1:], atol=1e-5)
    same = divergence((a[0][1:], a[1][1:]), (a[0][1:], a[1][1:]))
    assert max(same.kl_ab.max(), same.kl_ba.max(), same.js_low.max()) < 1e-12


def test_improbable_and_masked_tokens_keep_the_bounds_finite():
    ids, sure = np.array([[3, 5]], np.int32), np.array([[0.0, -900.0]], np.float32)
    masked, other = np.array([[0.0, -np.inf]], np.float32), np.array([[-900.0, 0.0]], np.float32)
    for best in (sure, masked):
        assert divergence((ids, best), (ids, sure)).kl_ab == pytest.approx(0, abs=1e-9)
    far = divergence((ids, sure), (ids, other))
    assert far.kl_ab == pytest.approx(900)
    assert far.js_low == pytest.approx(math.log(2), abs=1e-5)


def correlated(n, phi, seed):
    noise, found = np.random.default_rng(seed).standard_normal(n), np.zeros(n)
    for i in range(1, n):
        found[i] = phi * found[i - 1] + noise[i]
    return found


def test_blocks_are_as_long_as_the_rule_says():
    """For an autoregressive series the best length is known: (sqrt(6) phi / (1 - phi^2))^(2/3) T^(1/3)."""
    for phi in (0.5, 0.8):
        n = 40_000
        expected = (math.sqrt(6) * phi / (1 - phi**2)) ** (2 / 3) * n ** (1 / 3)
        assert block_length(correlated(n, phi, 3)) == pytest.approx(max(expected, n / MOST_BLOCKS), rel=0.3)
    assert block_length(np.random.default_rng(0).standard_normal(900)) <= 4
    assert block_length(np.full(50, 2.5)) == 1
    assert block_length(np.full(50_000, 2.5)) == 50
    assert block_length(np.array([1.0])) == block_length(np.array([1.0, 2.0])) == 1
    assert block_length(np.arange(300.0)) <= 100, "a trend is no reason for two blocks"


def test_intervals_hold_what_they_promise():
    """Of 200 correlated series with mean 0, some 95% of the intervals hold 0; drawing single tokens, far fewer."""
    series = [correlated(600, 0.6, seed) for seed in range(200)]
    holds = [np.mean([i.low <= 0 <= i.high for i in (over_blocks(s, 0, b) for s in series)]) for b in (None, 1)]
    assert holds[0] > 0.87
    assert holds[1] < 0.75
    interval = over_blocks(series[0], 0)
    assert interval == over_blocks(series[0], 0) != over_blocks(series[0], 1)
    starts = np.random.default_rng(4).integers(0, 600, (2000, 7))[..., None]  # of blocks that go on at the beginning
    means = series[1][(starts + np.arange(97)) % 600].mean((1, 2))
    np.testing.assert_allclose(over_blocks(series[1], 4, 97), np.quantile(means, (0.025, 0.975)), rtol=1e-9)
    assert all(map(math.isnan, over_blocks(np.array([1.0]), 0)))
    assert over_blocks(np.full(9, 2.0), 0) == (2.0, 2.0)


def test_documents_are_drawn_whole_and_weigh_by_their_tokens():
    random = np.random.default_rng(5)
    counts, means = random.integers(1, 400, 60).astype(float), random.standard_normal(60)
    sums = counts * means
    (low, high), nothing = over_documents(
        np.column_stack([sums, np.eye(60)[0]]), np.column_stack([counts, np.eye(60)[0]]), 0
    )  # fmt: skip
    drawn = np.array([random.integers(0, 60, 60) for _ in range(4000)])
    expected = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    np.testing.assert_allclose((low, high), expected, atol=0.03)
    assert all(map(math.isnan, nothing)), "one document has no spread"


def text_run(folder, seed, **changes):
    """A run of a text, as the demo's tokenizer cuts it."""
    from cpmpi.documents.tokenization import load_tokenizer
    from cpmpi.model.fingerprint import tokenizer_sha256

    text = "class Größe:\n    def f(self): return '\x1b[31m'\n" * 4
    ids = np.array(load_tokenizer(DEMO)(text)["input_ids"], np.int32)[:50]
    model = json.dumps({"model_type": "llama", "_name_or_path": str(DEMO)})
    return save_run(folder, seed, ["text"], tokens={"text": ids}, model=model,
                    tokenizer_sha256=tokenizer_sha256(DEMO), **changes)  # fmt: skip


def test_command_prints_and_writes_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = str(save_run(tmp_path / "a", 1, top_k=K, spans=True)), str(save_run(tmp_path / "b", 2, top_k=6, spans=True))
    files = [f"--csv={tmp_path}/c.csv", f"--plot={tmp_path}/p.svg"]
    run = lambda *words: CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)  # noqa: E731
    printed = run(a, b, *files, "--most=3").output
    with cpmpi.open_run(a) as x, cpmpi.open_run(b) as y:
        found = cpmpi.compare(x, y, most=3)
    for words in (
        "3 documents, 369 tokens scored in both", "95% intervals: paired bootstrap over documents, 2,000 draws, seed 0",
        f"{found.corpus.change.difference:+.4f}", "most different tokens:", "most different passages:", "256 to 299",
        f"KL(A || B) at least {found.corpus.divergence.kl_ab:.4f}, ", "most different of 36 spans:",
        "perplexity ",
    ):  # fmt: skip
        assert words in printed, words
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["what"] for row in rows if row["what"] != "span"] == [
        "corpus", *["document"] * 3, *["position"] * 9, *["token"] * 3, *["passage"] * 3,
    ]  # fmt: skip
    assert float(rows[0]["difference"]) == found.corpus.change.difference
    assert float(rows[1]["high"]) == found.documents[0].change.interval.high
    (truth,) = (float(np.mean(d.kl_ab)) for d in [divergence(*(
        tuple(array[1:] for array in best_of("a", seed, k)[1:]) for seed, k in ((1, K), (2, 6))
    ))])  # fmt: skip
    assert float(rows[1]["kl_ab"]) == pytest.approx(truth, rel=1e-6)
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    facts = json.loads(run(a, b, "--json", "--seed=3").stdout)
    assert facts["bootstrap"] == {
        "over": "documents",
        "block_tokens": None,
        "resamples": 2000,
        "seed": 3,
        "level": 0.95,
    }
    assert facts["documents"][1]["n_tokens"] == 1
    assert facts["documents"][1]["low"] is None
    assert facts["corpus"]["difference"] == found.corpus.change.difference
    assert facts["documents"][0]["low"] != found.documents[0].change.interval.low, "another seed"
    assert len(facts["spans"]) == 36


def test_tokens_and_passages_are_shown_in_their_text(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = text_run(tmp_path / "a", 1), text_run(tmp_path / "b", 2)
    files = [f"--csv={tmp_path}/c.csv", f"--plot={tmp_path}/p.png"]
    done = CliRunner().invoke(command, [str(a), str(b), "--most=2", "--passage=50", *files], catch_exceptions=False)
    assert "\x1b" not in done.output
    assert "95% intervals: paired bootstrap over blocks of " in done.output
    with cpmpi.open_run(a) as x, cpmpi.open_run(b) as y:
        token = cpmpi.compare(x, y).tokens[0]
    from cpmpi.documents.tokenization import load_tokenizer

    tokenizer, ids = load_tokenizer(DEMO), x_ids(a)
    with open(tmp_path / "c.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file) if row["what"] in ("token", "passage")}
    assert "def f(self)" in rows["passage"]["text"]
    assert rows["passage"]["text"] == "".join(tokenizer.decode([i]) for i in ids[1:])
    (shown,) = (line for line in done.output.splitlines() if f"{token.change.difference:+.4f}" in line and "[" in line)
    assert tokenizer.decode([ids[token.start]]).strip().split("\n")[0] in shown
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def x_ids(folder):
    with cpmpi.open_run(folder) as run:
        return run.documents[0].token_ids


def test_what_differs_is_said_with_what_matches(tmp_path):
    a = save_run(tmp_path / "a", 1)
    others = ids_of("a").copy()
    others[33] += 1
    cases = {
        "names": (save_run(tmp_path / "names", 2, ("a", "x")),
                  r"1 of 3 documents match: only A has 'b', 'c', only B has 'x'; --matching compares this one$"),
        "length": (save_run(tmp_path / "length", 2, tokens={"c": ids_of("c")[:50]}),
                   r"2 of 3 .*: 'c' has 70 tokens in A and 50 in B; --matching compares these$"),
        "ids": (save_run(tmp_path / "ids", 2, tokens={"a": others}),
                rf"2 of 3 .*: 'a' has other tokens: at position 33 token {others[33] - 1} in A and {others[33]} in B"),
        "unfinished": (save_run(tmp_path / "unfinished", 2, leave=("c",)), r"2 of 3 .*'c' is not complete in B"),
        "tokenizer": (save_run(tmp_path / "tokenizer", 2, tokenizer_sha256="c" * 64),
                      r"3 of 3 .*: their tokenizers differ \(sha256 b{12} in A, c{12} in B\); --matching"),
        "nothing": (save_run(tmp_path / "nothing", 2, ("x",)),
                    r"0 of 3 documents match: only A has [^;]*, only B has 'x'$"),
    }  # fmt: skip
    for name, (folder, words) in cases.items():
        with cpmpi.open_run(a) as x, cpmpi.open_run(folder) as y:
            with pytest.raises(cpmpi.UserError, match=words):
                cpmpi.compare(x, y)
            if name == "nothing":
                with pytest.raises(cpmpi.UserError, match="0 of 3"):
                    cpmpi.compare(x, y, matching=True)
                continue
            same = [one.document for one in cpmpi.compare(x, y, matching=True).documents]
            expected = {"names": ["a"], "ids": ["b", "c"], "unfinished": ["a", "b"], "length": ["a", "b"]}
            assert same == expected.get(name, ["a", "b", "c"])


def test_nothing_in_common_and_files_that_cannot_be(tmp_path):
    a, late = save_run(tmp_path / "a", 1, ["x"]), save_run(tmp_path / "late", 1, ["x"], first=50)
    x, y = opened(a, late)
    with pytest.raises(cpmpi.UserError, match="no token is scored in both"):
        cpmpi.compare(x, y)
    for option, words in (
        (f"--csv={a}/c.csv", r"--csv .*: is in the run folder"),
        (f"--plot={tmp_path}/c.txt", r"--plot: .*: a drawing's name ends in one of"),
        (f"--csv={tmp_path}/no/c.csv", r"--csv .*: no folder"),
    ):
        problem = CliRunner().invoke(command, [str(a), str(a), option]).exception
        with pytest.raises(cpmpi.UserError, match=words):
            raise problem
