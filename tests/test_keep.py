"""Scores besides log-probabilities (``--keep``), from a position on (``--from``): against one transformers process.

Tolerances: log-probabilities as in tolerances.py; entropy and variance are sums over the vocabulary of products of
these with probabilities, which add up to 1: twice their bounds. Ranks, greedy and the order of the best tokens follow
from logits that differ by some 1e-5 between the two sides: they must agree wherever no other logit is that close.
"""

from __future__ import annotations

import csv
import json
import math

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from .conftest import ROOT
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


@pytest.mark.parametrize("ranks", [
    pytest.param(2, marks=pytest.mark.mpi(2)),
    *(pytest.param(n, marks=(pytest.mark.mpi(n), pytest.mark.slow)) for n in (1, 3)),
])  # fmt: skip
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
    first = {**given, "inputs": folder / "documents" / "061.npy"}
    cpmpi.score(**first, output=folder / "run", tp=2 if ranks == 2 else 1).close()
    cpmpi.score(**given, output=folder / "run", tp=2 if ranks == 2 else 1).close()  # what is finished is taken over
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


TEXT = "class Größe:\n    x = '😀'  # naïve?\n\n    def f(self): return 1\n" * 6
DEMO = ROOT / "examples" / "demo" / "checkpoint"
PREFIX = 0


@pytest.mark.mpi(2)
def test_text_spans_and_a_prefix_token(tmp_path):
    """The demo's byte-level tokenizer, whose tokens cut characters in pieces."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.run.verify import verify_run

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        (folder / "a.txt").write_text(TEXT)
        (folder / "ids.jsonl").write_text(json.dumps({"id": "ids", "token_ids": [PREFIX, 5, 9, 300]}) + "\n")
        named = [
            {"document": "a.txt", "start": 3, "stop": 40, "id": "Ü"},
            {"document": "a.txt", "start": 9, "stop": 10},
        ]
        (folder / "named.jsonl").write_text("\n".join(map(json.dumps, named)))
    comm.Barrier()
    given = {"model": DEMO, "inputs": folder / "a.txt", "keep": ("rank", "entropy", "topk=2")}
    cpmpi.prefill(**given, output=folder / "lines", spans="lines").close()
    cpmpi.score(**given, output=folder / "late", spans=str(folder / "named.jsonl"), from_position=30).close()
    given["inputs"] = [folder / "a.txt", folder / "ids.jsonl"]
    cpmpi.score(**given, output=folder / "prefix", prefix_token=PREFIX).close()
    with pytest.raises(cpmpi.UserError, match=r"with prefix_token tokenizer, this one has none; choose another"):
        cpmpi.score(
            **{**given, "inputs": folder / "a.txt"}, output=folder / "late", prefix_token="none", from_position=30
        )
    if comm.rank:
        return
    with cpmpi.open_run(folder / "lines") as run:
        check_places(run.documents[0])
        check_lines(run.documents[0], folder / "lines")
    with cpmpi.open_run(folder / "late") as run:
        check_named(run.documents[0])
    with cpmpi.open_run(folder / "prefix") as run:
        check_prefix(run)
    for name in ("lines", "late", "prefix"):
        assert verify_run(folder / name).problems == []
    check_commands(folder)
    check_damage(folder / "lines")


def check_places(document):
    from transformers import AutoTokenizer

    assert (document.n_characters, document.n_bytes) == (len(TEXT), len(TEXT.encode()))
    offsets = AutoTokenizer.from_pretrained(DEMO)(TEXT, return_offsets_mapping=True)["offset_mapping"]
    np.testing.assert_array_equal(document.token_characters, offsets)
    assert document.token_bytes[-1].tolist()[1] == document.n_bytes
    assert (np.diff(document.token_bytes, axis=1) > np.diff(document.token_characters, axis=1)).any()
    scored = len(TEXT.encode()) - len(TEXT[: offsets[0][1]].encode())
    assert document.bits_per_byte == pytest.approx(document.nll / math.log(2) / scored, rel=1e-12)
    assert document.bits_per_character == pytest.approx(document.nll / math.log(2) / (len(TEXT) - offsets[0][1]))


def check_lines(document, folder):
    """Sums of all lines, from the characters up, in the file and in the table; together they are the nll."""
    spans, starts = document.spans, document.token_characters[:, 0]
    ends = [i + 1 for i, c in enumerate(TEXT) if c == "\n"]
    assert spans["characters"].tolist() == [list(pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]
    assert spans["bytes"][:, 1].tolist() == [len(TEXT[:end].encode()) for end in ends]
    for (start, stop), count, logprob in zip(spans["characters"], spans["n_tokens"], spans["logprob"], strict=True):
        inside = document.logprobs[(starts >= start) & (starts < stop)].astype(np.float64)
        assert count == (~np.isnan(inside)).sum()
        assert logprob == pytest.approx(np.nansum(inside), rel=1e-12)
    assert spans["logprob"].sum() == pytest.approx(-document.nll, rel=1e-12)
    with open(folder / "spans.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["logprob"]) for row in rows] == spans["logprob"].tolist()
    assert [int(row["stop_byte"]) for row in rows] == spans["bytes"][:, 1].tolist()
    assert float(rows[1]["perplexity"]) == pytest.approx(np.exp(-spans["logprob"][1] / spans["n_tokens"][1]))
    with open(folder / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["bits_per_byte"]) == document.bits_per_byte


def check_named(document):
    spans, scored = document.spans, document.token_characters[29, 1]
    assert spans["id"].tolist() == ["Ü", ""]
    assert spans["characters"].tolist() == [[3, 40], [9, 10]]
    assert spans["n_tokens"][1] == 0, "before the first token that is scored"
    assert document.first_scored == 30
    assert document.bits_per_character == pytest.approx(document.nll / math.log(2) / (len(TEXT) - scored))


def check_prefix(run):
    """Both documents equal transformers on the prefix token and theirs, from their first token on."""
    assert (run.scoring.prefix_token, run.scoring.prefix_token_id) == (str(PREFIX), PREFIX)
    for document in run.documents:
        before = truth_logprobs(DEMO, [PREFIX, *document.token_ids])[:-1]
        actual = before[np.arange(document.n_tokens), document.token_ids]
        assert np.abs(document.logprobs - actual).max() <= TOKEN
        assert document.first_scored == 0
        assert document.nll == pytest.approx(-actual.sum(), abs=1e-2)
        assert document.perplexity == pytest.approx(np.exp(document.nll / document.n_tokens), rel=1e-12)
        assert (document.kept("rank") >= 1).all()
    text, ids = run.documents
    assert ids.token_ids.tolist() == [PREFIX, 5, 9, 300]
    assert text.bits_per_byte == pytest.approx(text.nll / math.log(2) / len(TEXT.encode()), rel=1e-12)
    assert math.isnan(ids.bits_per_byte)
    assert ids.token_characters is None


def check_commands(folder):
    """inspect and tokens show what is there; no colours in a pipe."""
    from cpmpi.jobs.inspect import command as inspect
    from cpmpi.jobs.tokens import command as tokens

    text = CliRunner().invoke(inspect, [str(folder / "prefix")], catch_exceptions=False).output
    assert "scores    kept: entropy rank topk=2; prefix token 0 (0)\n" in text
    assert "bits/byte" in text
    shown = CliRunner().invoke(tokens, [str(folder / "lines"), "a.txt", "--around", "7", "--context", "2"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].startswith("a.txt: tokens 5 to 9 of ")
    (header,) = (i for i, line in enumerate(lines) if "entropy" in line)
    assert lines[header].split() == ["token", "bits", "rank", "entropy", "most", "probable", "character"]
    assert [line.split()[0] for line in lines[header + 1 :]] == ["5", "6", ">", "8", "9"]
    assert "\x1b" not in shown.output
    coloured = CliRunner().invoke(tokens, [str(folder / "lines"), "0"], color=True)
    assert "\x1b[38;5;16m" in coloured.output
    for arguments, words in (
        (["b.txt"], "no document 'b.txt'; it has 'a.txt'"),
        (["0", "--around", "9999"], "9999: doc"),
    ):
        problem = CliRunner().invoke(tokens, [str(folder / "lines"), *arguments]).exception
        assert words in str(problem)


def check_damage(folder):
    """A flipped bit of a kept score, of a place or of a span is found, and what else there is stays readable."""
    import cpmpi
    from cpmpi.run.verify import verify_run

    for name in ("kept/rank", "kept/topk_logprobs", "text/bytes", "spans/logprob"):
        with h5py.File(folder / "run.h5") as file:
            at = file[f"documents/000000/{name}"].id.get_offset() + 9
        data = bytearray((folder / "run.h5").read_bytes())
        data[at] ^= 1
        (folder / "run.h5").write_bytes(data)
        expected = f"document 'a.txt': {name} does not have the checksum that was recorded"
        assert any(expected in problem for problem in verify_run(folder).problems)
        with cpmpi.open_run(folder) as run:
            assert run.documents[0].logprobs.shape
            with pytest.raises(cpmpi.UserError, match=f"{name} does not have the checksum"):
                run.documents[0].extra(name)
        data[at] ^= 1
        (folder / "run.h5").write_bytes(data)


@pytest.mark.mpi(2)
def test_what_is_kept_goes_on_across_a_checkpoint(tmp_path):
    """Stopped inside a document and gone on: all of it is that of an undisturbed run, bit for bit; nothing else goes on
    with another prefix token."""
    from mpi4py import MPI

    import cpmpi

    from .test_resume import options_of, prepared, run_counted, run_stopped, same

    folder = prepared(tmp_path)
    own = {"keep": ("rank", "moments", "topk=3"), "prefix_token": "5", "from_position": 40}
    run_counted(options_of(folder, "whole", **own))
    run_stopped(options_of(folder, "run", **own))
    assert run_counted(options_of(folder, "run", **own))[0] == [3, 4]
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank:
        return
    same(folder / "whole", folder / "run")
    with cpmpi.open_run(folder / "whole") as a, cpmpi.open_run(folder / "run") as b:
        assert a.documents[0].kept_names == ("rank", "moments", "topk")
        for x, y in zip(a.documents[0].spec.extras, b.documents[0].spec.extras, strict=True):
            np.testing.assert_array_equal(a.documents[0].extra(x.name), b.documents[0].extra(y.name))


def test_a_prefix_token_takes_the_place_of_special_ones(tmp_path):
    from cpmpi.engine.keeping import read_prefix, special_tokens
    from cpmpi.engine.options import JobOptions
    from cpmpi.errors import UserError
    from cpmpi.model.checkpoint import Checkpoint

    def options(**own):
        return JobOptions.of(model=DEMO, inputs="d", output="r", **{"keep_kv": False, **own})

    said = {None: {None: None, True: True}, "none": {None: False, False: False}, "bos": {None: False, True: True}}
    for prefix, answers in said.items():
        for given, expected in answers.items():
            assert special_tokens(options(prefix_token=prefix, special_tokens=given)) is expected
    save_llama(tmp_path / "llama", 1)
    assert read_prefix(options(prefix_token="bos"), Checkpoint(tmp_path / "llama")) == 1
    assert read_prefix(options(prefix_token="none"), Checkpoint(DEMO)) == -1
    for own, words in (
        ({"prefix_token": "bos"}, r"checkpoint names no token that begins a text \(bos_token_id\); give an id"),
        ({"prefix_token": "1024"}, "the vocabulary has 1024 tokens, 0 to 1023"),
        ({"prefix_token": "7", "keep_kv": True}, "only with `cpmpi score`"),
        ({"prefix_token": "none", "special_tokens": True}, "choose one of them"),
    ):
        with pytest.raises(UserError, match=words):
            read_prefix(options(**own), Checkpoint(DEMO))


def test_kept_scores_stay_when_outputs_are_repaired_and_keep_from_appending(tmp_path):
    import cpmpi
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import start
    from cpmpi.engine.repair import repair
    from cpmpi.run.verify import verify_run

    (tmp_path / "a.txt").write_text(TEXT)
    given = {"model": DEMO, "inputs": tmp_path / "a.txt", "output": tmp_path / "run"}
    with cpmpi.prefill(**given, keep=("rank",), from_position=5) as run:
        before, name, index = run.documents[0].logprobs, run.documents[0].id, run.paths.index
        ranks = run.documents[0].kept("rank")
        assert run.documents[0].token_characters is not None
    line = {"document": name, "id": "more", "token_ids": [1, 2]}
    (tmp_path / "more.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(cpmpi.UserError, match=f"nothing can be appended to {name!r}"):
        cpmpi.extend(run=tmp_path / "run", inputs=tmp_path / "more.jsonl", append=True)
    for dataset, mended in (("logprobs", True), ("kept/rank", False)):
        with h5py.File(index, "r+") as file:
            file["documents/000000"][dataset][9] += 1
        assert verify_run(tmp_path / "run").problems
        repair(tmp_path / "run", None, start(), Progress(enabled=False))
        assert (verify_run(tmp_path / "run").problems == []) is mended
        if mended:
            with cpmpi.open_run(tmp_path / "run") as run:
                np.testing.assert_allclose(run.documents[0].logprobs, before, atol=TOKEN)
                np.testing.assert_array_equal(run.documents[0].kept("rank"), ranks)


def test_a_text_that_is_appended_to_loses_the_places_of_its_tokens(tmp_path):
    import cpmpi
    from cpmpi.run.verify import verify_run

    (tmp_path / "a.txt").write_text(TEXT)
    given = {"model": DEMO, "inputs": tmp_path / "a.txt"}
    with cpmpi.prefill(**given, output=tmp_path / "run") as run:
        name, n_tokens = run.documents[0].id, run.documents[0].n_tokens
        assert run.documents[0].token_characters is not None
        assert run.documents[0].bits_per_byte > 0
    cpmpi.prefill(**given, output=tmp_path / "spans", spans="lines").close()
    line = {"document": name, "id": "more", "token_ids": [1, 2]}
    (tmp_path / "more.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(cpmpi.UserError, match=f"nothing can be appended to {name!r}"):
        cpmpi.extend(run=tmp_path / "spans", inputs=tmp_path / "more.jsonl", append=True)
    cpmpi.extend(run=tmp_path / "run", inputs=tmp_path / "more.jsonl", append=True).close()
    with cpmpi.prefill(**given, output=tmp_path / "run") as run:  # finds it finished
        document = run.documents[0]
        assert document.n_tokens == n_tokens + 2
        assert (document.token_characters, document.token_bytes, document.n_bytes, document.n_characters) == (None,) * 4
        assert np.isnan([document.bits_per_byte, document.bits_per_character]).all()
        assert not {"text", "checksums"} & {*document.group}
    assert verify_run(tmp_path / "run").problems == []
