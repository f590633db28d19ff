"""Pictures of a run: drawn for finished documents, inside the run folder, and no obstacle to running again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from cpmpi.errors import UserError
from cpmpi.jobs.cli import cli

from .conftest import ROOT, clean_environment, mpirun
from .runs import make_run, make_spec
from .test_exact import save_documents, save_llama


def test_report_draws_every_document_and_the_run_can_be_done_again(tmp_path):
    pytest.importorskip("matplotlib")
    save_llama(tmp_path / "model", 2)
    save_documents(tmp_path / "documents", (2, 500))
    job = ["-m", "cpmpi", "score", "--model", str(tmp_path / "model"), "--input", str(tmp_path / "documents")]
    job += ["--output", str(tmp_path / "run")]
    assert mpirun(1, *job).returncode == 0
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    pictures = [tmp_path / "run" / "report" / f"surprisal-{i:06d}.png" for i in range(2)]
    assert result.output.splitlines() == [str(p) for p in pictures]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    again = mpirun(1, *job, "--overwrite")
    assert again.returncode == 0, again.stdout
    assert not pictures[0].exists(), "a picture of the deleted run"


def report(*arguments):
    result = CliRunner().invoke(cli, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return [line.rpartition("/")[2] for line in result.stdout.splitlines()], result.stderr.splitlines()


def test_some_documents_of_an_unfinished_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from cpmpi.run import surprisal

    spec = make_spec(lengths=(9, 1, 30, 12), kv=None)
    names = ("2", "one", "long", "last")
    spec = replace(spec, documents=tuple(replace(d, id=n) for d, n in zip(spec.documents, names, strict=True)))
    make_unfinished(tmp_path / "run", spec, 3)
    monkeypatch.setattr(surprisal, "draw_surprisal", lambda document, path, title: path.write_text(title))
    drawn, told = report(tmp_path / "run", "--to", tmp_path / "all")
    assert drawn == ["surprisal-000000.png", "surprisal-000002.png"]
    assert (tmp_path / "all" / drawn[1]).read_text().startswith("long: 30 tokens, perplexity ")
    assert told == ["document 'one' has one token: there is no surprisal to draw", "document 'last' is not finished"]
    for wanted, places in ((["2"], [0]), (["long", "0"], [0, 2]), (["0-2"], [0, 2]), (["02"], [2])):
        drawn, _ = report(tmp_path / "run", "--to", tmp_path / "some", *(f"--documents={w}" for w in wanted))
        assert drawn == [f"surprisal-{i:06d}.png" for i in places], wanted
    for bad in ("4", "2-1", "0-4", "no\x1b"):
        result = CliRunner().invoke(cli, ["report", str(tmp_path / "run"), "--documents", bad])
        assert isinstance(result.exception, UserError), bad
        have = "no such document; the run has 4 documents, 0 to 3: '2', 'one', 'long', 'last'"
        assert str(result.exception) == f"--documents {bad.replace(chr(27), chr(92) + 'x1b')}: {have}"


def make_unfinished(folder, spec, finished):
    """A run without KV whose first documents are done."""
    from cpmpi.run.folder import start_index

    from .runs import outputs_of

    index = start_index(folder, spec)
    for i in range(finished):
        index.write_outputs(i, **outputs_of(i, spec.documents[i].n_tokens), digests=())


def test_any_title_is_drawn_without_warnings(tmp_path):
    """Chinese with a font that has it, or as boxes: no warning of missing glyphs either way."""
    pytest.importorskip("matplotlib")
    from matplotlib import font_manager

    from cpmpi.run.surprisal import BOX, OWN_FONT, drawable

    assert drawable("plain \xfc") == ("plain \xfc", [OWN_FONT])
    title, families = drawable("\u6f22 \U0010ffff")
    assert title.endswith(f" {BOX}")
    assert (title[0] == "\u6f22") == (len(families) > 1)
    assert {f.name for f in font_manager.fontManager.ttflist} >= set(families)
    spec = make_spec(lengths=(9,), kv=None)
    document = replace(spec.documents[0], id="\u6f22\u5b57\U0001f600 $x$ \x1b\n" + "z" * 300)
    make_run(tmp_path / "run", replace(spec, documents=(document,)))
    line = [sys.executable, "-W", "always", "-m", "cpmpi", "report", str(tmp_path / "run")]
    done = subprocess.run(line, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Glyph" not in done.stderr
    assert "font" not in done.stderr.lower()


def test_without_matplotlib_there_is_no_empty_folder(tmp_path, monkeypatch):
    make_run(tmp_path / "run", make_spec(lengths=(9,), kv=None))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "run")])
    assert str(result.exception) == "pictures need matplotlib: pip install 'cpmpi[plot]'"
    assert not (tmp_path / "run" / "report").exists()
