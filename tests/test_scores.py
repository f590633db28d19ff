"""Scores of continuations: by token, by byte and against what the answer scores by itself, and which answer is best.

The numbers are those of lm-evaluation-harness, computed here from its own formulas.
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from cpmpi.documents.continuations import ALONE, prefix_ids, without_context
from cpmpi.errors import UserError
from cpmpi.jobs.inspect import questions_of
from cpmpi.run.scores import Row, compared, read_scores, scores_text
from tests.test_bad_input import call
from tests.test_continuations import CHECKPOINT, read


def row(name, logprob, n_tokens=1, n_bytes=1, question="q"):
    answer = int(name.split("/")[1]) if "/" in name else 0
    return Row(
        id=name, question=question, answer=answer, document="d", n_tokens=n_tokens, logprob=logprob,
        per_token=logprob / n_tokens, per_byte=logprob / n_bytes if n_bytes else math.nan, greedy=False, best=False,
        best_per_byte=False,
    )  # fmt: skip


def test_the_best_answer_by_each_score():
    """Four answers, each the best by another score."""
    rows = [row("q/0", -4.0, 1, 1), row("q/1", -6.0, 4, 2), row("q/2", -7.0, 3, 9), row("q/3", -8.0, 2, 3)]
    alone = [row(f"q{ALONE}/{i}", x, question=f"q{ALONE}") for i, x in enumerate((-4.5, -6.1, -7.0, -12.0))]
    found = compared([*rows, row("t", -1.0, question=""), *alone], {f"q{ALONE}/{i}": f"q/{i}" for i in range(4)})
    assert [r.id for r in found] == ["q/0", "q/1", "q/2", "q/3", "t"]
    assert [r.mutual_info for r in found[:4]] == pytest.approx([0.5, 0.1, 0.0, 4.0])
    for best, answer in (("best", 0), ("best_per_token", 1), ("best_per_byte", 2), ("best_mutual_info", 3)):
        assert [getattr(r, best) for r in found] == [i == answer for i in range(4)] + [False], best
    assert math.isnan(found[4].unconditional)
    (facts,) = questions_of(found)
    assert facts["id"] == "q"
    assert [facts[f"best{x}"] for x in ("", "_per_token", "_per_byte", "_mutual_info")] == [0, 1, 2, 3]
    assert facts["margin"] == pytest.approx(2.0)
    assert facts["margin_per_token"] == pytest.approx(7 / 3 - 6 / 4)
    assert facts["margin_mutual_info"] == pytest.approx(3.5)


def test_answers_without_bytes_are_compared_with_none():
    found = compared([row("q/0", -4.0, n_bytes=0), row("q/1", -5.0, n_bytes=0)], {})
    assert [(r.best, r.best_per_byte, r.best_mutual_info) for r in found] == [(True, False, False), (False,) * 3]
    (facts,) = questions_of(found)
    assert (facts["best_per_byte"], facts["margin_per_byte"], facts["best_mutual_info"]) == (None, None, None)


def test_a_table_is_read_back_and_damage_is_named(tmp_path):
    rows = list(compared([row("q/0", -4.1), row('q"\n,/1', -5.0, 3, 0)], {}))
    path = tmp_path / "scores.csv"
    path.write_text(scores_text(rows))
    assert str(read_scores(path)) == str(rows)  # NaN is not equal to itself
    older = [{k: v for k, v in line.items() if k in Row._fields[:11]} for line in csv.DictReader(path.open(newline=""))]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, Row._fields[:11])
        writer.writeheader()
        writer.writerows(older)
    assert math.isnan(read_scores(path)[0].unconditional)
    for text, reason in (("id\nx\n", "missing 10 required"), (path.read_text().replace('"no"', "maybe"), "maybe")):
        path.write_text(text.replace(",no,", ",maybe,"))
        with pytest.raises(UserError, match=rf"scores\.csv: damaged: .*{reason}"):
            read_scores(path)


def test_prefixes(tmp_path):
    (text,) = read(tmp_path, {"document": "d", "id": "a", "text": "x =", "choices": [" 1", [4, 5]]})
    (alone,) = without_context([text], np.array([7]))
    assert (alone.id, alone.upto, alone.stem.tolist(), alone.chosen) == (f"a{ALONE}", 0, [7], True)
    assert [a.tolist() for a in alone.answers] == [a.tolist() for a in text.answers]
    taken = {"document": "d", "id": f"a{ALONE}/0", "token_ids": [1]}
    lines = read(tmp_path, {"document": "d", "id": "a", "choices": [[1]]}, taken)
    with pytest.raises(UserError, match=r"c\.jsonl:1: the id 'a .unconditional./0' is that of an unconditional score"):
        without_context(lines, np.array([7]))
    assert prefix_ids("bos", None, 3).tolist() == [3]
    with pytest.raises(UserError, match="--unconditional bos: this checkpoint has no token that begins a text"):
        prefix_ids("bos", None, None)
    with pytest.raises(UserError, match="--unconditional is empty"):
        prefix_ids("", None, 3)


@pytest.mark.mpi(1)
def test_answers_are_scored_after_a_few_words_too(tmp_path, capsys):
    """The demo's checkpoint: log p(answer | context) - log p(answer | prefix), and what `inspect` shows of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cpmpi
    from cpmpi.run.verify import verify_run

    context, question, prefix = "class Decimal:\n    def f(self):\n        return ", "1 +", "Answer:"
    choices = [" self", " 12345", " x\u00e9"]
    (tmp_path / "c.txt").write_text(context)
    line = {"document": "c.txt", "id": "q", "text": question, "choices": choices}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    given = {"model": CHECKPOINT, "quiet": True}
    cpmpi.prefill(**given, inputs=tmp_path / "c.txt", output=tmp_path / "run", kv_dtype="float32").close()
    cpmpi.extend(
        **given, run=tmp_path / "run", inputs=tmp_path / "lines.jsonl", output=tmp_path / "out", unconditional=prefix
    ).close()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()

    def score(*texts):
        *before, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        ids = [i for part in before for i in part]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([ids + answer])).logits[0].double(), -1)
        return float(sum(logprobs[len(ids) - 1 + i, token] for i, token in enumerate(answer)))

    rows = read_scores(tmp_path / "out" / "scores.csv")
    assert [r.id for r in rows] == ["q/0", "q/1", "q/2"]
    for r, choice in zip(rows, choices, strict=True):
        with_it, without = score(context, question, choice), score(prefix, choice)
        assert r.logprob == pytest.approx(with_it, abs=1e-4 * r.n_tokens)
        assert r.unconditional == pytest.approx(without, abs=1e-4 * r.n_tokens)
        assert r.mutual_info == pytest.approx(with_it - without, abs=2e-4 * r.n_tokens)
        assert r.per_byte == pytest.approx(with_it / len(choice.encode()), abs=1e-4)
    assert sum(r.best_mutual_info for r in rows) == 1
    assert verify_run(tmp_path / "out").problems == []
    from cpmpi.jobs.cli import cli

    facts = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path / "out")]).output)["scores"]
    assert [c["id"] for c in facts["continuations"]] == ["q/0", "q/1", "q/2"]
    assert facts["questions"][0]["best"] == max(rows, key=lambda r: r.logprob).answer
    text = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).output
    assert re.search(r"^question +answers +best +margin +by token +by byte +by mutual information$", text, re.M)
    assert re.search(rf"^q +3 +{facts['questions'][0]['best']} +[0-9.]+ ", text, re.M)
    assert re.search(r"^q/1 +\d+ +-[0-9.]+ ", text, re.M)
    table = (tmp_path / "out" / "scores.csv").read_text()
    (tmp_path / "out" / "scores.csv").write_text(table.replace(repr(rows[1].logprob), "-1.5"))
    status, told = call(["inspect", f"{tmp_path}/out"], capsys)
    assert (status, told) == (1, f"error: {tmp_path}/out/scores.csv: the score of 'q/1' is not what run.h5 says\n")


@pytest.mark.mpi(1)
def test_scores_after_other_words_are_made_again(tmp_path, capsys, monkeypatch):
    """Another question, answer or prefix, or an older run that does not say which: one line, and never old scores."""
    import cpmpi
    from cpmpi.engine import scores

    (tmp_path / "c.txt").write_text("class Decimal:\n    pass\n")
    given = ["--quiet", "--model", str(CHECKPOINT)]
    assert call(["prefill", *given, "--input", f"{tmp_path}/c.txt", "--output", f"{tmp_path}/run"], capsys)[0] == 0
    lines, spec = tmp_path / "lines.jsonl", scores._document_spec

    def extend(question, choices, prefix, output="out"):
        lines.write_text(json.dumps({"document": "c.txt", "id": "q", "text": question, "choices": choices}))
        words = ["--run", f"{tmp_path}/run", "--input", str(lines), "--unconditional", prefix, "--attention", "ring"]
        status, told = call(["extend", *words, "--output", f"{tmp_path}/{output}"], capsys)
        assert status == 0, told
        again = re.findall(
            r"^(\d) continuations? scored again: .*: ('q.*); the earlier scores are set aside$", told, re.M
        )
        already = re.findall(r"^(\d) of \d continuations are scored already$", told, re.M)
        return *again, *map(int, already)

    def older(run, c, i):
        new = spec(run, c, i)
        return replace(new, continues=tuple(pair for pair in new.continues if pair[0] != "question_sha256"))

    with monkeypatch.context() as patch:
        patch.setattr(scores, "_document_spec", older)
        assert extend("1 +", [" 2", " self"], "Answer:") == ()
    alone, both = f"'q{ALONE}/0', 'q{ALONE}/1'", f"'q/0', 'q/1', 'q{ALONE}/0', 'q{ALONE}/1'"
    assert extend("1 +", [" 2", " self"], "Answer:") == (("4", both),), "which question it was is not recorded"
    assert extend("1 +", [" 2", " self"], "A: ") == (("2", alone), 2)
    assert extend("2 +", [" 2", " self"], "A: ") == (("2", "'q/0', 'q/1'"), 2)
    assert extend("2 +", [" 2", " 4"], "A: ") == (("2", f"'q/1', 'q{ALONE}/1'"), 2)
    assert extend("2 +", [" 2", " 4"], "A: ", "fresh") == ()
    for got, want in zip(*(read_scores(tmp_path / out / "scores.csv") for out in ("out", "fresh")), strict=True):
        assert (got.id, got.best) == (want.id, want.best)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
        assert got.unconditional == pytest.approx(want.unconditional, abs=1e-4)
    assert extend("1 +", [" 2", " self"], "Answer:") == (4,), "what was set aside is found again"
    with cpmpi.open_run(tmp_path / "out") as run:
        assert len({document.continues["question_sha256"] for document in run.documents}) == 2
